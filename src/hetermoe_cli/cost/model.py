"""CostModel: a plan's inputs -> seconds, bytes and memory of everything a device can do."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.cost.curves import AttentionCurve, Curve
from hetermoe_cli.cost.device import STATE_BYTES, DeviceCost, find_table
from hetermoe_cli.cost.memory import MemoryModel
from hetermoe_cli.cost.ports import Network
from hetermoe_cli.cost.shared_rows import reached
from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.profile import BYTES_PER_ELEMENT, AttentionPoint
from hetermoe_cli.spec.schedule_choice import PassOrder, ScheduleChoice
from hetermoe_cli.spec.train import DenseState, Recompute


class CostModel(MemoryModel):
    """Costs of one model and training spec on the devices of one cluster. All methods are pure.

    T = tokens; row = a token's copy for one expert. Each travels, or a token once per device (cost/shared_rows.py).
    `groups` as of MemoryModel.
    """

    def __init__(self, inputs: Inputs, groups: int = 1) -> None:
        self.inputs, self.model, self.train, self.groups = inputs, inputs.model, inputs.train, groups
        self.devices = inputs.devices()
        self.network = Network(self.devices)
        self.row_bytes = self.model.hidden_size * BYTES_PER_ELEMENT[self.train.precision]
        self.types = {name: self._device_cost(name) for name in inputs.cluster.device_types}

    def _device_cost(self, name: str) -> DeviceCost:
        profile = self.inputs.profiles.get(name)
        if profile is None:
            raise UserError(f"cluster {self.inputs.cluster.name}: no profile for device type {name!r}")
        table = find_table(profile, self.model, self.train.precision_of(name))

        def by_documents(points: Sequence[AttentionPoint], field: str) -> AttentionCurve:
            source = f"profile {name}: field {field}"
            return AttentionCurve(points, self.train.attention_tokens, source, self.documents_per_sequence)

        return DeviceCost(
            type=name,
            attention=by_documents(table.attention, "attention"),
            dense=by_documents(table.dense, "dense") if self.model.dense_layers else None,
            expert=Curve([p.tokens for p in table.expert], table.expert),
            head=Curve([p.tokens for p in table.head], table.head),
            optimizer_seconds_per_parameter=table.optimizer_seconds_per_parameter,
            memory_bytes=profile.memory_bytes,
            framework_bytes=profile.framework_bytes,
            on_cpu=profile.accelerator == "cpu",
        )

    def schedule(
        self,
        micro_batches: int,
        window: int,
        recompute: Recompute,
        dense_state: DenseState,
        passes: PassOrder = "in_turn",
    ) -> ScheduleChoice:
        """In the default order of experts and transfers, with the training spec's dispatch."""
        return ScheduleChoice(
            micro_batches=micro_batches,
            window=window,
            recompute=recompute,
            dense_state=dense_state,
            dispatch=self.train.dispatch,
            passes=passes,
        )

    @property
    def least_row_bytes(self) -> float:
        """What every row for an expert adds to what travels, at least: all of a token's may go to one device."""
        return self.row_bytes / (self.model.top_k if self.train.dispatch == "per_device" else 1)

    def travelling(self, hosted: NDArray[np.float64] | NDArray[np.int64]) -> NDArray[np.float64]:
        """Experts whose rows are as many as go to a device that hosts so many: under a balanced router, as expected."""
        if self.train.dispatch == "per_expert":
            return np.asarray(hosted, dtype=np.float64)
        experts, k = self.model.experts, self.model.top_k
        return reached(np.clip(hosted / experts, 0, 1), experts, k) * (experts / k)

    def travelling_share(self, hosted: float) -> float:
        """Of the rows for so many experts of one device, those that travel."""
        return float(self.travelling(np.array(hosted))) / hosted if hosted > 0 else 1.0

    @property
    def documents_per_sequence(self) -> float:
        """How many documents of the assumed length a sequence holds; 1 where attention goes over all of it."""
        return self.train.sequence_length / self.train.attention_tokens

    def of(self, rank: int) -> DeviceCost:
        """The costs of a rank's device type."""
        return self.types[self.devices[rank].type]

    @cached_property
    def members(self) -> dict[str, NDArray[np.bool_]]:
        """[world] whether a rank's device is of a type, by type."""
        types = np.array([device.type for device in self.devices])
        return {device: types == device for device in dict.fromkeys(types.tolist())}

    @cached_property
    def shares(self) -> NDArray[np.float64] | None:
        """[layers, experts] shares of a layer's rows under the inputs' expert load; None for a balanced router."""
        load = self.inputs.expert_load
        return np.array(load.shares) if load else None

    @cached_property
    def balanced(self) -> "CostModel":
        """The same with a balanced router."""
        if self.inputs.expert_load is None:
            return self
        return CostModel(self.inputs.model_copy(update={"expert_load": None}), self.groups)

    @cached_property
    def steps(self) -> list["CostModel"]:
        """The same under the load of every sample of the expert load; itself where there are none."""
        load = self.inputs.expert_load
        if load is None or not load.samples:
            return [self]
        return [CostModel(self.inputs.model_copy(update={"expert_load": step}), self.groups) for step in load.steps]

    def expert_rows(self, sequences: float, layer: int, experts: Sequence[int]) -> list[float]:
        """Rows that each of `experts` gets from `sequences` sequences under the inputs' expert load."""
        if self.shares is None:
            return [self.rows_per_expert(sequences)] * len(experts)
        rows: list[float] = (
            self.shares[layer, experts] * self.rows_per_expert(sequences) * self.model.experts
        ).tolist()
        return rows

    @cached_property
    def dense_gradient_bytes(self) -> int:
        """What attending ranks all-reduce for the dense part."""
        return self.model.dense_parameters * self.gradient_bytes

    @property
    def gradient_bytes(self) -> int:
        """Of one parameter."""
        return STATE_BYTES[self.train.precision][1]

    @property
    def expert_gradient_bytes(self) -> int:
        """What attending ranks all-reduce for one replicated expert."""
        return self.model.expert_parameters * self.gradient_bytes

    def synchronise_seconds(self, schedule: ScheduleChoice, attending: Sequence[int], replicated: int) -> float:
        """All-reduce of dense and `replicated` experts' gradients over a group's attending ranks, one after another.

        Where optimizer states are shared out, gradients are scattered and new weights gathered, which moves as much;
        `sharding_seconds` on top of a fully sharded dense part, whose weights are gathered as they are needed.
        """
        dense = (0.5 if schedule.dense_state == "full" else 1.0) * self.dense_gradient_bytes
        seconds = self.network.all_reduce_seconds(attending, dense + replicated * self.expert_gradient_bytes)
        return seconds + self.sharding_seconds(schedule, attending)

    def reduce_seconds(self, schedule: ScheduleChoice, attending: Sequence[int], layer: int, replicated: int) -> float:
        """The part of it that follows a layer's backward: the dense part of the layer and its `replicated` experts."""
        size = self.segment_parameters(layer) * self.gradient_bytes + replicated * self.expert_gradient_bytes
        return scattered(schedule) * self.network.all_reduce_seconds(attending, size)

    def gather_seconds(self, attending: Sequence[int], layer: int, replicated: int = 0) -> float:
        """All-gather of a layer's dense weights (of the head: model.layers) and of its `replicated` experts', where
        they or their states are shared out: half an all-reduce."""
        size = self.segment_parameters(layer) + replicated * self.model.expert_parameters
        return self.network.all_reduce_seconds(attending, size * self.weight_bytes(attending)) / 2

    def weight_bytes(self, holders: Sequence[int]) -> int:
        """Of one parameter that `holders` tell each other; fp32 holds what ranks of several precisions have."""
        precisions = {self.train.precision_of(self.devices[rank].type) for rank in holders}
        return BYTES_PER_ELEMENT[precisions.pop() if len(precisions) == 1 else "fp32"]

    def sharding_seconds(self, schedule: ScheduleChoice, attending: Sequence[int]) -> float:
        """What a fully sharded dense part adds at most: in every window its weights are gathered forward and backward,
        and its gradients scattered at the end (the last time is part of the all-reduce).

        Each is half an all-reduce. An upper estimate: a replay overlaps them with compute, and gathers fewer.
        """
        if schedule.dense_state != "full":
            return 0.0
        windows = schedule.micro_batches // schedule.window
        halves = 2 * windows + (windows - 1)
        return halves / 2 * self.network.all_reduce_seconds(attending, self.dense_gradient_bytes)

    def optimizer_seconds(self, device: DeviceCost, parameters: float) -> float:
        """AdamW step over `parameters` parameters."""
        return device.optimizer_seconds_per_parameter * parameters


def scattered(schedule: ScheduleChoice) -> float:
    """Bytes that summing gradients moves, in those of an all-reduce: where states are shared out, a rank needs the sum
    of its own share only, and a reduce-scatter moves half."""
    return 0.5 if schedule.shares_states else 1.0

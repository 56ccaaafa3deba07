"""CostModel: a plan's inputs -> seconds, bytes and memory of everything a device can do."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.cost.curves import AttentionCurve, Cost, Curve
from hetermoe_cli.cost.ports import Network
from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.layout import ScheduleChoice
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.plan import Inputs, Memory
from hetermoe_cli.spec.profile import BYTES_PER_ELEMENT, KernelTable, Profile

# Bytes a parameter of (weights, gradients, optimizer): mixed precision keeps an fp32 master copy with both AdamW
# moments; fp32 and fp64 keep the moments in their own precision. All that may be mixed in one plan sum up to 16.
STATE_BYTES: dict[str, tuple[int, int, int]] = {
    "fp16": (2, 2, 12),
    "bf16": (2, 2, 12),
    "fp32": (4, 4, 8),
    "fp64": (8, 8, 16),
}
_WIDE_BYTES = 4  # what gradients of fp16 and bf16 are added up in


@dataclass(frozen=True)
class DeviceCost:
    """One device type at the plan's shape, precision and sequence length."""

    type: str
    attention: AttentionCurve
    expert: Curve
    head: Curve
    optimizer_seconds_per_parameter: float
    memory_bytes: int
    framework_bytes: int


@dataclass(frozen=True)
class ExpertRows:
    """Rows of a micro-batch for each expert that a rank holds, all layers in turn.

    `largest_share`: the largest share of a layer's rows that it receives.
    """

    hosted: list[float]
    replicated: list[float]
    largest_share: float


def find_table(profile: Profile, model: ModelConfig, precision: str) -> KernelTable:
    """The kernel table that fits; UserError names the shape or precision that the profile lacks."""
    for table in profile.tables:
        if table.shape == model.shape and table.precision == precision:
            return table
    have = "; ".join(f"{table.shape.label()} {table.precision}" for table in profile.tables)
    raise UserError(
        f"profile {profile.device}: field tables: nothing for {model.shape.label()} at {precision} "
        f"(it has {have}): run `hetermoe profile --model {model.name} --precision {precision}` on the device"
    )


class CostModel:
    """Costs of one model and training spec on the devices of one cluster. All methods are pure.

    T = tokens; row = one token copy on its way to one expert (a token travels once per chosen expert).
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.model, self.train = inputs, inputs.model, inputs.train
        self.devices = inputs.devices()
        self.network = Network(self.devices)
        self.row_bytes = self.model.hidden_size * BYTES_PER_ELEMENT[self.train.precision]
        self.types = {name: self._device_cost(name) for name in inputs.cluster.device_types}

    def _device_cost(self, name: str) -> DeviceCost:
        profile = self.inputs.profiles.get(name)
        if profile is None:
            raise UserError(f"cluster {self.inputs.cluster.name}: no profile for device type {name!r}")
        table = find_table(profile, self.model, self.train.precision_of(name))
        return DeviceCost(
            type=name,
            attention=AttentionCurve(table.attention, self.train.sequence_length, f"profile {name}"),
            expert=Curve([p.tokens for p in table.expert], table.expert),
            head=Curve([p.tokens for p in table.head], table.head),
            optimizer_seconds_per_parameter=table.optimizer_seconds_per_parameter,
            memory_bytes=profile.memory_bytes,
            framework_bytes=profile.framework_bytes,
        )

    def of(self, rank: int) -> DeviceCost:
        """The costs of a rank's device type."""
        return self.types[self.devices[rank].type]

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
        return CostModel(self.inputs.model_copy(update={"expert_load": None}))

    def expert_rows(self, sequences: float, layer: int, experts: Sequence[int]) -> list[float]:
        """Rows that each of `experts` gets from `sequences` sequences under the inputs' expert load."""
        if self.shares is None:
            return [self.rows_per_expert(sequences)] * len(experts)
        rows: list[float] = (
            self.shares[layer, experts] * self.rows_per_expert(sequences) * self.model.experts
        ).tolist()
        return rows

    def rows_per_expert(self, sequences: float) -> float:
        """Rows that each expert gets from `sequences` sequences under a balanced router."""
        return sequences * self.train.sequence_length * self.model.top_k / self.model.experts

    def head_cost(self, device: DeviceCost, sequences: float) -> Cost:
        """Last combine, final norm, head and loss for `sequences` sequences."""
        return device.head(sequences * self.train.sequence_length)

    @cached_property
    def dense_gradient_bytes(self) -> int:
        """What attending ranks all-reduce for the dense part."""
        return self.model.dense_parameters * STATE_BYTES[self.train.precision][1]

    @property
    def expert_gradient_bytes(self) -> int:
        """What attending ranks all-reduce for one replicated expert."""
        return self.model.expert_parameters * STATE_BYTES[self.train.precision][1]

    def dense_state_bytes(self, schedule: ScheduleChoice, attending: int) -> tuple[float, float, float]:
        """Bytes (weights, gradients, optimizer) of the dense part on each of `attending` ranks."""
        state, model = schedule.dense_state, self.model
        weights, gradients, optimizer = (model.dense_parameters * size for size in STATE_BYTES[self.train.precision])
        if state == "replicated":
            return weights, gradients, optimizer
        if state == "optimizer":
            return weights, gradients, optimizer / attending
        # the part at work is whole: a layer, or embedding and head
        whole = max(model.attention_layer_parameters, model.edge_parameters) / model.dense_parameters
        share = 1 / attending + whole * (1 - 1 / attending)
        return weights * share, gradients * share, optimizer / attending

    def dense_updates(self, schedule: ScheduleChoice, attending: int) -> float:
        """Dense parameters that each of `attending` ranks updates."""
        return self.model.dense_parameters / (1 if schedule.dense_state == "replicated" else attending)

    def synchronise_seconds(self, schedule: ScheduleChoice, attending: Sequence[int], replicated: int) -> float:
        """All-reduce of dense and `replicated` experts' gradients over a group's attending ranks, one after another.

        New weights of sharded optimizer states are gathered on top, half an all-reduce. A fully sharded dense part has
        its gradients scattered and its weights gathered in as many bytes as one all-reduce.
        """
        size = (1.5 if schedule.dense_state == "optimizer" else 1.0) * self.dense_gradient_bytes
        seconds = self.network.all_reduce_seconds(attending, size + replicated * self.expert_gradient_bytes)
        return seconds + self.gather_seconds(schedule, attending)

    def reduce_seconds(self, schedule: ScheduleChoice, attending: Sequence[int], layer: int, replicated: int) -> float:
        """The part of it that follows a layer's backward: the dense part of the layer and its `replicated` experts.

        `layer` 0 brings the embedding with it, model.layers is the head. The gradients of a fully sharded dense part
        are scattered, which is half an all-reduce.
        """
        size = self.segment_parameters(layer) * STATE_BYTES[self.train.precision][1]
        share = 0.5 if schedule.dense_state == "full" else 1.0
        return self.network.all_reduce_seconds(attending, share * size + replicated * self.expert_gradient_bytes)

    def segment_parameters(self, layer: int) -> int:
        """Dense parameters whose gradients are complete after the layer's last backward; model.layers: the head's."""
        model = self.model
        embedding = model.hidden_size * model.vocab_size
        if layer == model.layers:
            return model.edge_parameters - embedding
        return model.attention_layer_parameters + (0 if layer else embedding)

    def after_backward_seconds(self, schedule: ScheduleChoice, attending: Sequence[int]) -> float:
        """The part of it that nothing overlaps: where the dense part's states are sharded, the all-gather of its new
        weights, and the gathers of a fully sharded one."""
        if schedule.dense_state == "replicated":
            return 0.0
        gather = self.network.all_reduce_seconds(attending, self.dense_gradient_bytes) / 2
        return gather + self.gather_seconds(schedule, attending)

    def gather_seconds(self, schedule: ScheduleChoice, attending: Sequence[int]) -> float:
        """What a fully sharded dense part adds: in every window its weights are gathered forward and backward, and its
        gradients scattered at the end (the last time is part of the all-reduce).

        Each is half an all-reduce. An upper estimate: an engine hides most of it behind compute, none is hidden here.
        """
        if schedule.dense_state != "full":
            return 0.0
        windows = schedule.micro_batches // schedule.window
        halves = 2 * windows + (windows - 1)
        return halves / 2 * self.network.all_reduce_seconds(attending, self.dense_gradient_bytes)

    def optimizer_seconds(self, device: DeviceCost, parameters: float) -> float:
        """AdamW step over `parameters` parameters."""
        return device.optimizer_seconds_per_parameter * parameters

    # Memory at the turn from forward to backward, when a window's activations are all alive. Each of the following is
    # linear in what a device holds, so that the MILP can use it as it is. Tensors are named as in runtime/stage.py.

    def expert_activation_bytes(self, device: DeviceCost, rows: float, recompute: bool) -> float:
        """Kept from forward to backward by one expert on `rows` rows of one micro-batch: what autograd saved with the
        rows themselves, or only these. Its outputs are sent and dropped."""
        return rows * self.row_bytes if recompute else device.expert(rows).saved_bytes

    def _border_bytes(self, sequences: int, tensors: int) -> float:
        """So many tensors of a micro-batch's tokens, [T, H] each."""
        return tensors * sequences * self.train.sequence_length * self.row_bytes

    def attention_activation_bytes(self, device: DeviceCost, sequences: int, recompute: bool) -> float:
        """Kept by one attention stage for one micro-batch: with recompute only its inputs (residual, k outputs).

        Else what autograd saved, with the inputs; the residual that it reads is the one that the stage before saved.
        """
        if recompute:
            return self._border_bytes(sequences, 1 + self.model.top_k)
        return max(0.0, device.attention(sequences).saved_bytes - self._border_bytes(sequences, 1))

    def attention_kept_bytes(self, device: DeviceCost, sequences: int, recompute: bool) -> float:
        """Kept by an attending device for one micro-batch, all layers together.

        The first stage has no k outputs to read but the head does; to this comes the gradient of the head's residual,
        which waits for its attention stage.
        """
        each = self.attention_activation_bytes(device, sequences, recompute)
        return self.model.layers * each + self._border_bytes(sequences, 1)

    def transient_bytes(self, device: DeviceCost, sequences: int, recompute: bool) -> float:
        """Largest working set of a single attention or head task of an attending device, beside what is kept.

        Head: what it saves without its inputs, and the gradient of its matrix. Attention: what is saved when it runs
        again. Where gradients are narrower than fp32, those of the part at work are in fp32 beside (`Gradients.fold`).
        """
        if not sequences:
            return 0.0
        inputs = self._border_bytes(sequences, 1 + self.model.top_k)
        matrix, narrow = self.model.hidden_size * self.model.vocab_size, self._narrow(device)
        # of the matrix: its new gradient, and in fp32 that and the sum of those before
        head = float(matrix * (self._element_bytes(device) + narrow * 2 * _WIDE_BYTES))
        head += max(0.0, self.head_cost(device, sequences).saved_bytes - inputs)
        stage = float(narrow * _WIDE_BYTES * self.model.attention_layer_parameters)
        if recompute:
            stage += max(0.0, device.attention(sequences).saved_bytes - inputs)
        return max(head, stage)

    def expert_transient_bytes(self, device: DeviceCost, rows: float, recompute: bool) -> float:
        """Working set of one expert of a layer's backward, beside what is kept: what is saved when it runs again, or
        after that is used up its gradient, which autograd stacks with those of the other experts of the layer: two
        thirds of it (gate_up) exist twice for a moment. fp32 gradients as in `transient_bytes`.

        Not in it: what the task of a single expert computes and drops, about as much as it saves.
        """
        saved, size, narrow = device.expert(rows).saved_bytes, self.model.expert_parameters, self._narrow(device)
        stacked = self._element_bytes(device) * (1 if narrow else 5 / 3) + narrow * 2 / 3 * _WIDE_BYTES
        kept = self.expert_activation_bytes(device, rows, recompute)
        return narrow * _WIDE_BYTES * size + max(saved, kept, stacked * size) - kept

    def _element_bytes(self, device: DeviceCost) -> int:
        return BYTES_PER_ELEMENT[self.train.precision_of(device.type)]

    def _narrow(self, device: DeviceCost) -> bool:
        return self._element_bytes(device) < _WIDE_BYTES

    def buffer_bytes(
        self, sequences_per_micro_batch: int, sequences: int, hosted_share: float, window: int = 1
    ) -> float:
        """Messages in flight: rows of the own tokens each way, and rows for a share of all experts. A host's working
        set is one of them; the gradients of a whole `window` may wait for it, as heads are done before experts."""
        rows = 2 * sequences + (1 + window) * hosted_share * sequences_per_micro_batch
        return rows * self.train.sequence_length * self.model.top_k * self.row_bytes

    def memory(
        self,
        device: DeviceCost,
        *,
        sequences: int,
        sequences_per_micro_batch: int,
        schedule: ScheduleChoice,
        hosted: list[int],
        replicated: list[int],
        rows: ExpertRows | None = None,
        attending: int = 1,
    ) -> Memory:
        """Bytes of one rank under a balanced router, or where its experts get `rows`.

        `hosted` and `replicated`: experts per layer. `attending`: ranks of the group that do, for a sharded dense part.
        """
        held = sum(hosted) + (sum(replicated) if sequences else 0)
        dense = self.dense_state_bytes(schedule, attending) if sequences else (0.0, 0.0, 0.0)
        weights, gradients, optimizer = (
            held * self.model.expert_parameters * size + part
            for size, part in zip(STATE_BYTES[self.train.precision], dense, strict=True)
        )
        again = schedule.recompute_experts
        expected, own = self.rows_per_expert(sequences_per_micro_batch), self.rows_per_expert(sequences)
        if rows:
            each = [*rows.hosted, *rows.replicated]
            kept = sum(self.expert_activation_bytes(device, count, again) for count in each)
            largest, share = max((device.expert(count).saved_bytes for count in each), default=0.0), rows.largest_share
        else:
            kept = sum(hosted) * self.expert_activation_bytes(device, expected, again)
            kept += sum(replicated) * self.expert_activation_bytes(device, own, again)  # no rows where none attends
            largest = device.expert(expected).saved_bytes * bool(held)
            share = max(hosted, default=0) / self.model.experts
        if sequences:
            kept += self.attention_kept_bytes(device, sequences, schedule.recompute_attention)
        peak = self.transient_bytes(device, sequences, schedule.recompute_attention) + largest
        peak += max(hosted, default=0) * self.expert_transient_bytes(device, expected, again)
        return Memory(
            weights_bytes=int(weights),
            gradients_bytes=int(gradients),
            optimizer_bytes=int(optimizer),
            activations_bytes=int(schedule.window * kept + peak),
            buffers_bytes=int(self.buffer_bytes(sequences_per_micro_batch, sequences, share, schedule.window)),
            framework_bytes=device.framework_bytes,
            capacity_bytes=device.memory_bytes,
        )

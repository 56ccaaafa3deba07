"""CostModel: a plan's inputs -> seconds, bytes and memory of everything a device can do."""

from dataclasses import dataclass
from functools import cached_property

from hetermoe_cli.cost.curves import AttentionCurve, Cost, Curve
from hetermoe_cli.cost.ports import Network
from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.plan import Inputs, Memory, ScheduleChoice
from hetermoe_cli.spec.profile import BYTES_PER_ELEMENT, KernelTable, Profile

# Bytes a parameter of (weights, gradients, optimizer): mixed precision keeps an fp32 master copy with both AdamW
# moments; fp32 and fp64 keep the moments in their own precision.
STATE_BYTES: dict[str, tuple[int, int, int]] = {
    "fp16": (2, 2, 12),
    "bf16": (2, 2, 12),
    "fp32": (4, 4, 8),
    "fp64": (8, 8, 16),
}


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
        table = find_table(profile, self.model, self.train.precision)
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

    def optimizer_seconds(self, device: DeviceCost, parameters: float) -> float:
        """AdamW step over `parameters` parameters."""
        return device.optimizer_seconds_per_parameter * parameters

    # Memory. Each of the following is linear in what a device holds, so that the MILP can use it as it is.

    def expert_activation_bytes(self, device: DeviceCost, rows: float, recompute: bool) -> float:
        """Kept from forward to backward by one expert on `rows` rows of one micro-batch."""
        return rows * self.row_bytes if recompute else device.expert(rows).saved_bytes

    def attention_activation_bytes(self, device: DeviceCost, sequences: int, recompute: bool) -> float:
        """Kept by one attention stage for one micro-batch: with recompute only its inputs (residual, k outputs)."""
        if not recompute:
            return device.attention(sequences).saved_bytes
        tokens = sequences * self.train.sequence_length
        return tokens * self.row_bytes * (1 + self.model.top_k)

    def transient_bytes(self, device: DeviceCost, sequences: int) -> float:
        """Largest working set of a single attention or head task of an attending device."""
        if not sequences:
            return 0.0
        return max(device.attention(sequences).saved_bytes, self.head_cost(device, sequences).saved_bytes)

    def buffer_bytes(self, sequences_per_micro_batch: int, sequences: int, hosted_share: float) -> float:
        """One message in flight each way: rows of the own tokens, and rows for a share of all experts."""
        rows = (sequences + hosted_share * sequences_per_micro_batch) * self.train.sequence_length * self.model.top_k
        return 2 * rows * self.row_bytes

    def memory(
        self,
        device: DeviceCost,
        *,
        sequences: int,
        sequences_per_micro_batch: int,
        schedule: ScheduleChoice,
        hosted: list[int],
        replicated: list[int],
    ) -> Memory:
        """Bytes of one rank under a balanced router.

        `hosted` and `replicated`: experts per layer.
        """
        held = sum(hosted) + (sum(replicated) if sequences else 0)
        parameters = held * self.model.expert_parameters + (self.model.dense_parameters if sequences else 0)
        weights, gradients, optimizer = (parameters * size for size in STATE_BYTES[self.train.precision])
        rows = self.rows_per_expert(sequences_per_micro_batch)
        kept = sum(hosted) * self.expert_activation_bytes(device, rows, schedule.recompute_experts)
        if sequences:
            own = self.rows_per_expert(sequences)
            kept += sum(replicated) * self.expert_activation_bytes(device, own, schedule.recompute_experts)
            kept += self.model.layers * self.attention_activation_bytes(device, sequences, schedule.recompute_attention)
        peak = self.transient_bytes(device, sequences) + device.expert(rows).saved_bytes * bool(held)
        share = max(hosted, default=0) / self.model.experts
        return Memory(
            weights_bytes=weights,
            gradients_bytes=gradients,
            optimizer_bytes=optimizer,
            activations_bytes=int(schedule.window * kept + peak),
            buffers_bytes=int(self.buffer_bytes(sequences_per_micro_batch, sequences, share)),
            framework_bytes=device.framework_bytes,
            capacity_bytes=device.memory_bytes,
        )

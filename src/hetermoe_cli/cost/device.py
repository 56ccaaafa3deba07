"""What one device type costs at a plan's shape, and the bytes of training states."""

from dataclasses import dataclass

from hetermoe_cli.cost.curves import AttentionCurve, Curve
from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.profile import KernelTable, Profile

# Bytes a parameter of (weights, gradients, optimizer): mixed precision keeps an fp32 master copy with both AdamW
# moments; fp32 and fp64 keep the moments in their own precision. All that may be mixed in one plan sum up to 16.
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
    dense: AttentionCurve | None  # one dense layer, where the model has any
    expert: Curve
    head: Curve
    optimizer_seconds_per_parameter: float
    memory_bytes: int
    framework_bytes: int
    on_cpu: bool = False


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

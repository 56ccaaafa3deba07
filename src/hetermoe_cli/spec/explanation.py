"""What a plan says of itself: its binding resource, the layouts that lost, and the same plan on other clusters."""

from pydantic import Field

from hetermoe_cli.spec.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, Spec


class TightMemory(Spec):
    """Ranks of one type whose memory is nearly full: `share` is the fullest one's, of the usable bytes."""

    device: str
    ranks: list[NonNegativeInt] = Field(min_length=1)
    share: NonNegativeFloat
    largest_kind: str


class LostLayout(Spec):
    """The best layout found of one family, how much slower than the plan it is (0.08: 8 %), and why."""

    family: str
    schedule: str
    iteration_seconds: PositiveFloat
    slower: NonNegativeFloat
    critical_path: dict[str, NonNegativeFloat]
    reason: str


class Explanation(Spec):
    """Why the plan takes as long as it does.

    `critical_path`: share of the iteration by resource along the simulated critical path, together one; `binding` is
    the largest. `memory_excluded` tells of faster orders of the same placement that do not fit ("" if none is known).
    """

    critical_path: dict[str, NonNegativeFloat]
    binding: str
    tight_memory: list[TightMemory] = Field(default_factory=list)
    memory_excluded: str = ""
    runner_ups: list[LostLayout] = Field(default_factory=list)


class Variant(Spec):
    """The plan for the same training on a changed cluster; null figures and the reason where there is none.

    `change` is "+2 A40" or "-1 V100, +1 A40"; `gained` compares tokens/s with the unchanged cluster's (0.05: 5 % more).
    Prices are of all devices, used or not, and absent where a node group has none.
    """

    change: str
    devices: dict[str, NonNegativeInt]
    iteration_seconds: PositiveFloat | None = None
    tokens_per_second: PositiveFloat | None = None
    tokens_per_second_per_device: PositiveFloat | None = None
    gained: float | None = None
    gap: NonNegativeFloat | None = None
    binding: str = ""
    price_per_hour: PositiveFloat | None = None
    tokens_per_dollar: PositiveFloat | None = None
    reason: str = ""

"""Experts that move in mid-run: what was decided, what is in force, and the history that a run folder keeps."""

from typing import Literal

from pydantic import Field

from hetermoe_cli.spec.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, Spec, sha256
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.spec.load import ExpertLoad


class Decision(Spec):
    """Whether moving experts pays under a measured load. `placement` null: stay, for `reason`.

    Seconds are simulated, nominal ones of the plan's devices: an iteration as it is and after the move, and the move.
    `moved`: experts that a rank gets which did not hold them.
    """

    placement: list[LayerPlacement] | None
    reason: str = ""
    before_seconds: PositiveFloat
    after_seconds: PositiveFloat
    move_seconds: NonNegativeFloat
    moved: NonNegativeInt


class Rebalance(Spec):
    """A placement in force from `step` on, and what it was solved for: the load and each rank's slowdown (measured
    over profiled seconds). `iteration_seconds` is its simulated iteration; `plan_layout_sha256` the plan's layout."""

    step: NonNegativeInt
    placement: list[LayerPlacement] = Field(min_length=1)
    moved: NonNegativeInt
    expert_load: ExpertLoad
    slowdown: list[PositiveFloat]
    iteration_seconds: PositiveFloat
    plan_layout_sha256: str

    def is_of(self, layout: Layout) -> bool:
        """Whether it was solved for a run of this layout."""
        return self.plan_layout_sha256 == sha256(layout)

    def apply(self, layout: Layout) -> Layout:
        """The plan's layout with the experts where they are now."""
        return layout.model_copy(update={"placement": self.placement})


class Rebalances(Spec):
    """rebalances.yaml of a run folder: every change of placement, in the order of their steps."""

    kind: Literal["rebalances"] = "rebalances"
    schema_version: Literal[1] = 1
    changes: list[Rebalance]

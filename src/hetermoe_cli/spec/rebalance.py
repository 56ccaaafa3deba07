"""Experts that move in mid-run: what was decided, what is in force, and the history that a run folder keeps."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from hetermoe_cli.spec.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, Spec, sha256
from hetermoe_cli.spec.load import ExpertLoad
from hetermoe_cli.spec.plan import Group


class Decision(Spec):
    """Whether moving experts pays under a measured load. `groups`: where they go; null: stay, for `reason`.

    Seconds are simulated, nominal ones of the plan's devices: an iteration as it is and after the move, and the move.
    `moved`: experts that a rank gets which did not hold them.
    """

    groups: list[Group] | None
    reason: str = ""
    before_seconds: PositiveFloat
    after_seconds: PositiveFloat
    move_seconds: NonNegativeFloat
    moved: NonNegativeInt


class Rebalance(Spec):
    """Placements in force from `step` on, and what they were solved for: the load and each rank's slowdown (measured
    over profiled seconds).

    `groups`: those of the plan, the same copies of the model in the same order, with the experts where they are now;
    replicas of one group may have come to differ. `iteration_seconds` is their simulated iteration.
    """

    step: NonNegativeInt
    groups: list[Group] = Field(min_length=1)
    moved: NonNegativeInt
    expert_load: ExpertLoad
    slowdown: list[PositiveFloat]
    iteration_seconds: PositiveFloat
    plan_groups_sha256: str

    def is_of(self, groups: Sequence[Group]) -> bool:
        """Whether it was solved for a run of a plan with these groups."""
        return self.plan_groups_sha256 == sha256(*groups)


class Rebalances(Spec):
    """rebalances.yaml of a run folder: every change of placement, in the order of their steps."""

    kind: Literal["rebalances"] = "rebalances"
    schema_version: Literal[1] = 1
    changes: list[Rebalance]

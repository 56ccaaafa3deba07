"""Dynamic loss scaling: keeps fp16 gradients in range. Equal on all ranks, for it follows from figures that are."""

import math
from collections.abc import Mapping
from typing import Any

from hetermoe_cli.errors import UserError

FIRST_SCALE, GROWTH_STEPS = 2.0**16, 2000  # torch's GradScaler's, and so are the factors 2 and 1/2


class LossScale:
    """Multiplies the loss by `scale`: doubled after 2000 good steps in a row, halved when a gradient overflowed.

    A step that overflowed is skipped: the data go on, but neither the optimizer's step count nor the learning rate's
    schedule count it (as in Megatron), so both run on `taken` steps. Without `dynamic` the scale is 1 for ever.
    """

    def __init__(self, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.scale = FIRST_SCALE if dynamic else 1.0
        self.good_steps = self.skipped_steps = 0

    def taken(self, step: int) -> int:
        """Optimizer steps taken before `step`."""
        return step - self.skipped_steps

    def follow(self, finite: bool) -> bool:
        """Adapt to a step whose loss and gradients were finite or not. False: they are not, and no scale helps."""
        if finite:
            self.good_steps += self.dynamic
            if self.good_steps == GROWTH_STEPS:
                self.scale, self.good_steps = 2 * self.scale, 0
            return True
        if self.scale <= 1:
            return False
        self.scale, self.good_steps = self.scale / 2, 0
        self.skipped_steps += 1
        return True

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped_steps": self.skipped_steps}

    def restore(self, state: Mapping[str, Any] | None, step: int, where: str) -> None:
        """The inverse, after `step` steps. A checkpoint without it was made without scaling.

        UserError if it makes no sense, told of `where`.
        """
        if state is None:
            return
        try:
            scale, good, skipped = float(state["scale"]), int(state["good_steps"]), int(state["skipped_steps"])
        except (KeyError, TypeError, ValueError):
            scale, good, skipped = 0.0, 0, 0
        if not (1 <= scale < math.inf and 0 <= good < GROWTH_STEPS and 0 <= skipped <= step):
            raise UserError(f"{where}: field extra.loss_scale: damaged: resume from another checkpoint")
        self.skipped_steps = skipped
        if self.dynamic:
            self.scale, self.good_steps = scale, good

"""ScheduleChoice: the order in which a layout's work is done, and what is kept meanwhile."""

from typing import ClassVar, Literal

from pydantic import model_validator

from hetermoe_cli.spec.base import ExtendedSpec, PositiveInt
from hetermoe_cli.spec.train import DenseState, Dispatch, Recompute

ScheduleName = Literal["zebra", "windowed", "sequential"]
ExpertOrder = Literal["after", "between"]
TransferOrder = Literal["layered", "interleaved"]
PassOrder = Literal["in_turn", "woven"]


def windows_ahead(passes: PassOrder, stages: int) -> int:
    """Windows that go forward before the first backward, where so many pipeline stages follow: as many (1F1B). Woven,
    two for each, as a step needs what the stage before made in the last step and what the one behind made in this, and
    one for the stage itself."""
    return stages if passes == "in_turn" else 2 * stages + 1


def windows_alive(passes: PassOrder, stages: int, layers: int) -> float:
    """Windows whose activations a stage of so many layers keeps at once, if there are as many: those that go forward
    ahead and the one at work; of a woven step's two, one fills up as the other empties, a layer ahead of it."""
    return windows_ahead(passes, stages) + (1.0 if passes == "in_turn" else 1 / layers)


class ScheduleChoice(ExtendedSpec):
    """Which order to run: R micro-batches in windows that go forward and backward one after another.

    `window` micro-batches are in flight together: all of them is zebra, one is sequential. `experts`: attending ranks
    run their experts after the layer's attention of all micro-batches in the window, or between them. `transfers`: on
    a link that both use, a layer's first message goes after all answers of the layer before, or after two of them.
    `recompute`: which stages run again in backward instead of keeping their activations; with `full` nothing is kept
    but what attention stages read: rows are sent to the experts once more, with the gradients. `dense_state`: what
    attending ranks share of the dense part's state; if anything, holders of an expert share its masters and moments.
    `dispatch`: whether a token's row goes once to every expert that it chose, or to every rank that hosts some of them.
    `passes`: one window after another, or a window's backward woven into the forward of a later one, so that what one
    waits for travels while the other computes; which keeps twice as many windows alive.
    """

    later: ClassVar[frozenset[str]] = frozenset({"dispatch", "passes"})

    micro_batches: PositiveInt
    window: PositiveInt
    experts: ExpertOrder = "after"
    transfers: TransferOrder = "layered"
    recompute: Recompute = "none"
    dense_state: DenseState = "replicated"
    dispatch: Dispatch = "per_expert"
    passes: PassOrder = "in_turn"

    @model_validator(mode="after")
    def _check(self) -> "ScheduleChoice":
        if self.micro_batches % self.window:
            raise ValueError(f"window {self.window} does not divide micro_batches {self.micro_batches}")
        if self.sends_again and self.dense_state == "full":
            raise ValueError("recompute full needs the weights of two layers at once: not with dense_state full")
        if self.passes == "woven" and not self._weaves:
            raise ValueError("passes woven: not with dense_state full, experts between or transfers interleaved")
        return self

    @property
    def _weaves(self) -> bool:
        return self.dense_state != "full" and (self.experts, self.transfers) == ("after", "layered")

    @classmethod
    def zebra(cls, micro_batches: int, *, recompute: Recompute = "none") -> "ScheduleChoice":
        """All micro-batches in flight together."""
        return cls(micro_batches=micro_batches, window=micro_batches, recompute=recompute)

    @property
    def name(self) -> ScheduleName:
        """zebra, windowed or sequential."""
        if self.window == self.micro_batches:
            return "zebra"
        return "sequential" if self.window == 1 else "windowed"

    @property
    def in_default_order(self) -> bool:
        """Whether the planner's bounds are of this order."""
        return (self.experts, self.transfers, self.passes) == ("after", "layered", "in_turn")

    @property
    def shares_states(self) -> bool:
        """Whether masters and moments of what several ranks hold are shared out among them."""
        return self.dense_state != "replicated"

    @property
    def recompute_attention(self) -> bool:
        """Whether attention stages run again in backward."""
        return self.recompute in ("attention", "all", "full")

    @property
    def recompute_experts(self) -> bool:
        """Whether expert stages run again in backward."""
        return self.recompute in ("experts", "all", "full")

    @property
    def sends_again(self) -> bool:
        """Whether experts get their rows again in backward. Whoever sends a layer's gradients runs its attention again
        before: an attention stage's backward that of the layer before, the head the last one's."""
        return self.recompute == "full"

    @property
    def recomputation(self) -> str:
        """In words."""
        words = {"none": "no recomputation", "all": "recomputation", "full": "full recomputation"}
        return words.get(self.recompute, f"recomputation of {self.recompute}")

    def __str__(self) -> str:
        parts = ["woven" if self.passes == "woven" else self.name, f"R = {self.micro_batches}"]
        parts += [f"windows of {self.window}"] * (self.name == "windowed")
        parts += ["experts between micro-batches"] * (self.experts == "between")
        parts += ["transfers interleaved"] * (self.transfers == "interleaved")
        parts += [self.recomputation] * (self.recompute != "none")
        shared = {"optimizer": ["optimizer states sharded"], "full": ["dense part fully sharded"]}
        parts += shared.get(self.dense_state, [])
        parts += ["rows once per device"] * (self.dispatch == "per_device")
        return ", ".join(parts)

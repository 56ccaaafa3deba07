"""Action: one task of an iteration, with a text form that prints and parses (`3AF1`)."""

import re
from enum import StrEnum
from typing import NamedTuple

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.schedule_choice import ScheduleChoice


class Kind(StrEnum):
    """What a task does. D, C, X, R and G are transfers, S ends the gradient synchronisation, the others compute."""

    ATTENTION = "A"  # combine of the layer before, attention, norms, gate
    DISPATCH = "D"  # rows to the hosts of their experts; in backward, the rows' gradients back
    EXPERT = "E"  # the local experts of one layer
    COMBINE = "C"  # expert outputs back to their tokens; in backward, the outputs' gradients out
    PASS = "P"  # last combine of a pipeline stage that others follow; in backward, what comes back from them
    CROSS = "X"  # hidden states to the next pipeline stage; in backward, their gradients to the one before
    HEAD = "H"  # last combine, final norm, head, loss; in training its own backward at once
    REDUCE = "R"  # sum of a layer's gradients that ranks share: all-reduce, or reduce-scatter of shared out states
    GATHER = "G"  # all-gather of one layer's weights: sharded ones, or new ones of shared out states
    SYNCHRONISE = "S"  # global norm, once all gradients are summed
    OPTIMIZER = "O"  # optimizer step

    __hash__ = str.__hash__  # an enum's own is a Python function; actions are looked up all the time


class Pass(StrEnum):
    """Forward or backward. A training head is B: it does both."""

    FORWARD = "F"
    BACKWARD = "B"

    __hash__ = str.__hash__


class Action(NamedTuple):
    """`layer` `kind` `pass` `micro_batch`, printed in this order: `3AF1`.

    H carries layer 0, S and O micro-batch 0 as well. R carries the last micro-batch, whose backward it follows; the
    head's gradients are one layer more than the last, the embedding's go with those of layer 0. G is called after the
    first stage that needs it (`inputs`), the head's F; layers as for R. P and X carry the first layer of the next
    pipeline stage.
    """

    kind: Kind
    direction: Pass
    layer: int = 0
    micro_batch: int = 0

    def __str__(self) -> str:
        return f"{self.layer}{self.kind}{self.direction}{self.micro_batch}"

    @property
    def is_transfer(self) -> bool:
        """Whether the task moves rows, gradients or weights between ranks."""
        return self.kind in _TRANSFERS

    @property
    def is_collective(self) -> bool:
        """Whether those that hold the same parameters do it together: R or G."""
        return self.kind in _COLLECTIVES

    @property
    def lane(self) -> int:
        """Index in trace.LANES: 0 compute, 1 towards the experts, 2 from the experts, 3 collectives, 4 to the next
        pipeline stage, 5 to the one before."""
        if not self.is_transfer:
            return 0
        if self.kind is Kind.CROSS:
            return 4 if self.direction is Pass.FORWARD else 5
        return 3 if self.is_collective else 1 if self.towards_experts else 2

    @property
    def towards_experts(self) -> bool:
        """Of a dispatch or combine: attending ranks send and hosts receive (forward dispatch, backward combine)."""
        return (self.kind is Kind.DISPATCH) == (self.direction is Pass.FORWARD)

    @property
    def is_exchange(self) -> bool:
        """Whether attending ranks and hosts exchange rows: D or C."""
        return self.kind in _EXCHANGES

    @property
    def answer(self) -> "Action":
        """Of a dispatch or combine: the one that goes the other way for the same rows."""
        kind = Kind.COMBINE if self.kind is Kind.DISPATCH else Kind.DISPATCH
        return Action(kind, self.direction, self.layer, self.micro_batch)


_COLLECTIVES = frozenset((Kind.REDUCE, Kind.GATHER))
_EXCHANGES = frozenset((Kind.DISPATCH, Kind.COMBINE))
_TRANSFERS = _COLLECTIVES | _EXCHANGES | {Kind.CROSS}
_PATTERN = re.compile(rf"(\d+)([{''.join(Kind)}])([FB])(\d+)")


def parse_action(text: str) -> Action:
    """Inverse of str(action); UserError on anything else."""
    match = _PATTERN.fullmatch(text)
    if not match:
        raise UserError(f"schedule: {text!r} is no action; expected the form 3AF1 (layer, kind, pass, micro-batch)")
    layer, kind, direction, micro_batch = match.groups()
    return Action(Kind(kind), Pass(direction), int(layer), int(micro_batch))


def trips(action: Action, schedule: ScheduleChoice) -> int:
    """How many times as long as its dispatch a transfer takes: gradients of outputs may bring rows with them."""
    return 1 + (schedule.sends_again and (action.kind, action.direction) == (Kind.COMBINE, Pass.BACKWARD))

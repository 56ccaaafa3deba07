"""What holders of the same parameters do while stages run: sum a layer's gradients, gather its weights if sharded."""

from torch import Tensor

from hetermoe_cli.runtime.gradients import Gradients
from hetermoe_cli.runtime.shards import Shards
from hetermoe_cli.schedule.action import Action, Kind


class Collectives:
    """The two ends of a lane: the compute thread gives, the lane carries. `shards`: of a sharded dense part."""

    def __init__(self, gradients: Gradients, shards: Shards | None) -> None:
        self._gradients, self._shards = gradients, shards

    def give(self, action: Action) -> Tensor:
        """What this rank brings to `action`."""
        if action.kind is Kind.REDUCE:
            return self._gradients.segment(action.layer)
        assert self._shards is not None
        return self._shards.segments[action.layer].weights

    def carry(self, action: Action, given: Tensor) -> Tensor:
        """Do it with the other ranks; what this rank has of the sum, or the whole weights."""
        if action.kind is Kind.REDUCE:
            return self._gradients.reduce(action, given)
        assert self._shards is not None
        return self._shards.gather(action.layer)

    def release(self, layer: int) -> None:
        """Drop whole weights until they are gathered again."""
        assert self._shards is not None
        self._shards.release(layer)

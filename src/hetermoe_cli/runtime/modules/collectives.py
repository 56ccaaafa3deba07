"""What holders of the same parameters do while stages run: sum a layer's gradients, gather its weights."""

from torch import Tensor

from hetermoe_cli.runtime.modules.gradients import Gradients
from hetermoe_cli.runtime.modules.shards import Shards
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.schedule import is_whole


class Collectives:
    """The two ends of a lane: the compute thread gives, the lane carries. `shards`: of what is shared out."""

    def __init__(self, gradients: Gradients, shards: Shards | None, micro_batches: int) -> None:
        self._gradients, self._shards, self._micro_batches = gradients, shards, micro_batches

    def give(self, action: Action) -> Tensor:
        """What this rank brings to `action`: gradients; masters of weights lie where the lane finds them, whole weights
        get room."""
        if action.kind is Kind.REDUCE:
            return self._gradients.segment(action.layer)
        assert self._shards is not None
        self._shards.make_room(action.layer)
        return self._gradients.nothing

    def carry(self, action: Action, given: Tensor) -> Tensor:
        """Do it with the other ranks; what this rank has of the sum, if it is one."""
        if action.kind is Kind.REDUCE:
            return self._gradients.reduce(action, given)
        assert self._shards is not None
        self._shards.gather(action.layer, kept=is_whole(action, self._micro_batches))
        return given

    def release(self, layer: int) -> None:
        """Drop whole weights until they are gathered again."""
        assert self._shards is not None
        self._shards.release(layer)

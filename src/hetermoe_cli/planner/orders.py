"""Other orders of one layout: experts between micro-batches, transfers interleaved."""

from itertools import product
from typing import get_args

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.planner.replay import replay_seconds
from hetermoe_cli.spec.layout import ExpertOrder, Layout, TransferOrder


def other_orders(cost: LayoutCost) -> list[tuple[Layout, float]]:
    """The layout with its seconds in every other order that differs from its own; memory is the same in all.

    Looked at only where attending ranks compute experts; with two micro-batches in flight both orders of transfers are
    the same.
    """
    layout, own = cost.layout, cost.layout.schedule
    if own.window == 1 or not _mixed(layout):
        return []
    result = []
    for experts, transfers in product(get_args(ExpertOrder), get_args(TransferOrder)):
        schedule = own.model_copy(update={"experts": experts, "transfers": transfers})
        if schedule != own and (own.window > 2 or transfers == own.transfers):
            other = layout.model_copy(update={"schedule": schedule})
            result.append((other, replay_seconds(LayoutCost(cost.cost, other))))
    return result


def _mixed(layout: Layout) -> bool:
    return any(p.replicated or any(p.experts[rank] for rank in layout.attending) for p in layout.placement)

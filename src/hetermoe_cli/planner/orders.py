"""Other orders of one layout: experts between micro-batches, transfers interleaved."""

from itertools import product
from typing import get_args

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.planner.replay import replay_seconds
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.schedule_choice import ExpertOrder, ScheduleChoice, TransferOrder


def other_schedules(own: ScheduleChoice) -> list[ScheduleChoice]:
    """The schedule in every other order; with two micro-batches in flight both orders of transfers are the same. Woven
    passes have one order only."""
    if own.window == 1 or own.passes == "woven":
        return []
    orders = product(get_args(ExpertOrder), get_args(TransferOrder))
    found = [own.model_copy(update={"experts": experts, "transfers": transfers}) for experts, transfers in orders]
    return [other for other in found if other != own and (own.window > 2 or other.transfers == own.transfers)]


def other_orders(cost: LayoutCost) -> list[tuple[Layout, float]]:
    """The layout with its seconds in every other order that differs from its own; memory is the same in all.

    Looked at only where attending ranks compute experts.
    """
    if not _mixed(cost.layout):
        return []
    schedules = other_schedules(cost.layout.schedule)
    others = [cost.layout.model_copy(update={"schedule": schedule}) for schedule in schedules]
    return [(other, replay_seconds(LayoutCost(cost.cost, other))) for other in others]


def _mixed(layout: Layout) -> bool:
    return any(p.replicated or any(p.experts[rank] for rank in layout.attending) for p in layout.placement)

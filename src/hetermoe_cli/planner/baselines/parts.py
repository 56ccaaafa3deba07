"""All-to-alls cut into parts: those of a part overlap with the experts of others of the same micro-batch and layer.

What Tutel (arXiv 2206.03382) and Lina (arXiv 2210.17223) do, at the best of a few degrees. Attention runs on a whole
micro-batch: no part is sent before its end, and the next one waits for the last answer.
"""

from dataclasses import replace

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.dataflow import dataflow
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.schedule.schedule import Schedule
from hetermoe_cli.simulator import compute_seconds, replay
from hetermoe_cli.spec.layout import Layout

DEGREES = (1, 2, 4, 8)  # as Tutel tunes them


def parted_seconds(cost: LayoutCost) -> float:
    """Simulated seconds of a sequential layout at the degree that is best for one micro-batch.

    Micro-batches follow one another and are alike, so that each after the first adds what the second does.
    """
    one, degree = min((iteration_seconds(_first(cost, 1), degree), degree) for degree in DEGREES)
    more = cost.layout.micro_batches - 1
    return one + more * (iteration_seconds(_first(cost, 2), degree) - one) if more else one


def _first(cost: LayoutCost, micro_batches: int) -> LayoutCost:
    """Only the first of them, in an iteration of their own."""
    schedule = cost.layout.schedule.model_copy(update={"micro_batches": micro_batches})
    return LayoutCost(cost.cost, cost.layout.model_copy(update={"schedule": schedule}))


def iteration_seconds(whole: LayoutCost, degree: int) -> float:
    """Simulated seconds with every micro-batch in so many parts."""
    part = LayoutCost(whole.cost, _cut(whole.layout, degree))
    schedule = _whole_attention(training_schedule(part.layout), part.layout.layers, degree)
    transfers = [part.transfer(action) for action in schedule.transfers]
    flow = dataflow(schedule, part.layout.layers, [transfer.ports for transfer in transfers])
    seconds = [
        own if task.action.kind is Kind.EXPERT else rest * _counts(task.action, degree)
        for task, own, rest in zip(flow.compute, compute_seconds(flow, part), compute_seconds(flow, whole), strict=True)
    ]
    return replay(flow, seconds, [transfer.seconds for transfer in transfers]).iteration


def _cut(layout: Layout, degree: int) -> Layout:
    """Every micro-batch as a window of parts, which may be fractions of sequences; not checked again."""
    schedule = layout.schedule.model_copy(update={"micro_batches": layout.micro_batches * degree, "window": degree})
    shares = [count / degree for count in layout.sequences_per_rank]
    return layout.model_copy(update={"schedule": schedule, "sequences_per_rank": shares})


def _whole_attention(schedule: Schedule, layers: int, degree: int) -> Schedule:
    """The same, but what leaves an attending rank follows its stage of the last part, which stands for all of them."""
    after = {}
    for transfer in schedule.transfers:
        if not transfer.is_collective and transfer.towards_experts:
            source = schedule.sources(transfer, layers)[0]
            after[transfer] = source._replace(micro_batch=source.micro_batch // degree * degree + degree - 1)
    return replace(schedule, after={**schedule.after, **after})


def _counts(action: Action, degree: int) -> bool:
    """Whether a task other than experts takes time; synchronisation and optimizer have no parts."""
    return action.kind in (Kind.SYNCHRONISE, Kind.OPTIMIZER) or (action.micro_batch + 1) % degree == 0

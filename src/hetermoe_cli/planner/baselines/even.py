"""Expert parallelism in which every device attends and hosts: in equal shares, or in proportion to its speed."""

from collections.abc import Iterator, Sequence
from functools import cache

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.allowed import micro_batch_counts
from hetermoe_cli.planner.baselines.rival import Overlap, Rival, best, windows, with_schedule
from hetermoe_cli.planner.instance.deal import number, proportional, rotate
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.spec.schedule_choice import ScheduleChoice


def ep(cost: CostModel, limit: int, *, overlap: Overlap = "micro_batches") -> Rival:
    """Equal sequences and equal experts on every device; `overlap`: of the all-to-alls.

    Where the batch does not divide by the devices, a micro-batch is uneven by one sequence, and R is such that all
    attend if there are sequences enough. Experts are uneven by one where they do not divide.
    """
    world, batch = len(cost.devices), cost.train.global_batch_sequences
    placement = even_placement(cost)
    counts = micro_batch_counts(batch, limit)
    equal = [count for count in counts if batch // count % world == 0]
    everyone = [count for count in counts if batch // count >= world]

    @cache
    def layout(count: int) -> Layout:
        sequences = rotate([batch // count], world)[0]
        return Layout(schedule=ScheduleChoice.zebra(count), sequences_per_rank=sequences, placement=placement)

    wanted = equal or everyone or counts
    across = overlap == "micro_batches"
    ladders = overlapped_or_not(cost, wanted) if across else (rungs[-1:] for rungs in windows(cost, wanted))
    layouts = ([with_schedule(layout(s.micro_batches), s) for s in rungs] for rungs in ladders)
    return best(cost, layouts, parts=overlap == "parts")


def even_placement(cost: CostModel) -> list[LayerPlacement]:
    """Equal experts on every device, uneven by at most one in a layer and over all layers."""
    totals = [cost.model.experts] * cost.model.layers
    return [number(share, 0) for share in rotate(totals, len(cost.devices))]


def overlapped_or_not(cost: CostModel, counts: Sequence[int]) -> Iterator[list[ScheduleChoice]]:
    """The widest window that fits, and one micro-batch after another."""
    for ladder in windows(cost, counts):
        yield ladder
        if len(ladder) > 1:
            yield ladder[-1:]


def hetero_ep(cost: CostModel, limit: int) -> Rival:
    """Sequences in proportion to the speed of attention and head, experts to that of experts; no solver.

    Speeds are those at one sequence, and at the rows that an expert gets of a micro-batch. Sequences are rounded by
    largest remainder, fastest devices first where those are equal; experts likewise, layer by layer, with what a layer
    rounds off carried to the next.
    """
    batch = cost.train.global_batch_sequences
    attention = [1 / _attention_seconds(cost, device.rank) for device in cost.devices]

    @cache
    def layout(count: int) -> Layout:
        total = batch // count
        rows = cost.rows_per_expert(total)
        expert = [1 / sum(cost.of(device.rank).expert(rows)[:2]) for device in cost.devices]
        sequences = proportional([total], attention)[0]
        shares = proportional([cost.model.experts] * cost.model.layers, expert)
        placement = [number(share, 0) for share in shares]
        return Layout(schedule=ScheduleChoice.zebra(count), sequences_per_rank=sequences, placement=placement)

    ladders = overlapped_or_not(cost, micro_batch_counts(batch, limit))
    return best(cost, ([with_schedule(layout(s.micro_batches), s) for s in rungs] for rungs in ladders))


def _attention_seconds(cost: CostModel, rank: int) -> float:
    return cost.attending_seconds(cost.of(rank), 1)

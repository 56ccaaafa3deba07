"""Pipelines as plans: setups of pipeline_search/ as layouts with stages, replayed, and improved.

Every unit of a setup becomes a pipeline stage. What is estimated to be fast is replayed, a few setups at a time; a
stage that does not fit computes more again. The fastest of these are then varied: windows of two micro-batches, and
experts in proportion to speed where a stage mixes device types.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import get_args

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.sharers import Sharers
from hetermoe_cli.errors import UserError
from hetermoe_cli.planner.allowed import recompute_choices
from hetermoe_cli.planner.cluster.replayed import group_cost, joined, replay_group
from hetermoe_cli.planner.instance.deal import number, proportional, rotate
from hetermoe_cli.planner.pipeline_search.cost import stage_state
from hetermoe_cli.planner.pipeline_search.setups import Tuned
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.layout import LayerPlacement, Layout, PipelineStage
from hetermoe_cli.spec.plan import Group
from hetermoe_cli.spec.schedule_choice import PassOrder
from hetermoe_cli.spec.train import Recompute

CANDIDATES = 4  # setups that are replayed at a time
IMPROVED = 2  # of these, those that are varied
NEAR = 1.05  # times what is to be beaten: what replays are faster than estimates at most

Setups = Sequence[tuple[float, Tuned]]  # with estimated seconds, the fastest first
Found = tuple[float, list[Group]]  # seconds of an iteration, and a group of every pipeline that differs from the others


@dataclass(frozen=True)
class Shape:
    """How the pipelines of a setup run. `window`: micro-batches that are in flight together, `parts` to each of the
    setup's; `by_speed`: experts in proportion to speed; `copies`: all experts of a stage on each of its ranks, so that
    no rows travel."""

    tuned: Tuned
    window: int = 1
    parts: int = 1
    by_speed: bool = False
    copies: bool = False


def best_pipelines(cost: CostModel, setups: Setups, seconds: float) -> list[Found]:
    """Those that fit of `setups` (with estimated seconds, fastest first), and some variants, the fastest first, until
    `seconds` are gone, but one at least. Balanced routers only."""
    end, found = time.monotonic() + seconds, list[Found]()
    for plain in _plain(cost, setups, end):
        found += [one for _, one in plain]
        for varied in [varied for shape, _ in plain[:IMPROVED] for varied in _variants(cost, shape)]:
            fitting = fitted(cost, varied) if time.monotonic() < end else None
            found += [fitting[1]] if fitting else []
    return sorted(found, key=lambda one: one[0])


def plain_pipelines(cost: CostModel, setups: Setups) -> list[Found]:
    """Those of the first `setups` that fit, as they are, the fastest first: what `pp` stands for."""
    return [found for _, found in next(_plain(cost, setups, inf), [])]


def _plain(cost: CostModel, setups: Setups, end: float) -> Iterator[list[tuple[Shape, Found]]]:
    """What fits of CANDIDATES at a time, the fastest first: until `end`, but one at least, and none that is estimated
    to be much slower than what was found."""
    best = inf
    for at in range(0, len(setups), CANDIDATES):
        plain: list[tuple[Shape, Found]] = []
        for estimate, tuned in setups[at : at + CANDIDATES]:
            if best < inf and (time.monotonic() > end or estimate > NEAR * best):
                break
            side_by_side = merged(tuned)
            for shape in [Shape(tuned), *([Shape(side_by_side, copies=True)] if side_by_side else [])]:
                fitting = fitted(cost, shape)
                plain += [fitting] if fitting else []
            best = min([best, *(seconds for _, (seconds, _) in plain)])
        if plain:
            yield sorted(plain, key=lambda one: one[1][0])


def fitted(cost: CostModel, shape: Shape) -> tuple[Shape, Found] | None:
    """The shape, with more computed again where a stage needs that to fit; None if nothing helps, or NICs would be
    shared."""
    choices = recompute_choices(cost)
    while costs := _costs(cost, groups := groups_of(cost, shape)):
        missing = [(group, full) for group, own in zip(groups, costs, strict=True) if (full := overflow(own))]
        if not missing:
            return shape, (_seconds(cost, groups, costs), groups)
        group, full = missing[0]
        leaner = _leaner(shape.tuned, {ranks[full.rank] for ranks in group.replicas}, choices)
        if leaner is None:
            return None
        shape = replace(shape, tuned=leaner)
    return None


def _leaner(tuned: Tuned, ranks: set[int], choices: Sequence[Recompute]) -> Tuned | None:
    """The next of `choices` for the stages that `ranks` are in; None if one has the last already."""
    recompute = [list(own) for own in tuned.recompute]
    for index, units in enumerate(tuned.units):
        for stage, unit in enumerate(units):
            if ranks.intersection(unit):
                if (place := choices.index(recompute[index][stage]) + 1) == len(choices):
                    return None
                recompute[index][stage] = choices[place]
    return replace(tuned, recompute=recompute)


def merged(tuned: Tuned) -> Tuned | None:
    """Equal pipelines of single devices as one, whose stages have a device of each, to hold all experts (`copies`).

    They may share NICs then, which groups may not. None of other setups.
    """
    setup, layers, counts = tuned.setup, tuned.layers[0], tuned.micro_batches
    if setup.width > 1 or setup.pipelines < 2 or len({*counts}) > 1:
        return None
    if any(one != each[0] for each in (tuned.layers, tuned.recompute) for one in each):
        return None
    one = replace(setup, width=setup.pipelines, pipelines=1, micro_batches=counts[0])
    units = [tuple(rank for unit in stage for rank in unit) for stage in zip(*tuned.units, strict=True)]
    again = tuned.recompute[:1]
    return replace(tuned, setup=one, units=[units], layers=[layers], recompute=again, micro_batches=counts[:1])


def _variants(cost: CostModel, shape: Shape) -> Iterator[Shape]:
    """Windows of two micro-batches, or of halves of one, with passes in turn and woven; experts by speed where they are
    shared out over devices of several types. Nothing where no rows travel."""
    tuned = shape.tuned
    if shape.copies or tuned.setup.width == 1:
        return
    if any(len({cost.devices[rank].type for rank in unit}) > 1 for units in tuned.units for unit in units):
        yield replace(shape, by_speed=True)
    for parts, enough in ((1, not any(n % 2 for n in tuned.micro_batches)), (2, not _own_sequences(cost, shape) % 2)):
        for passes in get_args(PassOrder) if enough else ():
            setup = replace(tuned.setup, passes=passes)
            yield replace(shape, tuned=replace(tuned, setup=setup, order=setup.order), window=2, parts=parts)


def _costs(cost: CostModel, groups: Sequence[Group]) -> list[LayoutCost]:
    """Of every group; none if they would share NICs."""
    try:
        costs = [LayoutCost(group_cost(cost.inputs, group), group.layout) for group in groups]
    except UserError:
        return []
    if not _alone(groups):
        sharers = Sharers.of((group.layout, len(group.replicas)) for group in groups)
        for own in costs:
            own.sharers = sharers
    return costs


def _alone(groups: Sequence[Group]) -> bool:
    return len(groups) == 1 and len(groups[0].replicas) == 1


def _seconds(cost: CostModel, groups: Sequence[Group], costs: Sequence[LayoutCost]) -> float:
    """An iteration of groups that fit."""
    if _alone(groups):
        return simulate(costs[0]).seconds
    done = [replay_group(cost.inputs, group, own.cost) for group, own in zip(groups, costs, strict=True)]
    return joined(done, cost).seconds


def groups_of(cost: CostModel, shape: Shape) -> list[Group]:
    """A group of every pipeline; equal ones on equal devices are copies."""
    found: list[tuple[object, Layout, list[list[int]]]] = []
    for index, units in enumerate(shape.tuned.units):
        ranks = sorted(rank for unit in units for rank in unit)
        layout, devices = _layout(cost, shape, index), _places(cost, ranks)
        copies = next((known for on, other, known in found if (on, other) == (devices, layout)), None)
        if copies is None:
            found.append((devices, layout, copies := []))
        copies.append(ranks)
    return [Group.of(layout, sorted(copies)) for _, layout, copies in found]


def _places(cost: CostModel, ranks: Sequence[int]) -> object:
    """Equal for ranks whose devices, links, nodes and NICs are alike."""
    devices = [cost.devices[rank] for rank in ranks]
    nodes, nics = ([getattr(device, name) for device in devices] for name in ("node", "nic"))
    kinds = [(device.type, device.network, device.interconnect) for device in devices]
    return kinds, [nodes.index(node) for node in nodes], [nics.index(nic) for nic in nics]


def _own_sequences(cost: CostModel, shape: Shape) -> int:
    """Of a micro-batch, those that each rank attends to."""
    setup = shape.tuned.setup
    return cost.train.global_batch_sequences // setup.micro_batches // setup.width


def _layout(cost: CostModel, shape: Shape, index: int) -> Layout:
    """A pipeline; rank r of it is the r-th of its units' ranks."""
    tuned = shape.tuned
    units, layers, recompute = tuned.units[index], tuned.layers[index], tuned.recompute[index]
    ranks = sorted(rank for unit in units for rank in unit)
    place, usual = {rank: local for local, rank in enumerate(ranks)}, max(recompute, key=recompute.count)
    stages = [
        PipelineStage(
            layers=held, ranks=sorted(place[rank] for rank in unit), recompute=None if again == usual else again
        )
        for unit, held, again in zip(units, layers, recompute, strict=True)
    ]
    count, passes = tuned.micro_batches[index] * shape.parts, tuned.setup.passes
    schedule = cost.schedule(count, shape.window, usual, stage_state(cost), passes)
    placement = [layer for stage in stages for layer in _placement(cost, shape, stage, ranks)]
    sequences = [_own_sequences(cost, shape) // shape.parts] * len(ranks)
    return Layout(schedule=schedule, sequences_per_rank=sequences, placement=placement, pipeline=stages)


def _placement(cost: CostModel, shape: Shape, stage: PipelineStage, ranks: Sequence[int]) -> Iterator[LayerPlacement]:
    """The experts of a stage's layers over its ranks: evenly, those left over in turn, or by speed."""
    experts, width = cost.model.experts, len(stage.ranks)
    if shape.copies:
        yield from [number([0] * len(ranks), experts)] * stage.layers
        return
    if shape.by_speed:
        total = _own_sequences(cost, shape) * width / shape.parts
        rows = cost.rows_per_expert(total)
        speeds = [1 / sum(cost.of(ranks[local]).expert(rows)[:2]) for local in stage.ranks]
        shares = proportional([experts], speeds) * stage.layers
    else:
        shares = rotate([experts] * stage.layers, width)
    for share in shares:
        counts = dict(zip(stage.ranks, share, strict=True))
        yield number([counts.get(local, 0) for local in range(len(ranks))], 0)

"""Pipelines as plans: the best setups of the rival `pp` as layouts with stages, replayed, and improved.

Every unit of a setup becomes a pipeline stage. What pp finds fast is replayed one micro-batch at a time, keeping as
many activations as fit. The fastest are then varied: windows of several micro-batches, whose all-to-alls overlap with
compute inside a stage, and experts in proportion to speed where a stage mixes device types; the best also in other
orders.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.sharers import Sharers
from hetermoe_cli.errors import UserError
from hetermoe_cli.planner.baselines.even import proportional
from hetermoe_cli.planner.baselines.pipeline import Tuned
from hetermoe_cli.planner.baselines.pipeline_cost import Unit
from hetermoe_cli.planner.baselines.rival import recompute_choices, state_choices
from hetermoe_cli.planner.cluster.replayed import group_cost, joined, replay_group
from hetermoe_cli.planner.deal import number, rotate
from hetermoe_cli.planner.orders import other_schedules
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.layout import LayerPlacement, Layout, PipelineStage
from hetermoe_cli.spec.plan import Group
from hetermoe_cli.spec.train import DenseState, Recompute

FAR = 1.2  # times what is to be beaten, by pp's estimate: what overlapping all-to-alls may gain
CANDIDATES = 4  # setups that are replayed
IMPROVED = 2  # of these, those that are varied
WINDOWS = (2, 4)  # micro-batches that are in flight together in a stage

Setups = Sequence[tuple[float, Tuned]]  # with the seconds of pp, the fastest first
Found = tuple[float, list[Group]]  # seconds of an iteration, and a group of every pipeline that differs from the others


@dataclass(frozen=True)
class Shape:
    """How the pipelines of a setup run. `parts`: pieces that each of its micro-batches is cut into; `by_speed`: experts
    in proportion to speed; `copies`: all experts of a stage on each of its ranks, so that no rows travel."""

    tuned: Tuned
    recompute: Recompute
    state: DenseState
    window: int = 1
    parts: int = 1
    by_speed: bool = False
    copies: bool = False


def best_pipelines(
    cost: CostModel, setups: Setups, beat: float, seconds: float, most_groups: int | None = None
) -> Found | None:
    """The fastest that fit of `setups` (with the seconds of pp, fastest first), with at most so many pipelines side by
    side. What is far slower than `beat` is not looked at; no more than one is once `seconds` are gone. Balanced routers
    only."""
    end = time.monotonic() + seconds
    near = [(estimate, tuned) for estimate, tuned in setups if estimate < FAR * beat]
    plain = _plain(cost, near, end, most_groups)
    found = [one for _, one in plain]
    for varied in [varied for shape, _ in plain[:IMPROVED] for varied in _variants(cost, shape)]:
        found += timed(cost, groups_of(cost, varied)) if time.monotonic() < end else []
    best = min(found, key=lambda one: one[0], default=None)
    return best and min([best, *_other_orders(cost, best[1])], key=lambda one: one[0])


def plain_pipelines(cost: CostModel, setups: Setups) -> Found | None:
    """The fastest of `setups` that fits, as it is: what `pp` stands for."""
    return next((found for _, found in _plain(cost, setups, inf)), None)


def _plain(
    cost: CostModel, setups: Iterable[tuple[float, Tuned]], end: float, most_groups: int | None = None
) -> list[tuple[Shape, Found]]:
    """The first CANDIDATES that fit, one micro-batch at a time, the fastest first."""
    allowed = [tuned for _, tuned in setups if most_groups is None or len(tuned.units) <= most_groups]
    states = [state for state in state_choices(cost) if state != "full"]
    ways = list(product(recompute_choices(cost), states))
    plain: list[tuple[Shape, Found]] = []
    for tuned in allowed:
        if len(plain) == CANDIDATES or (plain and time.monotonic() > end):
            break
        plain += _leanest(cost, tuned, ways)
        if side_by_side := merged(tuned):
            plain += _leanest(cost, side_by_side, ways, copies=True)
    return sorted(plain, key=lambda one: one[1][0])


def _leanest(
    cost: CostModel, tuned: Tuned, ways: Iterable[tuple[Recompute, DenseState]], *, copies: bool = False
) -> list[tuple[Shape, Found]]:
    """A setup in the first of `ways` to keep activations and states that fits, if any does."""
    for recompute, state in ways:
        shape = Shape(tuned, recompute, state, copies=copies)
        if found := timed(cost, groups_of(cost, shape)):
            return [(shape, found[0])]
    return []


def merged(tuned: Tuned) -> Tuned | None:
    """Equal pipelines of single devices as one, whose stages have a device of each, to hold all experts (`copies`).

    They may share NICs then, which groups may not. None of other setups.
    """
    setup, layers, counts = tuned.setup, tuned.layers[0], tuned.micro_batches
    if setup.width > 1 or setup.pipelines < 2 or tuned.layers != [layers] * setup.pipelines or len({*counts}) > 1:
        return None
    one = replace(setup, width=setup.pipelines, pipelines=1, micro_batches=counts[0])
    units = [tuple(rank for unit in stage for rank in unit) for stage in zip(*tuned.units, strict=True)]
    return replace(tuned, setup=one, units=[units], layers=[layers], micro_batches=counts[:1])


def _variants(cost: CostModel, shape: Shape) -> Iterator[Shape]:
    """Windows of the same micro-batches, or of parts of them; with and without experts by speed. Nothing where no rows
    travel."""
    if shape.copies:
        return
    tuned, own = shape.tuned, _own_sequences(cost, shape)
    mixed = any(len({cost.devices[rank].type for rank in unit}) > 1 for units in tuned.units for unit in units)
    for by_speed in (False, True) if mixed else (False,):
        if by_speed:
            yield replace(shape, by_speed=True)
        for window in WINDOWS:
            if all(count % window == 0 for count in tuned.micro_batches):
                yield replace(shape, window=window, by_speed=by_speed)
            if own % window == 0:
                yield replace(shape, window=window, parts=window, by_speed=by_speed)


def _other_orders(cost: CostModel, groups: Sequence[Group]) -> list[Found]:
    """The same groups with experts between micro-batches, and with transfers interleaved."""
    orders = [[group.schedule, *other_schedules(group.schedule)] for group in groups]
    found: list[Found] = []
    for schedules in list(zip(*orders, strict=True))[1:]:
        pairs = zip(groups, schedules, strict=True)
        found += timed(cost, [group.model_copy(update={"schedule": schedule}) for group, schedule in pairs])
    return found


def timed(cost: CostModel, groups: list[Group]) -> list[Found]:
    """The groups with the seconds of an iteration; nothing if they do not fit, or would share NICs."""
    try:
        costs = [group_cost(cost.inputs, group) for group in groups]
    except UserError:
        return []
    alone = len(groups) == 1 and len(groups[0].replicas) == 1
    sharers = None if alone else Sharers.of((group.layout, len(group.replicas)) for group in groups)
    for group, own in zip(groups, costs, strict=True):
        layout_cost = LayoutCost(own, group.layout)
        layout_cost.sharers = sharers
        if overflow(layout_cost):
            return []
    if alone:
        return [(simulate(LayoutCost(costs[0], groups[0].layout)).seconds, groups)]
    done = [replay_group(cost.inputs, group, own) for group, own in zip(groups, costs, strict=True)]
    return [(joined(done, cost).seconds, groups)]


def groups_of(cost: CostModel, shape: Shape) -> list[Group]:
    """A group of every pipeline; equal ones on equal devices are copies."""
    found: list[tuple[object, Layout, list[list[int]]]] = []
    tuned = shape.tuned
    for units, layers, count in zip(tuned.units, tuned.layers, tuned.micro_batches, strict=True):
        ranks = sorted(rank for unit in units for rank in unit)
        layout, devices = _layout(cost, shape, units, layers, count), _places(cost, ranks)
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


def _layout(cost: CostModel, shape: Shape, units: Sequence[Unit], layers: Sequence[int], count: int) -> Layout:
    """A pipeline; rank r of it is the r-th of its units' ranks."""
    ranks = sorted(rank for unit in units for rank in unit)
    place = {rank: local for local, rank in enumerate(ranks)}
    stages = [
        PipelineStage(layers=held, ranks=sorted(place[rank] for rank in unit))
        for unit, held in zip(units, layers, strict=True)
    ]
    schedule = cost.schedule(count * shape.parts, shape.window, shape.recompute, shape.state)
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

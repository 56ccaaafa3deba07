"""PP: layers over the stages of pipelines, tuned under memory limits.

The searched space. Devices are sorted by the speed of a layer and cut into units of equal width, which work as one
stage each (pipeline_cost.py). A pipeline has two stages at least. For every width and number of stages there are as
many pipelines as go into all units, or into those of the fastest types alone. The units are dealt to the pipelines in
turn, so that all have nearly the same types, and run fast first or slow first. Embedding and dense layers are on the
first stage, the head is on the last. Micro-batches have any number of sequences that divides the batch and the width
divides; they are dealt to the pipelines so that all end together. Layers per stage: see split. The order is 1F1B, and
for the best setup also GPipe. Weights and optimizer states are whole on every device that holds a layer.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, floor, inf

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.baselines.pipeline_cost import PipelineCost, Unit
from hetermoe_cli.planner.baselines.pipeline_run import Order, Pipeline, in_flight, run
from hetermoe_cli.planner.baselines.rival import Rival, micro_batch_counts, recompute_choices
from hetermoe_cli.spec.train import Recompute

MOST_DEVICES = 128  # beyond that the search takes seconds
MOST_UNITS = 16  # nodes, as units


@dataclass(frozen=True)
class Setup:
    """Pipelines before their layers are split. `micro_batches`: of all pipelines together."""

    width: int
    stages: int
    pipelines: int
    micro_batches: int
    recompute: Recompute

    def __str__(self) -> str:
        again = {"none": "", "all": ", recomputation"}.get(self.recompute, f", recomputation of {self.recompute}")
        width = f" of {self.width} devices" if self.width > 1 else ""
        return f"{self.pipelines} x {self.stages} stages{width}{again}"


@dataclass(frozen=True)
class Tuned:
    """A setup with units and layers of every stage, and the micro-batches of every pipeline."""

    setup: Setup
    order: Order
    units: list[list[Unit]]
    layers: list[list[int]]
    micro_batches: list[int]

    def __str__(self) -> str:
        splits = sorted({"-".join(map(str, layers)) for layers in self.layers})
        return f"{self.order}, R = {max(self.micro_batches)}, {self.setup}, layers {' or '.join(splits)}"


def pp(cost: CostModel, limit: int, *, pipelines: int | None = None) -> Rival:
    """The best pipeline of the searched space. `limit` is for the R of layouts; a pipeline needs more.

    `pipelines`: this many of equal depth over all devices, each device a stage, instead of all widths and depths.
    """
    if len(cost.devices) > MOST_DEVICES:
        return Rival(None, inf, f"not computed for more than {MOST_DEVICES} devices")
    search = _Search(cost, pipelines)
    found = search.ranked()
    if not found:
        return Rival(None, inf, "does not fit: no split of the layers over stages fits into memory")
    seconds, winner = found[0]
    for tuned in search.tuned(winner.setup, "GPipe"):
        if (piped := search.seconds(tuned)) < seconds:
            winner, seconds = tuned, piped
    return Rival(None, seconds, str(winner), found)


def pipelines_of_nodes(cost: CostModel) -> list[tuple[float, Tuned]]:
    """Like pp's, seconds first, with units of whole or half nodes alone: many devices are searched as fast as few.

    Nodes of another size than most devices are in are left out; nothing of clusters with too many nodes.
    """
    members: dict[int, list[int]] = {}
    for device in cost.devices:
        members.setdefault(device.node, []).append(device.rank)
    sizes = Counter(len(ranks) for ranks in members.values() for _ in ranks)
    width = max(sizes, key=lambda size: (sizes[size], size))
    whole = [ranks for ranks in members.values() if len(ranks) == width]
    parts = 2 if width % 2 == 0 and 2 * len(whole) <= MOST_UNITS else 1
    if len(whole) > MOST_UNITS:
        return []
    return _Search(cost, quantum=width // parts, ranks=[rank for ranks in whole for rank in ranks]).ranked()


class _Search:
    """`quantum`: what the width of units is a multiple of; `ranks`: the only ones to be used."""

    def __init__(
        self, cost: CostModel, pipelines: int | None = None, quantum: int = 1, ranks: Sequence[int] | None = None
    ) -> None:
        self.cost, self.batch, self.pipelines = cost, cost.train.global_batch_sequences, pipelines
        self._quantum = quantum
        self._costs: dict[tuple[int, int, Recompute], PipelineCost] = {}
        one = PipelineCost(cost, 1, 1, "none")
        self.sorted = sorted(ranks or range(len(cost.devices)), key=lambda rank: one.unit((rank,)).layer)
        self._rates: dict[tuple[int, int, int, Recompute], tuple[int, float]] = {}

    def costs(self, setup: Setup) -> PipelineCost:
        key = (self.batch // setup.micro_batches, setup.width, setup.recompute)
        if key not in self._costs:
            self._costs[key] = PipelineCost(self.cost, *key)
        return self._costs[key]

    def setups(self) -> Iterator[Setup]:
        """All setups in which every pipeline has a micro-batch and every device a sequence of it."""
        counts = micro_batch_counts(self.batch, self.batch)
        for (width, stages, pipelines), count in product(self._shapes(), counts):
            if count >= pipelines and self.batch // count % width == 0:
                for recompute in recompute_choices(self.cost):
                    yield Setup(width, stages, pipelines, count, recompute)

    def _shapes(self) -> list[tuple[int, int, int]]:
        """(width, stages, pipelines)."""
        if self.pipelines:
            return [(1, len(self.sorted) // self.pipelines, self.pipelines)]
        types = [self.cost.devices[rank].type for rank in self.sorted]
        prefixes = {
            place for place in range(1, len(types) + 1) if place == len(types) or types[place - 1] != types[place]
        }
        return sorted(
            {
                (width, stages, devices // width // stages)
                for devices in prefixes
                for width in range(self._quantum, devices // 2 + 1, self._quantum)
                for stages in range(2, min(devices // width, self.cost.model.layers) + 1)
            }
        )

    def ranked(self) -> list[tuple[float, Tuned]]:
        """Seconds of those in 1F1B order that were the best when they were found, or nearly so; the fastest first."""
        found: list[tuple[float, Tuned]] = []
        best = inf
        bounds = [(self.work(setup), setup) for setup in self.setups()]
        for bound, setup in sorted(bounds, key=lambda pair: pair[0]):
            if bound >= best:
                break
            for tuned in self.tuned(setup, "1F1B"):
                if self.bound(tuned) < best:
                    seconds = self.seconds(tuned)
                    best = min(best, seconds)
                    found.append((seconds, tuned))
        return sorted(found, key=lambda pair: pair[0])

    def work(self, setup: Setup) -> float:
        """Lower bound: all layers of all micro-batches, perfectly divisible over the units that are used; infinite if
        these cannot hold the layers with one micro-batch at a time."""
        used = setup.stages * setup.pipelines
        key = (used, self.batch // setup.micro_batches, setup.width, setup.recompute)
        if key not in self._rates:
            costs, units = self.costs(setup), self._units(setup.width)[:used]
            room = sum(costs.most_layers(unit, 1, False, False) for unit in units)
            self._rates[key] = room, sum(1 / costs.unit(unit).layer for unit in units)
        room, rate = self._rates[key]
        if room < self.cost.model.layers * setup.pipelines:
            return inf
        return setup.micro_batches * self.cost.model.layers / rate

    def _units(self, width: int) -> list[Unit]:
        return [tuple(self.sorted[at : at + width]) for at in range(0, len(self.sorted) - width + 1, width)]

    def tuned(self, setup: Setup, order: Order) -> Iterator[Tuned]:
        """Fast first and slow first, each with layers and micro-batches; what does not fit is left out."""
        units = self._units(setup.width)[: setup.stages * setup.pipelines]
        for step in (1, -1) if len(self.cost.types) > 1 else (1,):
            dealt = [units[index :: setup.pipelines][::step] for index in range(setup.pipelines)]
            known: dict[object, list[int] | None] = {}
            layers = [self._split(setup, stages, order, known) for stages in dealt]
            if all(layers):
                even = Tuned(setup, order, dealt, [part for part in layers if part], [1] * len(dealt))
                seconds = [self._stage_seconds(even, index) for index in range(len(dealt))]
                yield replace(even, micro_batches=deal(setup.micro_batches, seconds))

    def _split(
        self, setup: Setup, units: Sequence[Unit], order: Order, known: dict[object, list[int] | None]
    ) -> list[int] | None:
        """Layers of the stages; `known` of pipelines that cost the same."""
        costs, last, each = self.costs(setup), len(units) - 1, ceil(setup.micro_batches / setup.pipelines)
        key = tuple((costs.unit(unit), self.cost.devices[unit[-1]].type) for unit in units)
        if key not in known:
            most = [
                costs.most_layers(unit, in_flight(order, stage, len(units), each), stage == 0, stage == last)
                for stage, unit in enumerate(units)
            ]
            seconds = [costs.unit(unit).layer for unit in units]
            known[key] = split(self.cost.model.layers, seconds, costs.extra(units), most, each)
        return known[key]

    def _stage_seconds(self, tuned: Tuned, index: int) -> list[float]:
        """Forward and backward of a micro-batch on every stage of a pipeline."""
        costs, units = self.costs(tuned.setup), tuned.units[index]
        layers = [count * costs.unit(unit).layer for unit, count in zip(units, tuned.layers[index], strict=True)]
        return [own + extra for own, extra in zip(layers, costs.extra(units), strict=True)]

    def bound(self, tuned: Tuned) -> float:
        """No stage is done before its own work and one micro-batch on all stages before it."""
        return max(
            count * seconds[stage] + sum(seconds[:stage])
            for index, count in enumerate(tuned.micro_batches)
            for seconds in [self._stage_seconds(tuned, index)]
            for stage in range(len(seconds))
        )

    def seconds(self, tuned: Tuned) -> float:
        """Simulated iteration with gradient synchronisation and optimizer."""
        costs = self.costs(tuned.setup)
        pipelines = []
        for units, layers, count in zip(tuned.units, tuned.layers, tuned.micro_batches, strict=True):
            each = [costs.unit(unit) for unit in units]
            forward = [one.forward * held for one, held in zip(each, layers, strict=True)]
            backward = [one.backward * held for one, held in zip(each, layers, strict=True)]
            forward[0], backward[0] = forward[0] + each[0].dense[0], backward[0] + each[0].dense[1]
            forward[-1] += each[-1].head  # head, loss and their backward at once, as in every layout
            pipelines.append(Pipeline(tuple(units), tuple(forward), tuple(backward), count))
        drained = run(self.cost.network, pipelines, tuned.order, costs.message_bytes)
        stages = [list(zip(*pair, strict=True)) for pair in zip(tuned.units, tuned.layers, strict=True)]
        return drained + costs.update_seconds(stages)


def split(
    layers: int, seconds: Sequence[float], extra: Sequence[float], most: Sequence[int], micro_batches: int
) -> list[int] | None:
    """Layers per stage with the least sum of stages + (micro_batches - 1) x the slowest stage; None if none fits.

    `seconds`: of a layer, by stage; `extra`: of what else a stage has. At least one and at most `most` layers a stage.
    For every time that the slowest stage may take, the fastest stages are filled first, which gives the least sum.
    """
    if min(most) < 1 or sum(most) < layers or len(seconds) > layers:
        return None
    limits = sorted({t * n + e for t, e, m in zip(seconds, extra, most, strict=True) for n in range(1, m + 1)})
    fastest = sorted(range(len(seconds)), key=lambda stage: seconds[stage])
    best: list[int] | None = None
    value = inf
    for limit in limits:
        if (micro_batches - 1) * limit >= value:
            break
        room = [min(m, floor((limit - e) / t + 1e-9)) for t, e, m in zip(seconds, extra, most, strict=True)]
        if min(room) < 1 or sum(room) < layers:
            continue
        share, left = [1] * len(room), layers - len(room)
        for stage in fastest:
            added = min(left, room[stage] - 1)
            share[stage] += added
            left -= added
        times = [t * n + e for t, e, n in zip(seconds, extra, share, strict=True)]
        found = sum(times) + (micro_batches - 1) * max(times)
        if found < value:
            best, value = share, found
    return best


def deal(total: int, seconds: Sequence[Sequence[float]]) -> list[int]:
    """Micro-batches per pipeline, at least one: each goes where it would end first."""
    counts = [1] * len(seconds)
    ends = [(sum(times), max(times)) for times in seconds]
    for _ in range(total - len(seconds)):
        first = min(range(len(counts)), key=lambda index: ends[index][0] + counts[index] * ends[index][1])
        counts[first] += 1
    return counts

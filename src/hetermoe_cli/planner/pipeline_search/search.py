"""Layers over the stages of pipelines, tuned under memory limits: thousands of setups in a small simulator (run.py).

The searched space. Devices are sorted by the speed of a layer and cut into units of equal width, which work as one
stage each (cost.py). A pipeline has two stages at least. For every width and number of stages there are as
many pipelines as go into all units, or into those of the fastest types alone. The units are dealt to the pipelines in
turn, so that all have nearly the same types, and run fast first, slow first, or with the fastest at both ends.
Embedding and dense layers are on the first stage, the head is on the last. Micro-batches have any number of sequences
that divides the batch and the width divides; they are dealt to the pipelines so that all end together. Layers of every
stage, and what it computes again: see layer_split.py. The order is 1F1B, and for the best setup also GPipe. A stage's
devices share out optimizer states unless the training spec wants them whole.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import ceil, inf
from typing import get_args

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.allowed import micro_batch_counts, recompute_choices
from hetermoe_cli.planner.pipeline_search.cost import PipelineCost, Unit
from hetermoe_cli.planner.pipeline_search.layer_split import Held, Way, deal, split, useful
from hetermoe_cli.planner.pipeline_search.run import Order, Pipeline, in_flight, run
from hetermoe_cli.planner.pipeline_search.setups import Setup, Tuned
from hetermoe_cli.spec.schedule_choice import PassOrder
from hetermoe_cli.spec.train import Recompute

MOST_UNITS = 16  # nodes, as units
FEW_DEVICES = 16  # up to which units of any width are looked at with woven passes


def overlapped_pipelines(
    cost: CostModel, below: float = inf, most_pipelines: int | None = None, most_units: int = MOST_UNITS
) -> list[tuple[float, Tuned]]:
    """Like pp's, seconds first, with woven passes as well, which overlap all-to-alls with compute; those that take less
    than `below` seconds. At most so many pipelines side by side, with NICs of their own unless they may be `merged`.

    Many devices are searched as fast as few, with units of whole or half nodes alone; nodes of another size than most
    devices are in are left out then. Nothing of clusters with more than `most_units` nodes.
    """
    search = partial(PipelineSearch, cost, passes=get_args(PassOrder), plans=True, most_pipelines=most_pipelines)
    if len(cost.devices) <= FEW_DEVICES:
        return search().ranked(below)
    members: dict[int, list[int]] = {}
    for device in cost.devices:
        members.setdefault(device.node, []).append(device.rank)
    sizes = Counter(len(ranks) for ranks in members.values() for _ in ranks)
    width = max(sizes, key=lambda size: (sizes[size], size))
    whole = [ranks for ranks in members.values() if len(ranks) == width]
    parts = 2 if width % 2 == 0 and 2 * len(whole) <= MOST_UNITS else 1
    if len(whole) > most_units:
        return []
    used = [rank for ranks in whole for rank in ranks]
    return search(quantum=width // parts, ranks=used).ranked(below)


def _ends_first(stages: list[Unit]) -> list[Unit]:
    """The fastest first and last, the slowest between."""
    return [*stages[::2], *stages[1::2][::-1]]


_ORDERS: tuple[Callable[[list[Unit]], list[Unit]], ...] = (list, lambda stages: stages[::-1], _ends_first)


class PipelineSearch:
    """`quantum`: what the width of units is a multiple of; `ranks`: the only ones to be used. `plans`: only what can be
    one (overlapped_pipelines)."""

    def __init__(
        self,
        cost: CostModel,
        pipelines: int | None = None,
        quantum: int = 1,
        ranks: Sequence[int] | None = None,
        passes: Sequence[PassOrder] = ("in_turn",),
        plans: bool = False,
        most_pipelines: int | None = None,
    ) -> None:
        self.cost, self.batch, self.pipelines = cost, cost.train.global_batch_sequences, pipelines
        self._quantum, self._passes, self._choices = quantum, passes, recompute_choices(cost)
        self._plans, self._most = plans, most_pipelines or len(cost.devices)
        self._costs: dict[tuple[int, int, Recompute, PassOrder], PipelineCost] = {}
        one = PipelineCost(cost, 1, 1, self._choices[0])
        self.sorted = sorted(ranks or range(len(cost.devices)), key=lambda rank: one.unit((rank,)).layer)
        self._rates: dict[tuple[int, int, int, PassOrder], tuple[int, float]] = {}

    def costs(self, setup: Setup, recompute: Recompute) -> PipelineCost:
        key = (self.batch // setup.micro_batches, setup.width, recompute, setup.passes)
        if key not in self._costs:
            self._costs[key] = PipelineCost(self.cost, *key)
        return self._costs[key]

    def setups(self) -> Iterator[Setup]:
        """All setups in which every pipeline has a micro-batch and every device a sequence of it. Where no rows travel,
        or of one micro-batch alone, none are woven."""
        counts = micro_batch_counts(self.batch, self.batch)
        for (width, stages, pipelines), count in product(self._shapes(), counts):
            if pipelines <= min(count, self._most) and self.batch // count % width == 0:
                for passes in self._passes if width > 1 and count > pipelines else self._passes[:1]:
                    yield Setup(width, stages, pipelines, count, passes)

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

    def ranked(self, below: float = inf) -> list[tuple[float, Tuned]]:
        """Seconds of those that were the best when they were found, or nearly so, if they take less than `below`; the
        fastest first. Woven or in 1F1B order."""
        best, found = below, list[tuple[float, Tuned]]()
        bounds = [(self.work(setup), setup) for setup in self.setups()]
        for bound, setup in sorted(bounds, key=lambda pair: pair[0]):
            if bound >= best:
                break
            for tuned in self.tuned(setup, setup.order):
                if self.bound(tuned) < best:
                    seconds = self.seconds(tuned)
                    best = min(best, seconds)
                    found.append((seconds, tuned))
        return sorted([pair for pair in found if pair[0] < below], key=lambda pair: pair[0])

    def work(self, setup: Setup) -> float:
        """Lower bound: all layers of all micro-batches, perfectly divisible over the units that are used; infinite if
        these cannot hold the layers with one micro-batch at a time."""
        used = setup.stages * setup.pipelines
        key = (used, self.batch // setup.micro_batches, setup.width, setup.passes)
        if key not in self._rates:
            ways, units = [self.costs(setup, again) for again in self._choices], self._units(setup.width)[:used]
            room = sum(max(costs.most_layers(unit, 1, False, False) for costs in ways) for unit in units)
            self._rates[key] = room, sum(1 / min(costs.unit(unit).layer for costs in ways) for unit in units)
        room, rate = self._rates[key]
        if room < self.cost.model.layers * setup.pipelines:
            return inf
        return setup.micro_batches * self.cost.model.layers / rate

    def _units(self, width: int) -> list[Unit]:
        return [tuple(self.sorted[at : at + width]) for at in range(0, len(self.sorted) - width + 1, width)]

    def tuned(self, setup: Setup, order: Order) -> Iterator[Tuned]:
        """In every order of the stages that differs, each with layers and micro-batches; what does not fit, or cannot
        be a plan, is left out."""
        units = self._units(setup.width)[: setup.stages * setup.pipelines]
        fast_first = [units[index :: setup.pipelines] for index in range(setup.pipelines)]
        if self._plans and setup.width > 1 and self._share_nics(fast_first):
            return
        orders: dict[object, list[list[Unit]]] = {}
        for arranged in _ORDERS:
            dealt = [arranged(stages) for stages in fast_first]
            types = [tuple(self.cost.devices[r].type for unit in stages for r in unit) for stages in dealt]
            orders.setdefault(tuple(types), dealt)
        for dealt in orders.values():
            known: dict[object, list[Held] | None] = {}
            found = [self._split(setup, stages, order, known) for stages in dealt]
            held = [part for part in found if part]
            if len(held) == len(dealt):
                layers = [[stage.layers for stage in part] for part in held]
                recompute = [[stage.way.recompute for stage in part] for part in held]
                even = Tuned(setup, order, dealt, layers, recompute, [1] * len(dealt))
                seconds = [self._stage_seconds(even, index) for index in range(len(dealt))]
                yield replace(even, micro_batches=deal(setup.micro_batches, seconds))

    def _share_nics(self, pipelines: Sequence[Sequence[Unit]]) -> bool:
        devices = [[self.cost.devices[rank] for unit in units for rank in unit] for units in pipelines]
        nics = [{(device.node, device.nic) for device in own} for own in devices]
        return sum(map(len, nics)) > len(set().union(*nics))

    def _split(
        self, setup: Setup, units: Sequence[Unit], order: Order, known: dict[object, list[Held] | None]
    ) -> list[Held] | None:
        """Layers of the stages; `known` of pipelines that cost the same."""
        ways = [self.costs(setup, recompute) for recompute in self._choices]
        last, each = len(units) - 1, ceil(setup.micro_batches / setup.pipelines)
        key = tuple((ways[0].unit(unit), self.cost.devices[unit[-1]].type) for unit in units)
        if key not in known:
            extra = [costs.extra(units) for costs in ways]
            stages: list[list[Way]] = []
            for stage, unit in enumerate(units):
                at = in_flight(order, stage, len(units), each), stage == 0, stage == last
                found = [
                    Way(again, costs.unit(unit).layer, other[stage], costs.most_layers(unit, *at))
                    for again, costs, other in zip(self._choices, ways, extra, strict=True)
                ]
                stages.append(useful(found))
            known[key] = split(self.cost.model.layers, stages, each)
        return known[key]

    def _stage_costs(self, tuned: Tuned, index: int) -> list[tuple[float, float, float]]:
        """Forward, backward and both of a micro-batch on every stage of a pipeline."""
        units, result = tuned.units[index], []
        last = len(units) - 1
        for stage, (unit, layers) in enumerate(zip(units, tuned.layers[index], strict=True)):
            cost = self.costs(tuned.setup, tuned.recompute[index][stage]).unit(unit)
            dense = cost.dense if stage == 0 else (0.0, 0.0)
            # head, loss and their backward at once, as in every layout
            extra = dense[0] + (cost.head if stage == last else 0.0)
            both = cost.layer * layers + extra + dense[1]
            result.append((cost.forward * layers + extra, cost.backward * layers + dense[1], both))
        return result

    def _stage_seconds(self, tuned: Tuned, index: int) -> list[float]:
        return [both for *_, both in self._stage_costs(tuned, index)]

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
        costs, pipelines = self.costs(tuned.setup, self._choices[0]), []
        for index, (units, count) in enumerate(zip(tuned.units, tuned.micro_batches, strict=True)):
            forward, backward, both = zip(*self._stage_costs(tuned, index), strict=True)
            pipelines.append(Pipeline(tuple(units), forward, backward, count, both))
        drained = run(self.cost.network, pipelines, tuned.order, costs.message_bytes)
        stages = [list(zip(*pair, strict=True)) for pair in zip(tuned.units, tuned.layers, strict=True)]
        return drained + costs.update_seconds(stages, hidden=not self._plans)

"""Shifts: old devices that only host attend as well, each to a few micro-batches, in place of ranks that attend to all.

At long sequences attention decides the iteration and hosts have time to spare, but a host that is several times slower
at attention would hold up every micro-batch that it had a part in. A *helper* takes over all sequences that one rank
has in one micro-batch: it may be late with that one by as much as the window's other micro-batches take.

Numbers of helpers and micro-batches, windows and recomputation are ranked by a closed estimate; the best ones that fit
are replayed with experts in simple shares, and the best of these climbed by replays. No bound covers these layouts.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import chain, islice, product, takewhile
from math import floor, inf
from typing import NamedTuple

import numpy as np

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.allowed import kept_choices
from hetermoe_cli.planner.arrays import IntArray
from hetermoe_cli.planner.instance.deal import number, proportional
from hetermoe_cli.planner.instance.device_rates import ClassRates, device_rates
from hetermoe_cli.planner.search.dealt import Climbed, Dealt
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.schedule_choice import ScheduleChoice

MOST_DEVICES = 16  # beyond that replays are too slow to climb by
MOST_EACH = 4  # micro-batches that a helper takes over
BASES = 4  # that helpers are tried in
REPLAYED = 8  # variants that fit of every schedule, the lowest estimates first
WORTH = 0.99  # times the best: what an estimate must be below, as replays are above it
CLIMBED = 3
NEAR = 1.1  # times the best: from further off no climb gets below it
HELPED = (1.0, 0.5, 0.0)  # of their room, what helpers host at most to begin with
LEVELS = 30  # bisections


@dataclass(frozen=True)
class Roster:
    """Who attends when: ranks of `everywhere` in all micro-batches but those that a helper takes over from them."""

    schedule: ScheduleChoice
    sequences: int  # of a micro-batch, on a rank that attends to it
    everywhere: tuple[int, ...]
    helpers: tuple[int, ...]
    others: tuple[int, ...]
    taken: int  # times that a helper, each in turn, takes over a micro-batch
    late: bool  # the last one among those, or the first

    def shifts(self) -> list[list[int]] | None:
        """By rank; None where a helper would take over the same sequences as another, or two at once."""
        total = self.schedule.micro_batches
        result: dict[int, set[int]] = {rank: set() for rank in (*self.helpers, *self.others)}
        result |= {rank: set(range(total)) for rank in self.everywhere}
        for turn in range(self.taken):
            place, helper = turn * total // self.taken, self.helpers[turn % len(self.helpers)]
            j = total - 1 - place if self.late else place
            relieved = self.everywhere[turn % len(self.everywhere)]
            if j in result[helper] or j not in result[relieved]:
                return None
            result[helper].add(j)
            result[relieved].remove(j)
        return [sorted(result[rank]) for rank in sorted(result)] if all(result[r] for r in self.everywhere) else None


def with_shifts(
    cost: CostModel, bases: Sequence[Layout], seconds: float, allowed: float, micro_batch_limit: int
) -> Iterator[Layout]:
    """Layouts with shifts that may beat `seconds`, found in about `allowed` seconds; `bases`: those without, fastest
    first.

    A part of the time is for estimates, a part for replays, and what is left for climbs.
    """
    if len(cost.devices) > MOST_DEVICES:
        return
    began = time.monotonic()
    variants = _variants(cost, bases, micro_batch_limit)
    listed = takewhile(lambda variant: time.monotonic() < began + allowed / 4, variants)
    found = sorted(listed, key=lambda variant: variant.estimate)
    looked, timed = Counter[ScheduleChoice](), list[tuple[Climbed, Dealt]]()
    for variant in found:
        if variant.estimate >= WORTH * seconds or time.monotonic() > began + allowed / 2:
            break
        if looked[variant.roster.schedule] < REPLAYED:
            start = min([variant.dealt.replayed(table) for table in variant.starts()], key=lambda one: one.seconds)
            looked[variant.roster.schedule] += start.seconds < inf
            timed.append((start, variant.dealt))
    for start, dealt in sorted(timed, key=lambda one: one[0].seconds)[:CLIMBED]:
        if start.seconds < NEAR * seconds:
            yield dealt.layout(dealt.climbed(start, began + allowed).table)


def _variants(cost: CostModel, bases: Sequence[Layout], micro_batch_limit: int) -> Iterator["_Variant"]:
    """Of every roster that the first bases that can be helped lead to, once."""
    helped = islice(filter(None, (list(_rosters(cost, base, micro_batch_limit)) for base in bases)), BASES)
    rates = cache(partial(device_rates, cost))
    for roster in dict.fromkeys(chain.from_iterable(helped)):
        if (shifts := roster.shifts()) is not None:
            yield _Variant(cost, roster, shifts, rates)


def _rosters(cost: CostModel, base: Layout, micro_batch_limit: int) -> Iterator[Roster]:
    """What helpers can make of a layout whose attending ranks are alike: its micro-batches as they are or in halves,
    its windows or all at once."""
    attending, schedule = tuple(base.attending), base.schedule
    hosts = [rank for rank in range(base.world_size) if not base.sequences_per_rank[rank]]
    kinds = {(cost.devices[rank].type, base.sequences_per_rank[rank]) for rank in attending}
    if base.pipeline or not hosts or len(kinds) > 1 or schedule.dense_state == "full" or schedule.window == 1:
        return
    ((_, sequences),) = kinds
    hosts.sort(key=lambda rank: (sum(cost.attention_cost(cost.of(rank), 1, 1)[:2]), rank))
    again = [recompute for recompute, state in kept_choices(cost) if state == schedule.dense_state]
    for parts, recompute in product((1, 2), again):
        total = parts * schedule.micro_batches
        if sequences % parts or (parts > 1 and total > micro_batch_limit):
            continue
        for width in dict.fromkeys((parts * schedule.window, total)):
            choice = cost.schedule(total, width, recompute, schedule.dense_state)
            for helpers in range(1, len(hosts) + 1):
                most = min(MOST_EACH * helpers, total * len(attending) // 2)
                for taken, late in product(range(helpers, most + 1), (False, True)):
                    yield Roster(
                        choice,
                        sequences // parts,
                        attending,
                        tuple(sorted(hosts[:helpers])),
                        tuple(sorted(hosts[helpers:])),
                        taken,
                        late,
                    )


class _Class(NamedTuple):
    """Ranks of one part in a roster and of one device type; seconds and room of one of them."""

    ranks: tuple[int, ...]
    helps: bool
    attention: float  # of one micro-batch, both ways in all layers; 0 of one that never attends
    busy: float  # that it attends in an iteration
    each: float  # that one expert of a layer takes in an iteration
    room: int  # experts of all layers; negative where memory does not hold the rest


class _Variant:
    """A roster with its shifts; placements are tables [layers, classes] of experts."""

    def __init__(
        self, cost: CostModel, roster: Roster, shifts: list[list[int]], rates: Callable[..., ClassRates]
    ) -> None:
        self.cost, self.roster, self._shifts, self._rates = cost, roster, shifts, rates
        self._attending = {*roster.everywhere, *roster.helpers}
        parts = (roster.everywhere, roster.helpers, roster.others)
        self._classes = [self._class(ranks) for part in parts for ranks in self._alike(part)]
        self.estimate = max(self._level(), self._chain())

    @cached_property
    def dealt(self) -> Dealt:
        """Its placements."""
        roster, layers = self.roster, self.cost.model.layers
        world = self.cost.inputs.cluster.world_size
        base = Layout(
            schedule=roster.schedule,
            sequences_per_rank=[roster.sequences * (rank in self._attending) for rank in range(world)],
            placement=[number([self.cost.model.experts] + [0] * (world - 1), 0)] * layers,
            shifts=self._shifts,
        )
        return Dealt(self.cost, base, [c.ranks for c in self._classes])

    def _alike(self, part: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Ranks of each device type."""
        types = {rank: self.cost.devices[rank].type for rank in part}
        return [tuple(rank for rank in part if types[rank] == one) for one in dict.fromkeys(types.values())]

    def _class(self, ranks: tuple[int, ...]) -> _Class:
        roster, layers, helps = self.roster, self.cost.model.layers, ranks[0] in self.roster.helpers
        counts = [len(self._shifts[rank]) for rank in ranks]
        rates = self._rates_of(ranks)
        attention = rates.attending(layers)
        return _Class(
            ranks=ranks,
            helps=helps,
            attention=attention,
            busy=attention * (max(counts) if helps else sum(counts) / len(ranks)),
            each=roster.schedule.micro_batches * sum(rates.hosted),
            room=floor(rates.room(layers, 1)),
        )

    def _rates_of(self, ranks: tuple[int, ...]) -> ClassRates:
        """Of one that attends to most micro-batches of a window."""
        roster, width = self.roster, self.roster.schedule.window
        own, total = roster.sequences * (ranks[0] in self._attending), roster.sequences * len(roster.everywhere)
        rates = self._rates(ranks[0], own, roster.schedule, total)
        alive = max(max(Counter(j // width for j in self._shifts[rank]).values(), default=0) for rank in ranks)
        kept = self.cost.attention_kept_bytes(self.cost.of(ranks[0]), own, roster.schedule.recompute_attention)
        return replace(rates, memory_base=rates.memory_base - (width - alive) * kept)

    def _level(self, helped: float = 1.0) -> float:
        """When all devices are done if experts are shared out so that they are done together, as far as there is room;
        helpers host at most a part `helped` of what they have room for."""
        work = self.cost.model.layers * self.cost.model.experts
        if min(c.room for c in self._classes) < 0 or sum(self._shares(inf, helped)) < work:
            return inf
        low = high = max(c.busy for c in self._classes)
        while sum(self._shares(high, helped)) < work:
            low, high = high, 2 * high
        for _ in range(LEVELS):
            middle = (low + high) / 2
            low, high = (low, middle) if sum(self._shares(middle, helped)) >= work else (middle, high)
        return high

    def _shares(self, done: float, helped: float) -> list[float]:
        """Experts that classes can compute until then, and have room for."""
        rooms = [c.room * (helped if c.helps else 1.0) for c in self._classes]
        spare = [max(0.0, min(room, (done - c.busy) / c.each)) for room, c in zip(rooms, self._classes, strict=True)]
        return [len(c.ranks) * each for each, c in zip(spare, self._classes, strict=True)]

    def _chain(self) -> float:
        """No window is done before each rank has attended to all its micro-batches in it, in all layers."""
        width, longest = self.roster.schedule.window, defaultdict[int, float](float)
        for c in self._classes:
            for rank in c.ranks:
                for window, taken in Counter(j // width for j in self._shifts[rank]).items():
                    longest[window] = max(longest[window], taken * c.attention)
        return sum(longest.values())

    def starts(self) -> Iterator[IntArray]:
        """Experts shared out so that all devices are done together; and helpers with fewer of them, or none, as what
        they attend to holds up their experts."""
        totals = [self.cost.model.experts] * self.cost.model.layers
        for helped in HELPED:
            if (done := self._level(helped)) < inf:
                yield np.array(proportional(totals, self._shares(done, helped)))

"""Named experts -> ranks: every layer's work levelled against what the ranks of a given layout have time for.

An expert stays in its layer's pipeline stage.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.arrays import FloatArray, IntArray
from hetermoe_cli.planner.by_name.assign import LayerWork, assign
from hetermoe_cli.planner.by_name.spread import spread
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.spec.layout import LayerPlacement, Layout

MORE_COPIES = 8


@dataclass(frozen=True)
class Aim:
    """What a layer's ranks should have time for: what they have in the given layout's layer, or its mean over layers.

    `carried`: what a rank did too much in earlier layers it does less in later ones. `more_copies`: try to replicate
    more experts than the layout does. `extra`: replicate so many more at least. `same_counts`: as many experts a rank
    as the layout has.
    """

    mean: bool = False
    carried: bool = False
    more_copies: bool = False
    extra: int = 0
    same_counts: bool = False


AIMS = [
    Aim(mean=mean, carried=carried, more_copies=more)
    for mean in (False, True)
    for carried in (False, True)
    for more in (False, True)
] + [Aim(same_counts=True)]


class Named:
    """Seconds and bytes of every expert on every rank of `layout`, by name, under the expert load of `cost`.

    Seconds are those of one micro-batch, forward and backward, with the optimizer step's share in them.
    """

    def __init__(self, cost: CostModel, layout: Layout) -> None:
        self.cost, self.layout = cost, layout
        self.world, self.layers, self.experts = layout.world_size, layout.layers, layout.experts
        self._spans = [layout.span_of(rank) for rank in range(self.world)]
        self.inside = np.array([[layer in span.layers for span in self._spans] for layer in range(self.layers)])
        self._attends = self.inside & (np.array(layout.sequences_per_rank) > 0)
        self._probe = LayoutCost(cost, layout)
        self._shares = {  # of replicated experts' states, by pipeline stage
            span.number: cost.state_share(layout.schedule, len(span.attending)) for span in layout.spans
        }
        self._kinds = [
            (device.type, span.number, own, layout.on_shift(rank), layout.head_sequences(rank))
            for rank, (device, span, own) in enumerate(
                zip(cost.devices, self._spans, layout.sequences_per_rank, strict=True)
            )
        ]
        kinds, total = {kind: self._kinds.index(kind) for kind in self._kinds}, layout.sequences_per_micro_batch
        hosted = cost.state_share(layout.schedule, 1)
        self._hosted = {kind[:2]: self._tables(rank, total, hosted) for kind, rank in kinds.items()}
        self._copied = {kind: self._tables(rank, kind[2], self._shares[kind[1]]) for kind, rank in kinds.items()}
        shares = np.array([self._probe.cost.expert_rows(1, layer, range(self.experts)) for layer in range(self.layers)])
        self.hottest = np.argsort(-shares, axis=1, kind="stable")
        self.target = self._counted(self._seconds)
        self._expected = self._counted(self._bytes)
        self.room = self._room()

    def _tables(self, rank: int, sequences: int, share: float) -> tuple[FloatArray, FloatArray]:
        """([layers, experts] seconds, bytes) of experts on the device of `rank`, on the rows of `sequences`; `share`:
        of their states that it holds. Zero in other pipeline stages."""
        seconds, size = np.zeros((2, self.layers, self.experts))
        for layer in self._spans[rank].layers:
            rows = self.cost.expert_rows(sequences, layer, range(self.experts))
            seconds[layer] = [self._seconds(rank, count, share) for count in rows]
            size[layer] = [self._bytes(rank, count, share) for count in rows]
        return seconds, size

    def _seconds(self, rank: int, rows: float, share: float) -> float:
        both = [Action(Kind.EXPERT, each, self._spans[rank].first) for each in (Pass.FORWARD, Pass.BACKWARD)]
        step = self.cost.optimizer_seconds(self.cost.of(rank), share * self.cost.model.expert_parameters)
        tasks = sum(self._probe.expert_seconds(rank, action, [rows]) for action in both)
        return tasks + step / self.layout.micro_batches

    def _bytes(self, rank: int, rows: float, share: float) -> float:
        weights, gradients, optimizer = STATE_BYTES[self.cost.train.precision]
        state = (weights + gradients + share * optimizer) * self.cost.model.expert_parameters
        schedule, alive = self._spans[rank].schedule, self.layout.windows_in_flight(rank)
        return state + alive * schedule.window * self.cost.expert_activation_bytes(self.cost.of(rank), rows, schedule)

    def _counted(self, of_rows: Callable[[int, float, float], float]) -> FloatArray:
        """[layers, ranks] what the layout's own counts take where every expert gets the mean rows.

        `of_rows(rank, rows, share)`: what one expert takes.
        """
        total, placements = self.layout.sequences_per_micro_batch, self.layout.placement
        hosted = np.array([[len(experts) for experts in placement.experts] for placement in placements])
        copied = np.array([len(placement.replicated) for placement in placements])[:, None] * self._attends
        hosted_share = self.cost.state_share(self.layout.schedule, 1)

        @cache
        def mean(kind: tuple[str, int, int, int, float]) -> tuple[float, float]:
            rank, rows = self._kinds.index(kind), self.cost.rows_per_expert
            return of_rows(rank, rows(total), hosted_share), of_rows(rank, rows(kind[2]), self._shares[kind[1]])

        of_hosted, of_copied = np.array([mean(kind) for kind in self._kinds]).T
        result: FloatArray = hosted * of_hosted + copied * of_copied
        return result

    def _room(self) -> FloatArray:
        """[ranks] bytes that experts may take together: the limit without what the layout needs for all else."""
        taken = sum(self.taken(layer, placement) for layer, placement in enumerate(self.layout.placement))
        room: FloatArray = taken - self.excess(self.layout)
        return room

    def hot_bytes(self) -> FloatArray:
        """[ranks] bytes that a rank's buffers and working set grow by where it gets the hottest expert of all."""
        total = self.layout.sequences_per_micro_batch
        each = np.array([self.cost.expert_rows(total, layer, range(self.experts)) for layer in range(self.layers)])
        result = np.zeros(self.world)
        for rank, sequences in enumerate(self.layout.sequences_per_rank):
            inside, schedule = each[self._spans[rank].layers], self._spans[rank].schedule
            hottest, share = float(inside.max()), float((inside.max(axis=1) / inside.sum(axis=1)).max())
            held = self._probe.assumed_rows(rank)
            most = max([*held.hosted, *held.replicated], default=0.0)
            device, task = self.cost.of(rank), self.cost.expert_task_bytes
            result[rank] = task(device, hottest) - task(device, most)
            more = max(0.0, share - held.largest_share)
            rows = more * self.experts * self.cost.rows_per_expert(total)
            result[rank] += rows * self.cost.activation_row_bytes(device)
            result[rank] += self.cost.buffer_bytes(total, sequences, more, schedule)
            result[rank] -= self.cost.buffer_bytes(total, sequences, 0.0, schedule)
        return result

    def seconds(self, layer: int) -> FloatArray:
        """[ranks, experts] seconds of a hosted expert."""
        return np.array([self._hosted[kind[:2]][0][layer] for kind in self._kinds])

    def size(self, layer: int) -> FloatArray:
        """[ranks, experts] bytes of a hosted expert."""
        return np.array([self._hosted[kind[:2]][1][layer] for kind in self._kinds])

    def copied(self, layer: int, experts: Sequence[int] | IntArray) -> tuple[FloatArray, FloatArray]:
        """[ranks] seconds and bytes of replicated experts, zero where a rank does not attend."""
        sums = [[self._copied[kind][table][layer, experts].sum() for kind in self._kinds] for table in (0, 1)]
        seconds, size = np.array(sums) * self._attends[layer]
        return seconds, size

    def taken(self, layer: int, placement: LayerPlacement) -> FloatArray:
        """[ranks] bytes of the experts of a layer."""
        size = self.size(layer)
        held = np.array([size[rank, experts].sum() for rank, experts in enumerate(placement.experts)])
        result: FloatArray = held + self.copied(layer, placement.replicated)[1]
        return result

    def excess(self, layout: Layout) -> FloatArray:
        """[ranks] bytes that `layout` takes above the limit."""
        layout_cost = LayoutCost(self.cost, layout)
        memory = [layout_cost.memory(rank) for rank in range(self.world)]
        return np.array([m.total_bytes - m.capacity_bytes * self.cost.train.memory_headroom for m in memory])

    @property
    def steady(self) -> bool:
        """Whether all layers (of a pipeline stage) have the same target."""
        return bool(np.allclose(self.target, self._mean_target, rtol=1e-9, atol=0.0))

    @property
    def _mean_target(self) -> FloatArray:
        """[layers, ranks] of each pipeline stage the mean over its layers."""
        result: FloatArray = self.inside * (self.target.sum(axis=0) / self.inside.sum(axis=0))
        return result

    @property
    def aims(self) -> list[Aim]:
        """Those that differ."""
        return [aim for aim in AIMS if not (aim.mean and self.steady)]

    def place(self, aim: Aim, exact: SolverOptions | None = None, spare: FloatArray | float = 0.0) -> Layout | None:
        """The layout with its experts placed by name; None where memory runs out on the way.

        `spare`: [ranks] bytes to leave free.
        """
        target = self._mean_target if aim.mean else self.target
        later, left, late = self._expected.sum(axis=0), self.room - spare, np.zeros(self.world)
        result = []
        for layer in range(self.layers):
            later = later - self._expected[layer]
            room = np.minimum(left, left - later + self.size(layer).max())  # a hot expert may borrow from later layers
            options = self._layer(layer, aim, late - target[layer], room, exact)
            best = min(options, key=lambda option: option[0], default=None)
            if best is None:
                return None
            _, placement, over = best
            left = left - self.taken(layer, placement)
            late = over if aim.carried else late
            result.append(placement)
        return self.layout.model_copy(update={"placement": result})

    def _layer(
        self, layer: int, aim: Aim, offset: FloatArray, room: FloatArray, exact: SolverOptions | None
    ) -> Iterator[tuple[float, LayerPlacement, FloatArray]]:
        """(seconds that it costs, placement, [ranks] seconds over the target) for every number of copies tried.

        More copies are tried as long as that helps.
        """
        given = self.layout.placement[layer]
        fewest, last = min(len(given.replicated) + aim.extra, self.experts), np.inf
        most = np.array([len(e) if aim.same_counts else self.experts for e in given.experts]) * self.inside[layer]
        attends, attending = self._attends[layer], self.layout.attending_at(layer)
        # an upper estimate: layers above the first reduce their copies' gradients during backward
        none, one = (self.cost.synchronise_seconds(self.layout.schedule, attending, n) for n in (0, 1))
        for count in range(fewest, min(fewest + MORE_COPIES * aim.more_copies, self.experts) + 1):
            copies, rest = self.hottest[layer, :count], np.sort(self.hottest[layer, count:])
            seconds, size = self.copied(layer, copies)
            if count and (size > room)[attends].any():
                continue
            work = LayerWork(
                self.seconds(layer)[:, rest], offset + seconds, self.size(layer)[:, rest], room - size, most
            )
            hosts = assign(work, exact)
            if hosts is None:
                continue
            if not aim.carried:
                hosts = self._spread(layer, hosts, rest, work, offset)
            peak = max(0.0, work.peak(hosts), float(work.offset[attends].max(initial=0.0)) if count else 0.0)
            cost = peak * self.layout.micro_batches + (one - none) * (count - fewest)
            yield cost, placement_of(rest, hosts, copies, self.world), work.ends(hosts)
            if cost >= last:
                break
            last = cost

    def _spread(self, layer: int, hosts: IntArray, experts: IntArray, work: LayerWork, offset: FloatArray) -> IntArray:
        """Over the NICs, by exchanging the experts of ranks that are alike."""
        nics = np.array([device.nic for device in self.cost.devices])
        if len(set(nics.tolist())) == self.world:
            return hosts
        rows = np.array(self.cost.expert_rows(1, layer, experts.tolist()))
        kinds = list(zip(self._kinds, offset.round(12).tolist(), work.most.tolist(), strict=True))
        return spread(hosts, rows, work.size[hosts, np.arange(len(hosts))], work.room, kinds, nics)


def placement_of(experts: IntArray, hosts: IntArray, copies: IntArray, world: int) -> LayerPlacement:
    """Experts in order of their numbers on the rank that `hosts` says."""
    return LayerPlacement(
        experts=[sorted(experts[hosts == rank].tolist()) for rank in range(world)], replicated=sorted(copies.tolist())
    )

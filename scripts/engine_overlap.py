"""How much of a run's communication the compute threads wait for, and how much slower they work meanwhile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from engine_replay import Key, Run, stage_seconds, under_way
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.schedule import Schedule, inputs
from hetermoe_cli.trace import Span, display_name

_OTHER = (Kind.SYNCHRONISE, Kind.OPTIMIZER)


@dataclass(frozen=True)
class Exposure:
    """Seconds of one iteration: of transfers (each counted once for every rank that needs what it brings), and those
    in which such a rank's compute thread does nothing but wait for one that is under way."""

    transfer_seconds: float
    exposed_seconds: float

    @property
    def hidden(self) -> float:
        """1 - sum of exposed / sum of all."""
        return 1 - self.exposed_seconds / self.transfer_seconds if self.transfer_seconds else 1.0


def exposure(run: Run, ranks: Sequence[int]) -> Exposure:
    """Means over the iterations, summed over `ranks`."""
    found = [_exposure(run.schedule, iteration.spans, run.cost.layout.layers, ranks) for iteration in run.iterations]
    count = len(found)
    return Exposure(sum(one[0] for one in found) / count, sum(one[1] for one in found) / count)


def _exposure(schedule: Schedule, spans: Mapping[Key, Span], layers: int, ranks: Sequence[int]) -> tuple[float, float]:
    total = exposed = 0.0
    for rank in ranks:
        idle_since = 0.0
        for action in schedule.compute[rank]:
            span = spans[display_name(action), rank]
            for transfer in awaited(schedule, action, layers, rank):
                start, end = under_way(schedule, transfer, spans)
                total += end - start
                exposed += max(0.0, min(span.start, end) - max(idle_since, start))
            idle_since = span.end
    return total, exposed


def awaited(schedule: Schedule, action: Action, layers: int, rank: int) -> list[Action]:
    """Transfers that a compute task on `rank` waits for; the end of synchronisation waits for all gradients."""
    if action.kind is Kind.SYNCHRONISE:
        sources = [transfer for transfer in schedule.transfers if transfer.kind is Kind.REDUCE]
    else:
        sources = [source for source in inputs(action, layers) if source.is_transfer]
    return [source for source in sources if rank in schedule.receivers.get(source, ())]


def loads(run: Run) -> list[float]:
    """Seconds of all stages (S and O left out) of every rank: medians of every stage over the iterations."""
    seconds = _stage_medians(run)
    return [
        sum(value for (_, where), value in seconds.items() if where == rank) for rank in range(run.schedule.world_size)
    ]


def stretch(overlapped: Run, alone: Run) -> float:
    """Seconds of all stages (S and O left out) of the run whose ranks work at the same time, over those of the run
    with the same stages one micro-batch after another, less one. Medians of every stage over the iterations."""
    first, second = (_stage_medians(run) for run in (overlapped, alone))
    return sum(first.values()) / sum(second[key] for key in first) - 1


def _stage_medians(run: Run) -> dict[Key, float]:
    each = [stage_seconds(run.schedule, iteration.spans) for iteration in run.iterations]
    names = [
        (display_name(action), rank)
        for rank, order in enumerate(run.schedule.compute)
        for action in order
        if action.kind not in _OTHER
    ]
    return {name: median(seconds[name] for seconds in each) for name in names}

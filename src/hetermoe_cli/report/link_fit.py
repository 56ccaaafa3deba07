"""Link fit: what the transfers of a run say about the link of a node (see calibration.py for what is honest)."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.profiler.refit import Sample
from hetermoe_cli.profiler.spread import relative_spread
from hetermoe_cli.report.run_tasks import CopyTasks
from hetermoe_cli.schedule.action import Action
from hetermoe_cli.schedule.schedule import is_of_all
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.trace import Span, display_name, lane_of

_FEWEST_TRANSFERS = 8
_SAME_TIME = 1e-9  # seconds; traces keep rounded ones


@dataclass(frozen=True)
class LinkFit:
    """A named link with its new latency. Seconds are medians of a transfer; `spread` is IQR / median of measured."""

    name: str
    transfers: int
    old: Link
    new: Link
    old_seconds: float
    measured_seconds: float
    spread: float


def fit_link(
    plan: Inputs, copies: Sequence[CopyTasks], costs: Sequence[Mapping[int, LayoutCost]]
) -> tuple[LinkFit | None, str]:
    """The fit and a line about it; None, and why, where the traces cannot tell. `costs`: of every copy, by step."""
    if len({device.node for device in plan.devices()}) > 1:
        return None, "links are kept: clocks of several nodes cannot be compared, so waiting cannot be told from moving"
    name = plan.cluster.nodes[0].interconnect
    if isinstance(name, Link):
        return None, "links are kept: the cluster file states this link in numbers, not by the name of a record"
    samples = list(_transfers(copies, costs))
    if len(samples) < _FEWEST_TRANSFERS:
        return None, f"links are kept: {len(samples)} transfers had their ports alone, {_FEWEST_TRANSFERS} are needed"
    old = plan.links[name]
    excess = median(sample.measured - sample.predicted for sample in samples)
    latency = round(max(old.latency_microseconds + 1e6 * excess, 0.0), 2)
    measured = [sample.measured for sample in samples]
    found = LinkFit(
        name=name,
        transfers=len(samples),
        old=old,
        new=old.model_copy(update={"latency_microseconds": latency}),
        old_seconds=median(sample.predicted for sample in samples),
        measured_seconds=median(measured),
        spread=relative_spread(measured),
    )
    return found, (
        f"link {name}: latency from {len(samples)} transfers that had their ports alone, from ready to last lane done; "
        "bandwidth and synchronisation are not fitted"
    )


Port = tuple[int, int]  # copy of the model, port of its devices


class _Window(NamedTuple):
    """A transfer of one step: from when it could start to its end; the ports it uses, and its predicted seconds."""

    start: float
    end: float
    ports: tuple[Port, ...]
    predicted: float


def _transfers(copies: Sequence[CopyTasks], costs: Sequence[Mapping[int, LayoutCost]]) -> Iterator[Sample]:
    """Transfers that moved rows or gradients and had their ports for themselves."""
    spans: list[dict[int, dict[tuple[str, int], Span]]] = [defaultdict(dict) for _ in copies]
    for own, copy in zip(spans, copies, strict=True):
        for span in copy.trace.spans:
            own[span.step][span.name, span.rank] = span
    layouts = [copy.layout for copy in copies]
    for step in copies[0].loads:
        found: dict[object, list[_Window]] = defaultdict(list)
        for number, (copy, own, cost) in enumerate(zip(copies, spans, costs, strict=True)):
            for action, window in _windows(number, copy, own[step], cost[step]):
                together = is_of_all(action, copy.layout, layouts)
                found[(action.kind, action.layer) if together else (number, action)].append(window)
        windows = sorted(map(_together, found.values()))
        overlapping = _overlapping(windows)
        for index, window in enumerate(windows):
            if index not in overlapping:
                yield Sample(0.0, window.predicted, window.end - window.start)


def _together(windows: Sequence[_Window]) -> _Window:
    """One transfer of several copies: it starts when all of them could."""
    ports = tuple(port for window in windows for port in window.ports)
    return _Window(max(w.start for w in windows), max(w.end for w in windows), ports, windows[0].predicted)


def _windows(
    number: int, copy: CopyTasks, spans: Mapping[tuple[str, int], Span], cost: LayoutCost
) -> Iterator[tuple[Action, _Window]]:
    """A copy's transfers by the simulator's own rule: one starts when its senders are ready and its lanes are free."""
    free: dict[tuple[str, int], float] = defaultdict(float)
    schedule = copy.schedule
    for action in schedule.transfers:
        name, lane = display_name(action), lane_of(action)
        ranks = {*schedule.senders[action], *schedule.receivers[action]}
        sources = [display_name(source) for source in schedule.sources(action, cost.layout.layers)]
        ready = [spans.get((source, rank)) for source in sources for rank in schedule.senders[action]]
        mine = [spans.get((name, rank)) for rank in ranks]
        start = max([free[lane, rank] for rank in ranks] + [span.end for span in ready if span])
        ends = [span.end for span in mine if span]
        if len(ends) < len(mine):
            continue  # a rank's trace is missing
        free.update({(lane, rank): max(ends) for rank in ranks})
        seconds, ports = cost.transfer(action)
        if seconds:
            yield action, _Window(start, max(ends), tuple((number, port) for port in ports), seconds)


def _overlapping(windows: Sequence[_Window]) -> set[int]:
    """Indices of windows, sorted by start, that overlap another one on a common port."""
    result: set[int] = set()
    last: dict[Port, tuple[float, int]] = {}  # by port: latest end so far, and whose it is
    for index, window in enumerate(windows):
        for port in window.ports:
            end, other = last.get(port, (window.start, index))
            if window.start < end - _SAME_TIME:
                result |= {index, other}
            last[port] = max((end, other), (window.end, index))
    return result

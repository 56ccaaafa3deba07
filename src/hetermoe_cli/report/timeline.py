"""Timeline: one iteration as a picture. A row group per rank; lanes for compute and for both directions of rows."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from hetermoe_cli.report.drawing import encoded, new_figure
from hetermoe_cli.report.tasks import CATEGORIES, OTHER, category, in_words, median_step
from hetermoe_cli.schedule.action import parse_action
from hetermoe_cli.trace import LANES, Span, Trace

MAX_RANKS = 16
COLOURS = {
    "attention forward": "#8fb8e8",
    "attention backward": "#2f6db5",
    "expert forward": "#f5b878",
    "expert backward": "#d9701e",
    "head": "#8e6bbf",
    "synchronise": "#7f7f7f",
    "optimizer": "#3f3f3f",
    "dispatch": "#3fa66b",
    "combine": "#d6569a",
    "gather": "#b8a02c",
    "between stages": "#2aa5a5",
    OTHER: "#c9c9c9",
}
_WIDTH_INCHES = 15.0
_ALWAYS = LANES[:4]  # the others where something is on them
_COMPUTE_TOP, _COMPUTE_HEIGHT = 0.06, 0.46  # of a rank's row, which is one high
_TRANSFERS_TOP, _TRANSFERS_HEIGHT = 0.54, 0.42  # all lanes of them together
_CHARACTER_INCHES = 0.055  # of the numbers in the bars


class _Place(NamedTuple):
    """Of a lane in a rank's row."""

    top: float
    height: float

    @property
    def middle(self) -> float:
        return self.top + self.height / 2


_Places = dict[str, _Place]
_COMPUTE = _Place(_COMPUTE_TOP, _COMPUTE_HEIGHT)


class Panel(NamedTuple):
    """One trace and where it comes from, in words: "simulated (modelled profiles)"."""

    trace: Trace
    origin: str


class _Bar(NamedTuple):
    """A span's rectangle in plot units: seconds and rows."""

    category: str
    name: str
    start: float
    seconds: float
    top: float
    height: float


def draw_timeline(panels: Sequence[Panel], labels: Sequence[str], title: str, file_format: str = "png") -> bytes:
    """The picture's bytes: one panel, or several (prediction above measurement) over one time axis.

    `labels[rank]` tells device type and role; `file_format` is png, svg or pdf. Of several steps the median one is
    drawn; of more than 16 ranks a subset that has every label, which the picture states. UserError without matplotlib.
    """
    panels = [Panel(median_step(panel.trace), panel.origin) for panel in panels]
    ranks = _drawn_ranks(labels)
    height = len(panels) * (0.55 + _row_inches(len(ranks)) * len(ranks)) + 1.3
    figure = new_figure(_WIDTH_INCHES, height)
    end = max(panel.trace.seconds for panel in panels) or 1.0
    axes, places = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], _places(panels)
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, ranks, labels, end, places)
        axis.set_title(_heading(panel, panels[0]), loc="left", fontsize=10)
    _time_axis(axes[-1], end)
    subset = f"; {len(ranks)} of {len(labels)} ranks drawn" * (len(ranks) < len(labels))
    figure.suptitle(title + subset, fontsize=11, fontweight="bold")
    _legend(figure, {category(span.name) for panel in panels for span in panel.trace.spans})
    return encoded(figure, file_format)


def _places(panels: Sequence[Panel]) -> _Places:
    """Compute in the upper half of a row, the lanes of transfers in equal parts of the rest."""
    used = {span.lane for panel in panels for span in panel.trace.spans}
    lanes = [lane for lane in LANES[1:] if lane in _ALWAYS or lane in used]
    pitch = _TRANSFERS_HEIGHT / len(lanes)
    tops = {lane: _Place(_TRANSFERS_TOP + pitch * number, 0.93 * pitch) for number, lane in enumerate(lanes)}
    return {LANES[0]: _COMPUTE, **tops}


def _drawn_ranks(labels: Sequence[str]) -> list[int]:
    """All ranks, or MAX_RANKS of them: the first of each label, then evenly from first to last."""
    world = len(labels)
    if world <= MAX_RANKS:
        return list(range(world))
    first = list({label: rank for rank, label in reversed(list(enumerate(labels)))}.values())
    spread = [round(index * (world - 1) / (MAX_RANKS - 1)) for index in range(MAX_RANKS)]
    return sorted(list(dict.fromkeys([*sorted(first), *spread]))[:MAX_RANKS])


def _heading(panel: Panel, first: Panel) -> str:
    text = f"{panel.origin}: {in_words(panel.trace.seconds)} an iteration"
    if panel is first or not first.trace.seconds:
        return text
    return f"{text} ({panel.trace.seconds / first.trace.seconds:.3f} times the one above)"


def _row_inches(ranks: int) -> float:
    return 0.8 if ranks <= 4 else 0.55 if ranks <= 8 else 0.45


def _draw_panel(
    axis: Any, panel: Panel, ranks: Sequence[int], labels: Sequence[str], end: float, places: _Places
) -> None:
    trace, seconds = panel.trace, panel.trace.seconds
    rows = {rank: row for row, rank in enumerate(ranks)}
    bars = list(_bars(trace.spans, rows, places))
    axis.set_xlim(0, end)
    axis.set_ylim(len(ranks), 0)
    for row in range(len(ranks)):
        axis.broken_barh([(0, seconds)], (row + _COMPUTE.top, _COMPUTE.height), facecolors="#efefef", zorder=0)
    inches_per_second = 0.84 * _WIDTH_INCHES / end
    _draw_bars(axis, bars, inches_per_second)
    _write_numbers(axis, bars, inches_per_second)
    axis.axvline(seconds, color="#444444", linewidth=0.8, linestyle="--")
    _name_rows(axis, ranks, labels, places)
    axis.spines[["top", "right", "left"]].set_visible(False)
    _write_busy_shares(axis, trace, ranks, len(labels))


def _name_rows(axis: Any, ranks: Sequence[int], labels: Sequence[str], places: _Places) -> None:
    def middles(lane: str) -> list[float]:
        return [row + places[lane].middle for row in range(len(ranks))]

    axis.set_yticks(middles(LANES[0]), [f"rank {rank}: {labels[rank]}" for rank in ranks], fontsize=8)
    axis.tick_params(axis="y", which="both", length=0)
    if _row_inches(len(ranks)) > 0.5:
        lanes = [lane for lane in places if lane != LANES[0]]
        names = [lane for lane in lanes for _ in ranks]
        ticks = [middle for lane in lanes for middle in middles(lane)]
        axis.set_yticks(ticks, names, minor=True, fontsize=6 if len(lanes) < 4 else 5, color="#555555")


def _bars(spans: Iterable[Span], rows: dict[int, int], places: _Places) -> Iterable[_Bar]:
    for span in spans:
        if span.rank in rows and span.end > span.start:
            place, seconds = places[span.lane], span.end - span.start
            yield _Bar(category(span.name), span.name, span.start, seconds, rows[span.rank] + place.top, place.height)


def _draw_bars(axis: Any, bars: Sequence[_Bar], inches_per_second: float) -> None:
    import numpy as np
    from matplotlib.collections import PolyCollection

    left, top = np.array([b.start for b in bars]), np.array([b.top for b in bars])
    right, bottom = left + [b.seconds for b in bars], top + [b.height for b in bars]
    corners: Any = np.stack([left, top, right, top, right, bottom, left, bottom], axis=1).reshape(-1, 4, 2)
    # A border would hide a bar of a few dots.
    borders = [0.5 if b.seconds * inches_per_second > 0.04 else 0.0 for b in bars]
    axis.add_collection(
        PolyCollection(
            corners, facecolors=[COLOURS[b.category] for b in bars], edgecolors="white", linewidths=borders, zorder=2
        )
    )


def _write_numbers(axis: Any, bars: Sequence[_Bar], inches_per_second: float) -> None:
    """`layer.micro-batch` in a layer's compute bars where all of a run fit, else the layer once for the run."""

    def fits(text: str, seconds: float) -> bool:
        return (len(text) + 0.5) * _CHARACTER_INCHES <= seconds * inches_per_second

    layered = sorted((b for b in bars if b.category.startswith(("attention", "expert"))), key=_place)
    for (_, kind, layer), group in itertools.groupby(layered, key=_run):
        run = list(group)
        colour = "white" if kind.endswith("backward") else "black"
        names = [f"{layer}.{parse_action(bar.name).micro_batch}" for bar in run]
        if all(fits(name, bar.seconds) for name, bar in zip(names, run, strict=True)):
            for name, bar in zip(names, run, strict=True):
                _write(axis, bar, name, colour)
            continue
        if fits(str(layer), run[-1].start + run[-1].seconds - run[0].start):
            _write(axis, run[(len(run) - 1) // 2], str(layer), colour)


def _place(bar: _Bar) -> tuple[float, float]:
    return bar.top, bar.start


def _run(bar: _Bar) -> tuple[float, str, int]:
    return bar.top, bar.category, parse_action(bar.name).layer


def _write(axis: Any, bar: _Bar, text: str, colour: str) -> None:
    place = (bar.start + bar.seconds / 2, bar.top + bar.height / 2)
    box = {"facecolor": COLOURS[bar.category], "edgecolor": "none", "pad": 0.8}  # readable beyond a narrow bar
    axis.text(*place, text, fontsize=6, color=colour, ha="center", va="center", zorder=3, bbox=box, in_layout=False)


def _write_busy_shares(axis: Any, trace: Trace, ranks: Sequence[int], world_size: int) -> None:
    shares = trace.busy_share(world_size)
    for row, rank in enumerate(ranks):
        axis.annotate(
            f"{shares[rank]:.0%} busy",
            (1.0, row + _COMPUTE.middle),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=7,
            va="center",
        )


def _time_axis(axis: Any, end: float) -> None:
    unit, scale = ("s", 1.0) if end >= 1 else ("ms", 1e3)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value * scale:g}")
    axis.set_xlabel(f"time since the start of the iteration [{unit}]", fontsize=9)


def _legend(figure: Any, used: set[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS[name], label=name) for name in CATEGORIES if name in used]
    handles.append(Patch(color="#efefef", label="waiting"))
    stages = ", to and from other pipeline stages" if "between stages" in used else ""
    note = (
        f"each rank: compute, rows to the experts, rows from the experts, collectives{stages}; "
        "in the bars: layer.micro-batch, or the layer"
    )
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, title=note, frameon=False
    )

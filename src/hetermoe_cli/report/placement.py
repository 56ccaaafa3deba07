"""Placement: who hosts how many experts of which layer, as a picture. A column per rank, a row per layer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.report.drawing import encoded, new_figure
from hetermoe_cli.report.tasks import head_of, ranges, shift_of
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Plan

COPIES = "#d9701e"  # marks of replicated experts
_NONE = "no attention"
_MOST_NAMED = 32  # ranks with a label each; of more, runs of equal ranks share one
_MOST_LABELS = 48
_WIDTH_INCHES, _HEIGHT_INCHES = 12.0, 12.0  # of the cells, at most
_CELL_INCHES = (0.55, 0.32)  # of one cell, at most
_TEXT_INCHES = (0.24, 0.15)  # of the smallest cell that carries its number


@dataclass(frozen=True)
class _Columns:
    """Ranks in drawing order: by type, then by rank; `sequences`: of each, in words."""

    ranks: list[int]
    types: list[str]
    sequences: list[str]

    def runs(self, key: Callable[[int], object]) -> Iterable[tuple[int, int]]:
        """(first, last) column of every run of columns with equal `key`."""
        for _, run in groupby(range(len(self.ranks)), key):
            columns = list(run)
            yield columns[0], columns[-1]


def draw_placement(plan: Plan, title: str, file_format: str = "png") -> bytes:
    """The picture's bytes; `file_format` is png, svg or pdf. UserError without matplotlib."""
    columns, (hosted, copies) = _columns(plan), _counts(plan)
    hosted, copies = hosted[:, columns.ranks], copies[:, columns.ranks]
    cell = (
        min(_CELL_INCHES[0], _WIDTH_INCHES / hosted.shape[1]),
        min(_CELL_INCHES[1], _HEIGHT_INCHES / hosted.shape[0]),
    )
    figure = new_figure(max(7.0, 2.2 + cell[0] * hosted.shape[1]), max(3.2, 2.2 + cell[1] * hosted.shape[0]))
    axis = figure.subplots()
    _draw_cells(figure, axis, hosted)
    _mark_stages(axis, plan)
    _mark_copies(axis, copies, cell)
    if cell[0] >= _TEXT_INCHES[0] and cell[1] >= _TEXT_INCHES[1]:
        _write_numbers(axis, hosted, copies)
    _name_columns(axis, columns)
    _name_layers(axis, hosted.shape[0])
    figure.suptitle(title, fontsize=10, fontweight="bold")
    return encoded(figure, file_format)


def _columns(plan: Plan) -> _Columns:
    order = plan.inputs.cluster.device_types
    devices = sorted(plan.inputs.devices(), key=lambda device: (order.index(device.type), device.rank))
    sequences = {
        rank: text
        for group in plan.groups
        for replica in group.replicas
        for rank, text in zip(replica, _attention(group.layout), strict=True)
    }
    ranks = [device.rank for device in devices]
    return _Columns(ranks, [device.type for device in devices], [sequences.get(rank, _NONE) for rank in ranks])


def _attention(layout: Layout) -> list[str]:
    """By rank: `2 sequences`, or `1 sequence in 2 of 8 micro-batches`; of a head that is apart its share."""
    found = []
    for rank, count in enumerate(layout.sequences_per_rank):
        own = [f"{count} sequence{'s' * (count != 1)}{shift_of(layout, rank)}"] if count else []
        found.append(", ".join([*own, *head_of(layout, rank)]) or _NONE)
    return found


def _counts(plan: Plan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[layers, ranks] hosted experts, and copies of replicated ones."""
    hosted = np.zeros((plan.inputs.model.layers, plan.inputs.cluster.world_size), dtype=np.int64)
    copies = np.zeros_like(hosted)
    for group in plan.groups:
        own = np.array([list(map(len, layer.experts)) for layer in group.placement])
        replicated = np.array([len(layer.replicated) for layer in group.placement])
        copied = np.zeros_like(own)
        for span in group.layout.spans:
            copied[np.ix_(span.layers, span.attending)] = replicated[span.layers][:, None]
        for ranks in group.replicas:
            hosted[:, ranks], copies[:, ranks] = own, copied
    return hosted, copies


def _draw_cells(figure: Any, axis: Any, hosted: NDArray[np.int64]) -> None:
    """Darker cells host more experts; white ones none."""
    most = max(1, int(hosted.max()))
    shown = np.ma.masked_equal(hosted, 0)
    image = axis.imshow(shown, cmap="Blues", vmin=0, vmax=1.25 * most, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, boundaries=np.arange(0.5, most + 1), fraction=0.04, pad=0.02)
    step = -(-most // 8)
    bar.set_ticks(range(1, most + 1, step))
    bar.set_label("experts of the layer hosted on the rank", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _mark_stages(axis: Any, plan: Plan) -> None:
    """A dashed line above the first layer of every pipeline stage but the first."""
    for first in sorted({span.first for group in plan.groups for span in group.layout.spans} - {0}):
        axis.axhline(first - 0.5, color="black", linewidth=0.8, linestyle="--")


def _mark_copies(axis: Any, copies: NDArray[np.int64], cell: tuple[float, float]) -> None:
    """A mark in the corner of every cell whose rank holds copies of replicated experts."""
    layers, columns = np.nonzero(copies)
    if not len(layers):
        return
    points = 72 * min(0.09, 0.45 * min(cell))
    label = "copies of replicated experts"
    axis.scatter(columns + 0.32, layers - 0.28, s=points**2, color=COPIES, linewidths=0, label=label)
    axis.figure.legend(loc="outside lower right", fontsize=7, frameon=False)


def _write_numbers(axis: Any, hosted: NDArray[np.int64], copies: NDArray[np.int64]) -> None:
    """`3`, or `3+2` with two copies."""
    dark = 0.6 * hosted.max()
    for (layer, column), count in np.ndenumerate(hosted):
        copied = copies[layer, column]
        if count or copied:
            text = f"{count}+{copied}" if copied else str(count)
            colour = "white" if count > dark else "black"
            axis.text(column, layer, text, ha="center", va="center", fontsize=6.5, color=colour)


def _name_columns(axis: Any, columns: _Columns) -> None:
    """Types above, ranks and their sequences below; lines between types, thin ones between unequal ranks."""
    world = len(columns.ranks)
    for first, last in columns.runs(lambda column: columns.types[column]):
        name = columns.types[first]
        axis.text((first + last) / 2, -0.6, f"{last - first + 1} {name}", ha="center", va="bottom", fontsize=8)
        if first:
            axis.axvline(first - 0.5, color="black", linewidth=1.2)
    runs = list(columns.runs(lambda c: c if world <= _MOST_NAMED else (columns.types[c], columns.sequences[c])))
    shown = runs[:: -(-len(runs) // _MOST_LABELS)]
    axis.set_xticks([(first + last) / 2 for first, last in shown], [_label(columns, *run) for run in shown])
    axis.tick_params(axis="x", rotation=90 if len(shown) > 4 else 0, labelsize=7, length=2)
    for first, _ in runs[1:] if world > _MOST_NAMED else []:
        axis.axvline(first - 0.5, color="#888888", linewidth=0.5)


def _label(columns: _Columns, first: int, last: int) -> str:
    return f"{ranges(columns.ranks[first : last + 1])}: {columns.sequences[first]}"


def _name_layers(axis: Any, layers: int) -> None:
    step = -(-layers // 32)
    axis.set_yticks(range(0, layers, step))
    axis.tick_params(axis="y", labelsize=7, length=2)
    axis.set_ylabel("layer", fontsize=8)
    axis.set_xlabel("rank: sequences it attends to per micro-batch", fontsize=8)

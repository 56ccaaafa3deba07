"""Pipelines before and after their layers are split, and side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hetermoe_cli.planner.pipeline_search.cost import Unit
from hetermoe_cli.planner.pipeline_search.run import Order
from hetermoe_cli.spec.schedule_choice import PassOrder
from hetermoe_cli.spec.train import Recompute


@dataclass(frozen=True)
class Setup:
    """Pipelines before their layers are split. `micro_batches`: of all pipelines together; `passes`: as of a
    schedule."""

    width: int
    stages: int
    pipelines: int
    micro_batches: int
    passes: PassOrder = "in_turn"

    @property
    def order(self) -> Order:
        """That of its tasks."""
        return "woven" if self.passes == "woven" else "1F1B"

    def __str__(self) -> str:
        width = f" of {self.width} devices" if self.width > 1 else ""
        return f"{self.pipelines} x {self.stages} stages{width}"


@dataclass(frozen=True)
class Tuned:
    """A setup with units, layers and recomputation of every stage, and the micro-batches of every pipeline."""

    setup: Setup
    order: Order
    units: list[list[Unit]]
    layers: list[list[int]]
    recompute: list[list[Recompute]]
    micro_batches: list[int]

    def __str__(self) -> str:
        splits = sorted({"-".join(map(str, layers)) for layers in self.layers})
        text = f"{self.order}, R = {max(self.micro_batches)}, {self.setup}, layers {' or '.join(splits)}"
        again = sorted({"-".join(recompute) for recompute in self.recompute})
        kept = {each for recompute in self.recompute for each in recompute} == {"none"}
        return text if kept else f"{text}, recomputation {' or '.join(again)}"


def spread(tuned: Tuned, ranks: Sequence[Sequence[int]]) -> Tuned:
    """What was tuned for a part of a cluster, side by side on equal parts of the whole: rank r is `ranks[part][r]`."""
    setup, parts = tuned.setup, len(ranks)
    whole = replace(setup, pipelines=parts * setup.pipelines, micro_batches=parts * setup.micro_batches)
    units = [[tuple(own[rank] for rank in unit) for unit in stages] for own in ranks for stages in tuned.units]
    return replace(
        tuned,
        setup=whole,
        units=units,
        layers=parts * tuned.layers,
        recompute=parts * tuned.recompute,
        micro_batches=parts * tuned.micro_batches,
    )

"""Runner-ups: layouts that lost, and the families they belong to."""

from collections.abc import Iterable
from dataclasses import dataclass

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.spec.layout import Layout


@dataclass(frozen=True)
class RunnerUp:
    """A layout, its replayed seconds and its family."""

    layout: Layout
    seconds: float
    family: str

    @classmethod
    def of(cls, cost: CostModel, layout: Layout, seconds: float) -> "RunnerUp":
        """With the family that the layout belongs to."""
        return cls(layout, seconds, family(cost, layout))


def family(cost: CostModel, layout: Layout) -> str:
    """Schedule, recomputation, and the types that attend: `zebra, recomputation of experts, A40 and some V100 attend`.

    Layouts of a family differ in R, window, sequences and placement.
    """
    order = layout.schedule.model_copy(update={"micro_batches": 1, "window": 1, "experts": "after"})
    recomputation = str(order).partition("R = 1")[2]
    shifts, head = ", some in shifts" if layout.shifts else "", ", head apart" if layout.head else ""
    return f"{layout.schedule.name}{recomputation}, {_attending(cost, layout)} attend{shifts}{head}"


def _attending(cost: CostModel, layout: Layout) -> str:
    names = []
    for name in cost.types:
        attends = [layout.sequences_per_rank[device.rank] > 0 for device in cost.devices if device.type == name]
        if any(attends):
            names.append(name if all(attends) else f"some {name}")
    return " and ".join(", ".join(names).rsplit(", ", 1))


def best_of_families(runner_ups: Iterable[RunnerUp]) -> list[RunnerUp]:
    """The fastest layout of each family, fastest first."""
    best: dict[str, RunnerUp] = {}
    for runner_up in sorted(runner_ups, key=lambda r: r.seconds):
        best.setdefault(runner_up.family, runner_up)
    return list(best.values())

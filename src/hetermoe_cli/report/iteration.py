"""Iteration: what one replayed iteration says of throughput, of every rank, and of the resource that decides."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetermoe_cli.report.tables import table
from hetermoe_cli.report.tasks import category, in_words, role
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.trace import Trace

if TYPE_CHECKING:
    from rich.console import Group

CROSSING, BETWEEN = "crossing", "between stages"  # a column where there are pipeline stages
COLUMNS = {
    "attention": ("attention forward", "attention backward"),
    "experts": ("expert forward", "expert backward"),
    "head": ("head",),
    "optimizer": ("optimizer",),
    "synchronise": ("synchronise",),
    "dispatch": ("dispatch",),
    "combine": ("combine",),
    "gather": ("gather",),
    CROSSING: (BETWEEN,),
}


@dataclass(frozen=True)
class RankRow:
    """One rank. `seconds` by category of task (report.tasks.CATEGORIES); transfers count on every participant."""

    rank: int
    device: str
    role: str
    busy_share: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class Critical:
    """The busiest lane of all ranks: speeding up anything else helps less. `share` is of the iteration."""

    rank: int
    device: str
    lane: str
    share: float


@dataclass(frozen=True)
class Iteration:
    """Figures of one iteration of a plan; `origin` says where they come from."""

    origin: str
    iteration_seconds: float
    tokens_per_second: float
    ranks: list[RankRow]
    critical: Critical


def profile_sources(inputs: Inputs) -> str:
    """Whether the profiles that the cluster needs are measured or modelled: "modelled profiles"."""
    sources = sorted({inputs.profiles[device].source for device in inputs.cluster.device_types})
    return " and ".join(sources) + " profiles"


def rank_labels(plan: Plan) -> list[str]:
    """Device type and role of every rank."""
    layout = plan.layout
    return [f"{device.type}, {role(layout, device.rank)}" for device in plan.inputs.devices()]


def summarise(plan: Plan, trace: Trace) -> Iteration:
    """Figures of a simulated trace of `plan`."""
    layout, devices = plan.layout, plan.inputs.devices()
    shares = trace.busy_share(layout.world_size)
    seconds: list[dict[str, float]] = [defaultdict(float) for _ in devices]
    lanes: dict[tuple[int, str], float] = defaultdict(float)
    for span in trace.spans:
        seconds[span.rank][category(span.name)] += span.end - span.start
        if category(span.name) != "synchronise":  # waiting for the network is no computing
            lanes[span.rank, span.lane] += span.end - span.start
    (rank, lane), longest = max(lanes.items(), key=lambda item: item[1])
    train = plan.inputs.train
    return Iteration(
        origin=f"{trace.origin} ({profile_sources(plan.inputs)})",
        iteration_seconds=trace.seconds,
        tokens_per_second=train.tokens / trace.seconds,
        ranks=[RankRow(d.rank, d.type, role(layout, d.rank), shares[d.rank], dict(seconds[d.rank])) for d in devices],
        critical=Critical(rank, devices[rank].type, lane, longest / trace.seconds),
    )


def render(iteration: Iteration, title: str) -> "Group":
    """Text and a table for a rich console."""
    from rich.console import Group

    critical = iteration.critical
    lines = [
        title,
        f"{iteration.origin}: {in_words(iteration.iteration_seconds)} an iteration, "
        f"{iteration.tokens_per_second:,.{0 if iteration.tokens_per_second >= 100 else 3}f} tokens/s",
        f"critical resource: rank {critical.rank} ({critical.device}), {critical.lane}: {critical.share:.1%} occupied",
    ]
    columns = [name for name in COLUMNS if name != CROSSING or any(BETWEEN in row.seconds for row in iteration.ranks)]
    rows = [_row(row, columns) for row in iteration.ranks]
    return Group(*lines, table("Seconds by rank", ["rank", "device", "role", "busy", *columns], rows, text_columns=3))


def _row(row: RankRow, columns: Sequence[str]) -> Sequence[str]:
    cells = [in_words(sum(row.seconds.get(name, 0.0) for name in COLUMNS[column])) for column in columns]
    return [str(row.rank), row.device, row.role, f"{row.busy_share:.1%}", *cells]

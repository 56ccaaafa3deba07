"""What all reports share: categories of tasks, seconds and ranks in words, roles, one step of several."""

from functools import cache

from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import Kind, Pass, parse_action
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.trace import Trace

_OF_LAYER = {
    (Kind.ATTENTION, Pass.FORWARD): "attention forward",
    (Kind.ATTENTION, Pass.BACKWARD): "attention backward",
    (Kind.EXPERT, Pass.FORWARD): "expert forward",
    (Kind.EXPERT, Pass.BACKWARD): "expert backward",
    (Kind.DISPATCH, Pass.FORWARD): "dispatch",
    (Kind.DISPATCH, Pass.BACKWARD): "dispatch",
    (Kind.COMBINE, Pass.FORWARD): "combine",
    (Kind.COMBINE, Pass.BACKWARD): "combine",
    (Kind.REDUCE, Pass.BACKWARD): "synchronise",
    (Kind.GATHER, Pass.FORWARD): "gather",
    (Kind.GATHER, Pass.BACKWARD): "gather",
    (Kind.PASS, Pass.FORWARD): "between stages",
    (Kind.PASS, Pass.BACKWARD): "between stages",
    (Kind.CROSS, Pass.FORWARD): "between stages",
    (Kind.CROSS, Pass.BACKWARD): "between stages",
}
OTHER = "other"
CATEGORIES = (
    "attention forward",
    "attention backward",
    "expert forward",
    "expert backward",
    "head",
    "synchronise",
    "optimizer",
    "dispatch",
    "combine",
    "gather",
    "between stages",
    OTHER,
)


@cache
def category(name: str) -> str:
    """Category of a span's name (see trace.display_name); "other" for names that no task has."""
    word = name.split(" ")[0]
    if word in CATEGORIES:
        return word
    try:
        action = parse_action(name)
    except UserError:
        return OTHER
    return _OF_LAYER.get((action.kind, action.direction), OTHER)


def role(layout: Layout, rank: int) -> str:
    """What a rank does: "attention", "experts", "attention + experts", "experts + 12 % of the head" or "unused"."""
    attends = layout.sequences_per_rank[rank] > 0
    hosts = any(layout.local_experts(layer, rank) for layer in range(layout.layers))
    return " + ".join(["attention"] * attends + ["experts"] * hosts + head_of(layout, rank)) or "unused"


def head_of(layout: Layout, rank: int) -> list[str]:
    """`12 % of the head`, of a rank that has a share of one that is apart."""
    return [f"{100 * layout.head_share(rank):.0f} % of the head"] if layout.head and layout.head[rank] else []


def shift_of(layout: Layout, rank: int) -> str:
    """` in 2 of 8 micro-batches`; nothing of a rank that attends in all of them, or never."""
    count, total = layout.on_shift(rank), layout.micro_batches
    return f" in {count} of {total} micro-batches" if 0 < count < total else ""


def order_of(layout: Layout) -> str:
    """How it runs: "3 pipeline stages, sequential, R = 8"."""
    stages = f"{len(layout.spans)} pipeline stages, " if len(layout.spans) > 1 else ""
    return f"{stages}{layout.schedule}"


def ranges(ranks: list[int]) -> str:
    """`0-5, 8`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def in_words(seconds: float) -> str:
    """Seconds with four digits and a unit that suits them; "-" for none."""
    if not seconds:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:#.4g}".rstrip(".") + f" {unit}"
    return f"{seconds * 1e6:.3g} µs"


def median_step(trace: Trace) -> Trace:
    """The one step whose iteration time is the median (the earlier of two in the middle)."""
    seconds = trace.step_seconds()
    if len(seconds) < 2:
        return trace
    middle = sorted(seconds, key=lambda step: (seconds[step], step))[(len(seconds) - 1) // 2]
    return Trace(trace.origin, [span for span in trace.spans if span.step == middle])

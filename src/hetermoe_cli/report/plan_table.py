"""The table that explains a plan: who does what, how fast, how near the bounds, how much better than the rivals."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from hetermoe_cli.report.groups import economy_lines, group_plan, groups_table, is_whole
from hetermoe_cli.report.plan_reasons import binding_lines, runner_ups_table, what_if_table
from hetermoe_cli.report.tasks import order_of, ranges, role, shift_of
from hetermoe_cli.spec.cluster import Device
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Plan

RIVAL_NAMES = {
    "ep": "EP",
    "dist_ep": "DistEP",
    "gather_squeeze": "gather and squeeze",
    "hetero_ep": "uneven EP",
    "ep_ideal": "EP (Ideal)",
    "ep_ideal_charged": "EP (Ideal), charged",
    "pp": "pipeline",
}


def print_plan(plan: Plan, console: Console) -> None:
    """Print the decision, one row per group of equal ranks, rivals, reasons, bounds and notes."""
    for line in [*headline(plan), *load_lines(plan)]:
        console.print(line, highlight=False, soft_wrap=True)
    if is_whole(plan):
        _print_devices(plan, console)
    else:
        console.print(groups_table(plan))
        for number in range(len(plan.groups)):
            console.print(f"group {number}, on its local ranks", highlight=False)
            _print_devices(group_plan(plan, number), console)
    if plan.baselines:
        console.print(rivals_table(plan))
    reasons = plan.explanation
    if reasons and reasons.runner_ups:
        console.print(runner_ups_table(reasons))
    if plan.what_if:
        console.print(what_if_table(plan))
    for line in [
        *economy_lines(plan),
        *(binding_lines(reasons) if reasons else []),
        *bounds_lines(plan),
        *(f"note: {note}" for note in plan.notes),
    ]:
        console.print(line, highlight=False, soft_wrap=True)


def _print_devices(plan: Plan, console: Console) -> None:
    """Stages of layers, where there are some, and rows of equal ranks of a plan with one group."""
    if line := pipeline_line(plan.layout):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(devices_table(plan))


def pipeline_line(layout: Layout) -> str:
    """`pipeline  2 stages: layers 0-15 on ranks 0-7, 16-31 on ranks 8-15`; nothing where there are no stages."""
    if not layout.pipeline:
        return ""
    parts = [
        f"{ranges(list(span.layers))} on ranks {ranges(list(span.ranks))}{layout.recomputation_of(span)}"
        for span in layout.spans
    ]
    return f"pipeline  {len(parts)} stage{'s' * (len(parts) > 1)}: layers {', '.join(parts)}"


def headline(plan: Plan) -> Iterator[str]:
    """Inputs, decision and predicted speed."""
    model, train, cluster = plan.inputs.model, plan.inputs.train, plan.inputs.cluster
    dense = f"{model.dense_layers} dense + " if model.dense_layers else ""
    yield (
        f"{model.name} ({dense}{model.layers} layers, {model.experts} experts, "
        f"{model.parameters / 1e9:.2f} B parameters) on {cluster.name}, "
        f"{train.global_batch_sequences} x {train.sequence_length} tokens, {train.precision}"
    )
    sources = [f"{name} {profile.source}" for name, profile in plan.inputs.profiles.items()]
    yield f"predicted, not measured; profiles: {', '.join(sources)}"
    yield (
        f"assignment {plan.assignment}, {_decision(plan)}: "
        f"{seconds_text(plan.predicted.iteration_seconds)} an iteration, "
        f"{plan.predicted.tokens_per_second:,.0f} tokens/s"
    )


def _decision(plan: Plan) -> str:
    """The schedule, or how many groups there are."""
    if is_whole(plan):
        return order_of(plan.layout)
    used = sum(len(group.replicas) * len(group.sequences_per_rank) for group in plan.groups)
    groups = f"{plan.group_count} groups" if plan.group_count > 1 else "1 group"
    return f"{groups} on {used} of {plan.inputs.cluster.world_size} devices"


def load_lines(plan: Plan) -> Iterator[str]:
    """The imbalance of every layer that the plan assumes, and what it costs; nothing for a balanced router."""
    if not (report := plan.load):
        return
    ratios = [f"{value:.2f}" for value in report.imbalance_per_layer]
    yield f"expert load, hottest over mean by layer: {', '.join(ratios)} (worst: layer {report.worst_layer})"
    numbered, balanced = report.numbered_iteration_seconds, report.balanced_iteration_seconds
    under = (
        f"{seconds_text(numbered)} ({numbered / plan.predicted.iteration_seconds:.2f}x)" if numbered else "does not fit"
    )
    if balanced:
        yield f"best plan for a balanced router: {seconds_text(balanced)} with one, {under} under this load"


def devices_table(plan: Plan) -> Table:
    """Ranks with the same device, part, load and memory share a row."""
    table = Table()
    for name in ("ranks", "device", "role", "sequences", "experts a layer", "busy", "memory GB"):
        table.add_column(name, justify="left" if name in ("device", "role") else "right")
    rows: dict[tuple[str, ...], list[int]] = {}
    layout = plan.layout
    for device in plan.inputs.devices():
        rows.setdefault(rank_row(plan, layout, device), []).append(device.rank)
    for row, ranks in rows.items():
        table.add_row(ranges(ranks), *row)
    return table


def rank_row(plan: Plan, layout: Layout, device: Device) -> tuple[str, ...]:
    """What a rank of the plan's `layout` does, as cells."""
    rank = device.rank
    sequences, memory = layout.sequences_per_rank[rank], plan.memory[rank]
    own = [layout.placement[layer] for layer in layout.span_of(rank).layers]
    counts = [len(layer.experts[rank]) for layer in own]
    copies = max(len(layer.replicated) for layer in own) if sequences else 0
    experts = spread_text(counts) + (f" + {copies} copies" if copies else "")
    return (
        device.type,
        role(layout, rank),
        f"{sequences}{shift_of(layout, rank)}",
        experts,
        f"{plan.predicted.busy_share_per_rank[rank]:.0%}",
        f"{memory.total_bytes / 1e9:.1f} of {memory.capacity_bytes / 1e9:.0f}",
    )


def spread_text(counts: list[int]) -> str:
    """`3`, or `2-4 (mean 3.1)` where layers differ."""
    if min(counts) == max(counts):
        return str(counts[0])
    return f"{min(counts)}-{max(counts)} (mean {sum(counts) / len(counts):.1f})"


def rivals_table(plan: Plan) -> Table:
    """Rival methods under the same cost model and batch."""
    table = Table()
    for name in ("rival", "iteration", "speed-up", "how"):
        table.add_column(name, justify="right" if name in ("iteration", "speed-up") else "left")
    for name, rival in plan.baselines.items():
        label = RIVAL_NAMES.get(name, name)
        if rival.iteration_seconds is None:
            table.add_row(label, "-", "-", rival.reason)
            continue
        how = str(rival.schedule or rival.reason)
        ratio = rival.iteration_seconds / plan.predicted.iteration_seconds
        table.add_row(label, seconds_text(rival.iteration_seconds), f"{ratio:.2f}x", how)
    return table


def bounds_lines(plan: Plan) -> Iterator[str]:
    """How near the plan is to what no plan can beat; of one with pipeline stages both bounds are one."""
    seconds, bound, solver = plan.predicted.iteration_seconds, plan.bound, plan.solver
    scope = {"devices": "exact over device-level placements", "classes": "over placements alike within a device class"}
    if not any(group.pipeline for group in plan.groups):
        without = {"shifts": any(group.shifts for group in plan.groups), "heads apart": bool(plan.groups[0].head)}
        left_out = " or ".join([name for name, found in without.items() if found])
        shifts = f", without {left_out}," if left_out else ""
        proven = scope.get(bound.exact_over, "search not finished")
        yield (
            f"lower bound in the default order of experts and transfers{shifts} "
            f"{seconds_text(bound.iteration_seconds)}: gap {plan.gap:.2%} ({proven})"
        )
    work_gap = max(0.0, 1 - bound.work_iteration_seconds / seconds)
    yield f"perfectly divisible work {seconds_text(bound.work_iteration_seconds)}: gap {work_gap:.1%}"
    yield (
        f"solver {solver.name}: {solver.status}, {solver.candidates} candidates, {solver.solved} solved, "
        f"{solver.seconds:.1f} s"
    )


def seconds_text(seconds: float) -> str:
    """Seconds with a readable unit."""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"

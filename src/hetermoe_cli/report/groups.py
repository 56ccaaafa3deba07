"""Plans of several groups, seen one group at a time: its own plan, its costs among the others, tables and traces."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from hetermoe_cli.errors import UserError
from hetermoe_cli.planner.cluster.parts import group_inputs
from hetermoe_cli.planner.cluster.replayed import Replayed, replay_groups
from hetermoe_cli.report.tasks import ranges
from hetermoe_cli.spec.plan import Group, Plan, Prediction, ranks_in
from hetermoe_cli.trace import Span, Trace


def is_whole(plan: Plan) -> bool:
    """Whether one group holds all devices: then the plan is its own only group."""
    return plan.group_count == 1 and len(plan.groups[0].replicas[0]) == plan.inputs.cluster.world_size


def replay_plan(plan: Plan) -> Replayed:
    """All groups of a plan, replayed."""
    return replay_groups(plan.inputs, plan.groups)


def group_plan(plan: Plan, number: int) -> Plan:
    """Group `number` as a plan of its own: local ranks, its devices, its share of the batch. UserError if none such."""
    if not 0 <= number < len(plan.groups):
        raise UserError(f"--group {number}: the plan has groups 0 to {len(plan.groups) - 1}")
    group = plan.groups[number]
    ranks, world = group.replicas[0], len(group.sequences_per_rank)
    inputs, train = group_inputs(plan.inputs, ranks, group.sequences), plan.inputs.train
    predicted = Prediction(
        iteration_seconds=plan.predicted.iteration_seconds,
        tokens_per_second=group.sequences * train.sequence_length / plan.predicted.iteration_seconds,
        busy_share_per_rank=[plan.predicted.busy_share_per_rank[rank] for rank in ranks],
    )
    changes = {
        "inputs": inputs,
        "inputs_sha256": inputs.hashes(),
        "groups": [Group.of(group.layout, [list(range(world))])],
        "memory": [plan.memory[rank] for rank in ranks],
        "predicted": predicted,
    }
    return plan.model_copy(update=changes)


def merged(plan: Plan, traces: Sequence[Trace]) -> Trace:
    """One trace of the cluster's ranks from a trace of every layout; equal groups run the same."""
    spans: list[Span] = []
    for group, trace in zip(plan.groups, traces, strict=True):
        for ranks in group.replicas:
            spans += [span._replace(rank=ranks[span.rank]) for span in trace.spans]
    return Trace("simulated", spans)


def groups_table(plan: Plan) -> Table:
    """One row per layout: how many groups run it, on what, with what share of the batch."""
    table = Table()
    for name in ("group", "copies", "devices", "schedule", "sequences each", "ranks"):
        table.add_column(name, justify="left" if name in ("devices", "schedule", "ranks") else "right")
    for number, group in enumerate(plan.groups):
        table.add_row(
            str(number),
            str(len(group.replicas)),
            devices_text(plan, group.replicas[0]),
            str(group.schedule),
            str(group.sequences),
            ranges(ranks_in([group])),
        )
    return table


def devices_text(plan: Plan, ranks: Sequence[int]) -> str:
    """`8 L40S + 16 T4`."""
    types = [node.device for node in plan.inputs.cluster.nodes]
    kinds = plan.inputs.cluster.group_of_rank
    names = [types[kinds[rank]] for rank in ranks]
    return " + ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def economy_lines(plan: Plan) -> Iterator[str]:
    """What the plan's devices cost, where prices are known."""
    if economy := plan.economy:
        yield (
            f"devices in use cost {economy.dollars_per_hour:,.2f} dollars an hour: {economy.tokens_per_dollar:,.0f} "
            f"tokens a dollar (no plan on these types has more than {economy.most_tokens_per_dollar:,.0f})"
        )

"""A lower bound on any grouping: the work bound's linear program with memory and NICs added.

Per node group: sequences attended to and rows computed, perfectly divisible, at the best sizes. Of the rows that a node
attends to it computes at most the share of all experts that its memory holds (the router is balanced, and each group
has all experts of every layer). Every other row crosses the NICs four times: towards its expert and back, forward and
backward. A NIC direction carries one message at a time, so that the bytes out of a node group's NICs take no less than
their sum over all its NICs' bandwidth; node groups of one machine are one here, as rows between them cross no NIC.
Activations, latencies, pipelines and synchronisation are left out.
"""

from collections.abc import Sequence

import pulp

from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.bounds.work import rows_of, type_speeds, work_bound
from hetermoe_cli.planner.solver import SolverOptions, solve_problem
from hetermoe_cli.spec.cluster import NodeGroup

SECONDS = 5.0  # for the linear program; it takes milliseconds
SAFE = 1 - 1e-6  # the solver's tolerance must not lift the bound


def groups_bound(cost: CostModel, limit: int) -> float:
    """Seconds below which no groups on the cluster's devices can finish; the work bound under a given expert load."""
    work = work_bound(cost, limit)
    if cost.shares is not None:
        return work
    nodes, speeds, batch = cost.inputs.cluster.nodes, type_speeds(cost, limit), cost.train.global_batch_sequences
    rows = rows_of(cost)
    problem = pulp.LpProblem("groups", pulp.LpMinimize)
    time = problem.add_variable("time", 0)  # in work bounds
    attended = [problem.add_variable(f"a{k}", 0) for k in range(len(nodes))]  # shares of the batch
    computed = [problem.add_variable(f"c{k}", 0) for k in range(len(nodes))]  # shares of the rows
    problem.setObjective(time)
    problem.addConstraint(pulp.lpSum(attended) == 1)
    problem.addConstraint(pulp.lpSum(computed) == 1)
    for node, a, c in zip(nodes, attended, computed, strict=True):
        speed, devices = speeds[node.device], node.count * node.devices
        busy = a * (speed.sequence * batch / (devices * work)) + c * (speed.row * rows / (devices * work))
        problem.addConstraint(busy <= time)
    bandwidths = _bandwidths(cost)
    for kinds in _kinds_of_nodes(nodes):
        a, c = (pulp.lpSum(shares[kind] for kind in kinds) for shares in (attended, computed))
        moved = 2 * rows * cost.least_row_bytes / (sum(bandwidths[kind] for kind in kinds) * work)
        kept = _kept(cost, [nodes[kind] for kind in kinds])
        problem.addConstraint((a * (1 - 2 * kept) + c) * moved <= time)
        problem.addConstraint((a - c) * moved <= time)
    run = solve_problem(problem, SolverOptions(time_limit=SECONDS))
    return max(work, run.objective * work * SAFE) if run.status == "optimal" else work


def _kinds_of_nodes(nodes: Sequence[NodeGroup]) -> list[list[int]]:
    """Numbers of the node groups whose devices share nodes: those of one machine, of all others each alone."""
    found: dict[object, list[int]] = {}
    for kind, node in enumerate(nodes):
        found.setdefault(node.machine or kind, []).append(kind)
    return list(found.values())


def _bandwidths(cost: CostModel) -> list[float]:
    """Bytes a second out of all NICs of each node group."""
    cluster, result = cost.inputs.cluster, []
    for kind, node in enumerate(cluster.nodes):
        link = cost.devices[cluster.group_of_rank.index(kind)].network
        result.append(node.count * node.nics * link.bandwidth_gigabytes_per_second * 1e9)
    return result


def _kept(cost: CostModel, node: Sequence[NodeGroup]) -> float:
    """The largest share of all experts that the memory of one node with these devices holds.

    An expert's optimizer states may be shared out over all devices but where the training spec keeps them whole.
    """
    room = 0.0
    for part in node:
        device = cost.types[part.device]
        each = device.memory_bytes * cost.train.memory_headroom - device.framework_bytes
        room += part.devices * max(0.0, each)
    weights, gradients, optimizer = STATE_BYTES[cost.train.precision]
    holders = 1 if cost.train.dense_state == "replicated" else len(cost.devices)
    state = cost.model.expert_parameters * (weights + gradients + optimizer / holders)
    return min(1.0, room / (state * cost.model.layers * cost.model.experts))

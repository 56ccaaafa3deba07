"""A lower bound on any grouping: the work bound's linear program with memory and NICs added.

Per node group: sequences attended to and rows computed, perfectly divisible, at the best sizes. Of the rows that a node
(of one or several node groups: a machine) attends to it computes at most the share of all experts that its memory holds
(the router is balanced, and each group has all experts of every layer). Every other row crosses the NICs four times:
towards its expert and back, forward and backward. A NIC direction carries one message at a time, so that the bytes out
of a node group's or machine's NICs take no less than their sum over all its NICs' bandwidth. Activations, latencies,
pipelines and synchronisation are left out.
"""

from collections import defaultdict
from collections.abc import Sequence

import pulp

from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.solver import SolverOptions, solve_problem
from hetermoe_cli.planner.work import rows_of, type_speeds, work_bound
from hetermoe_cli.spec.cluster import ClusterSpec, NodeGroup

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
    for members in _machines(cost.inputs.cluster):
        a, c = (pulp.lpSum(shares[k] for k in members) for shares in (attended, computed))
        moved = 2 * rows * cost.row_bytes / (_bandwidth(cost, members) * work)
        problem.addConstraint((a * (1 - 2 * _kept(cost, [nodes[k] for k in members])) + c) * moved <= time)
        problem.addConstraint((a - c) * moved <= time)
    run = solve_problem(problem, SolverOptions(time_limit=SECONDS))
    return max(work, run.objective * work * SAFE) if run.status == "optimal" else work


def _machines(cluster: ClusterSpec) -> list[list[int]]:
    """The node groups of every machine; others alone."""
    found: dict[object, list[int]] = defaultdict(list)
    for number, node in enumerate(cluster.nodes):
        found[node.machine or number].append(number)
    return list(found.values())


def _bandwidth(cost: CostModel, members: Sequence[int]) -> float:
    """Bytes a second of all NICs of some node groups."""
    group_of_rank = cost.inputs.cluster.group_of_rank
    links = {d.nic: d.network for d in cost.devices if group_of_rank[d.rank] in members}
    return sum(link.bandwidth_gigabytes_per_second for link in links.values()) * 1e9


def _kept(cost: CostModel, nodes: Sequence[NodeGroup]) -> float:
    """The largest share of all experts that the memory of one node, of these node groups, holds.

    Masters and moments may be shared out, among all devices at most.
    """
    types, train = cost.types, cost.train
    rooms = [(types[n.device].memory_bytes * train.memory_headroom - types[n.device].framework_bytes) for n in nodes]
    room = sum(node.devices * max(0.0, each) for node, each in zip(nodes, rooms, strict=True))
    weights, gradients, optimizer = STATE_BYTES[train.precision]
    state = weights + gradients + optimizer / (1 if train.dense_state == "replicated" else len(cost.devices))
    return min(1.0, room / (cost.model.expert_parameters * state * cost.model.layers * cost.model.experts))

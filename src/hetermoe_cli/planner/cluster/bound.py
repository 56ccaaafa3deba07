"""A lower bound on any grouping: the work bound's linear program with memory and NICs added.

Per node group: sequences attended to and rows computed, perfectly divisible, at the best sizes. Of the rows that a node
attends to it computes at most the share of all experts that its memory holds (the router is balanced, and each group
has all experts of every layer). Every other row crosses the NICs four times: towards its expert and back, forward and
backward. A NIC direction carries one message at a time, so that the bytes out of a node group's NICs take no less than
their sum over all its NICs' bandwidth. Activations, latencies, pipelines and synchronisation are left out.
"""

import pulp

from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.solver import SolverOptions, solve_problem
from hetermoe_cli.planner.work import rows_of, type_speeds, work_bound
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
    first = 0
    for node, a, c in zip(nodes, attended, computed, strict=True):
        speed, devices = speeds[node.device], node.count * node.devices
        busy = a * (speed.sequence * batch / (devices * work)) + c * (speed.row * rows / (devices * work))
        problem.addConstraint(busy <= time)
        link = cost.devices[first].network
        bandwidth = node.count * node.nics * link.bandwidth_gigabytes_per_second * 1e9
        moved = 2 * rows * cost.row_bytes / (bandwidth * work)
        problem.addConstraint((a * (1 - 2 * _kept(cost, node)) + c) * moved <= time)
        problem.addConstraint((a - c) * moved <= time)
        first += devices
    run = solve_problem(problem, SolverOptions(time_limit=SECONDS))
    return max(work, run.objective * work * SAFE) if run.status == "optimal" else work


def _kept(cost: CostModel, node: NodeGroup) -> float:
    """The largest share of all experts that one node's memory holds."""
    device = cost.types[node.device]
    room = node.devices * (device.memory_bytes * cost.train.memory_headroom - device.framework_bytes)
    state = cost.model.expert_parameters * sum(STATE_BYTES[cost.train.precision])
    return min(1.0, max(0.0, room) / (state * cost.model.layers * cost.model.experts))

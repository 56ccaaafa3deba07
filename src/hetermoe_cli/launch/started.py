"""The devices that a plan uses, as a cluster of their own: a worker is started for each of these and no other."""

from hetermoe_cli.planner.cluster.parts import part_of
from hetermoe_cli.spec.plan import Group, Plan


def started_plan(plan: Plan) -> Plan:
    """The plan on the ranks that are in its groups, renumbered in their order; as it is where that are all of them.

    Its inputs are those of the smaller cluster, and know which devices of the whole one these are. UserError where
    that cannot be described (spec.cluster.subcluster).
    """
    ranks = plan.used_ranks
    if len(ranks) == plan.inputs.cluster.world_size:
        return plan
    place = {rank: number for number, rank in enumerate(ranks)}
    inputs = part_of(plan.inputs, ranks)
    busy = plan.predicted.busy_share_per_rank
    changes = {
        "inputs": inputs,
        "inputs_sha256": inputs.hashes(),
        "groups": [
            Group.of(g.layout, [[place[rank] for rank in replica] for replica in g.replicas]) for g in plan.groups
        ],
        "memory": [plan.memory[rank] for rank in ranks],
        "predicted": plan.predicted.model_copy(update={"busy_share_per_rank": [busy[rank] for rank in ranks]}),
    }
    return plan.model_copy(update=changes)

"""A plan for what is left of a plan's devices once some of its nodes are gone."""

from collections.abc import Collection

from hetermoe_cli.planner.cluster.objective import Wanted
from hetermoe_cli.planner.cluster.parts import part_of
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.plan import Plan

SHORTEST, LONGEST = 3.5, 60.0  # seconds of search: training waits for it


def without_nodes(plan: Plan, lost: Collection[int]) -> Plan:
    """The same training on the devices of all nodes but `lost`, which are numbered as in `plan.inputs.nodes`.

    Planned like `plan`, in about the time that its own search took; a plan made by hand or by a rival's method is
    followed by the best one. The nodes keep their numbers in the cluster file. UserError where nothing fits.
    """
    inputs = plan.inputs
    ranks = [rank for node, ranks in enumerate(inputs.nodes) if node not in lost for rank in ranks]
    solver = SolverOptions(time_limit=min(max(plan.solver.seconds, SHORTEST), LONGEST))
    found = make_plan(
        part_of(inputs, ranks), PlanOptions(solver=solver, wanted=Wanted(plan.objective, None, plan.max_groups))
    )
    names = [inputs.whole.cluster.node_names[inputs.node_numbers[node]] for node in sorted(lost)]
    return found.model_copy(update={"notes": [f"planned again without {', '.join(names)}", *found.notes]})

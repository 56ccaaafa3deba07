"""Plans for what is left of a cluster."""

import pytest

from builders import make_inputs, make_layout, make_plan
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.started import started_plan
from hetermoe_cli.planner.replan import without_nodes
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.plan import Plan

NODES = [("new", 2), ("old", 1), ("new", 1)]


def plan_of_three() -> Plan:
    return make_plan(make_inputs(NODES, global_batch_sequences=4, nics=2), make_layout((1, 1, 0, 0), (2, 0, 2, 0)))


def test_the_rest_trains_the_same_and_knows_its_places() -> None:
    plan = plan_of_three()
    found = without_nodes(plan, [1])
    assert found.notes[0] == "planned again without node1"
    assert [device.type for device in found.inputs.devices()] == ["new", "new", "new"]
    assert (found.inputs.node_numbers, found.inputs.whole.cluster) == ([0, 2], plan.inputs.cluster)
    assert found.inputs.train == plan.inputs.train
    found.verify("plan")
    Plan.model_validate(found.model_dump())


def test_nodes_go_one_after_another_and_plans_leave_devices_out() -> None:
    plan = plan_of_three()
    found = without_nodes(without_nodes(plan, [0]), [0])
    assert (found.inputs.node_numbers, found.inputs.origin.ranks) == ([2], [3])  # type: ignore[union-attr]
    pair = without_nodes(plan, [1])
    alone = make_layout((4,), (4,))
    group = pair.groups[0].model_validate(
        {**alone.model_dump(), "replicas": [[2]], "sequences_per_rank": alone.sequences_per_rank}
    )
    started = started_plan(pair.model_copy(update={"groups": [group]}))
    assert (started.inputs.node_numbers, started.inputs.origin.ranks) == ([2], [3])  # type: ignore[union-attr]
    written = Inputs.model_validate(started.inputs.model_dump())
    assert written.whole.cluster == plan.inputs.cluster


def test_nothing_that_fits_is_told() -> None:
    plan = plan_of_three()
    small = {
        name: p.model_copy(update={"memory_bytes": p.framework_bytes + 1}) for name, p in plan.inputs.profiles.items()
    }
    with pytest.raises(UserError, match="does not fit") as caught:
        without_nodes(plan.model_copy(update={"inputs": plan.inputs.model_copy(update={"profiles": small})}), [2])
    assert caught.value.code is ExitCode.DOES_NOT_FIT

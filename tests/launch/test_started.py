"""The plan that runs is one of the devices in use."""

import pytest

from builders import make_inputs, make_layout, make_plan
from hetermoe_cli.errors import UserError
from hetermoe_cli.launch.started import started_plan
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.plan import Group, Plan

LAYOUT = make_layout((1, 0), (0, 4), micro_batches=2)


def plan_on(*replicas: list[int]) -> Plan:
    inputs = make_inputs([("new", 2), ("old", 2), ("new", 2)], global_batch_sequences=2 * len(replicas), nics=2)
    whole = make_plan(inputs, make_layout((len(replicas), 0, 0, 0, 0, 0), (4, 0, 0, 0, 0, 0)))
    memory = [m.model_copy(update={"weights_bytes": rank}) for rank, m in enumerate(whole.memory)]
    changes = {"groups": [Group.of(LAYOUT, list(replicas))], "memory": memory}
    return Plan.model_validate(whole.model_copy(update=changes).model_dump())


def test_a_plan_on_all_devices_is_as_it_is() -> None:
    plan = make_plan(make_inputs([("new", 2)], global_batch_sequences=2), LAYOUT)
    assert started_plan(plan) is plan


def test_ranks_are_renumbered_and_devices_dropped() -> None:
    plan = plan_on([0, 1], [4, 5])
    started = started_plan(plan)
    assert started.groups[0].replicas == [[0, 1], [2, 3]]
    assert [device.type for device in started.inputs.devices()] == ["new"] * 4
    assert [memory.weights_bytes for memory in started.memory] == [0, 1, 4, 5]
    assert started.inputs.train == plan.inputs.train
    started.verify("plan")
    assert started.world.size == 4
    Plan.model_validate(started.model_dump())


def test_devices_and_nodes_keep_their_places_in_the_cluster_file() -> None:
    part = started_plan(plan_on([0, 1]))
    assert (part.inputs.node_numbers, part.inputs.whole) == ([0], plan_on([0, 1]).inputs)
    apart = started_plan(plan_on([1, 5])).inputs
    assert [apart.device_index(rank) for rank in range(2)] == [1, 1]
    assert apart.node_numbers == [0, 2]


def test_of_a_mixed_node_the_cards_in_use_are_taken() -> None:
    plan = plan_on([2, 3])
    nodes = [node.model_copy(update={"machine": "box"}) for node in plan.inputs.cluster.nodes]
    inputs = plan.inputs.model_copy(update={"cluster": plan.inputs.cluster.model_copy(update={"nodes": nodes})})
    started = started_plan(plan.model_copy(update={"inputs": inputs})).inputs
    assert [started.device_index(rank) for rank in range(2)] == [2, 3]
    written = Inputs.model_validate(started.model_dump())  # as a worker reads it
    assert [written.device_index(rank) for rank in range(2)] == [2, 3]
    assert written.node_numbers == [0]


def test_what_needs_all_devices_says_so() -> None:
    with pytest.raises(UserError, match="field groups: devices of the cluster are left out, this works on all"):
        plan_on([0, 1]).layout  # noqa: B018
    assert started_plan(plan_on([0, 1])).layout == LAYOUT

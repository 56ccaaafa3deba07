"""Which machines a plan may run on: one node, whose CPU and GPUs a cluster names apart."""

import pytest

from builders import make_inputs, make_layout, make_plan, make_profile
from hetermoe_cli.errors import UserError
from hetermoe_cli.launch.preflight import check_devices
from hetermoe_cli.spec.plan import Inputs, Plan


def mixed(*nodes: tuple[str, int]) -> Inputs:
    """A "card" is a CUDA device, "core" a CPU; both measured, on products that are not named."""
    profiles = {
        name: make_profile(name, source="measured").model_copy(update={"accelerator": accelerator})
        for name, accelerator in (("card", "cuda"), ("core", "cpu"))
        if name in dict(nodes)
    }
    return make_inputs(nodes, profiles=profiles)


def plan_of(inputs: Inputs) -> Plan:
    world = len(inputs.devices())
    return make_plan(inputs, make_layout((1,) + (0,) * (world - 1), (0,) * (world - 1) + (4,)))


def test_cards_and_cores_are_counted_apart() -> None:
    inputs = mixed(("card", 2), ("core", 2))
    assert inputs.accelerators() == ["cuda", "cuda", "cpu", "cpu"]
    assert [inputs.device_index(rank) for rank in range(4)] == [0, 1, 0, 1]


def test_a_card_and_a_core_of_one_machine_may_train_together() -> None:
    check_devices(plan_of(mixed(("card", 1), ("core", 1))))


def test_two_nodes_of_one_kind_are_two_machines() -> None:
    with pytest.raises(UserError, match="field nodes: 2 nodes; workers start on one machine only"):
        check_devices(plan_of(mixed(("core", 1), ("core", 1))))


def test_two_types_of_one_machine_may_train_together() -> None:
    inputs = mixed(("core", 1), ("card", 2))
    core, card = (inputs.profiles[name].model_copy(update={"accelerator": "cpu"}) for name in ("core", "card"))
    nodes = [node.model_copy(update={"machine": "box"}) for node in inputs.cluster.nodes]
    cluster = inputs.cluster.model_copy(update={"nodes": nodes})
    inputs = inputs.model_copy(update={"cluster": cluster, "profiles": {"core": core, "card": card}})
    assert [inputs.device_index(rank) for rank in range(3)] == [0, 1, 2]
    check_devices(plan_of(inputs))


def test_another_product_is_refused() -> None:
    inputs = mixed(("card", 1), ("core", 1))
    core = inputs.profiles["core"]
    other = core.model_copy(update={"facts": core.facts.model_copy(update={"product": "Abacus 3000"})})
    inputs = inputs.model_copy(update={"profiles": inputs.profiles | {"core": other}})
    with pytest.raises(UserError, match="measured on 'Abacus 3000', this machine's device 0 is"):
        check_devices(plan_of(inputs))

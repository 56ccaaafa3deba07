"""Which machines a plan may run on."""

import pytest

from builders import make_inputs, make_layout, make_plan, make_profile
from hetermoe_cli.errors import UserError
from hetermoe_cli.launch import preflight
from hetermoe_cli.launch.preflight import check_devices, check_nodes, check_one_node
from hetermoe_cli.launch.started import started_plan
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.plan import Group, Plan
from hetermoe_cli.spec.profile import DeviceFacts


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


def test_a_node_is_checked_for_its_own_devices_only() -> None:
    inputs = mixed(("core", 1), ("card", 1))
    card = inputs.profiles["card"]
    other = card.model_copy(update={"facts": card.facts.model_copy(update={"product": "Abacus 3000"})})
    plan = plan_of(inputs.model_copy(update={"profiles": inputs.profiles | {"card": other}}))
    check_devices(plan, 0)
    with pytest.raises(UserError, match="measured on 'Abacus 3000', this machine's device 0 is"):
        check_devices(plan, 1)


def test_the_check_looks_at_the_devices_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = mixed(("card", 2), ("core", 2))
    machine = [node.model_copy(update={"machine": "box"}) for node in inputs.cluster.nodes]
    cards = {name: p.model_copy(update={"accelerator": "cuda"}) for name, p in inputs.profiles.items()}
    cluster = inputs.cluster.model_copy(update={"nodes": machine})
    plan = plan_of(inputs.model_copy(update={"cluster": cluster, "profiles": cards}))
    part = plan.model_copy(update={"groups": [Group.of(make_layout((1, 0), (0, 4)), [[2, 3]])]})
    asked: list[int] = []
    monkeypatch.setattr(preflight, "_product", lambda accelerator, index: asked.append(index))
    check_devices(started_plan(part))
    assert asked == [2, 3]


def test_devices_are_named_as_workers_and_profiles_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["Abacus 3000", "Slide Rule"]  # in CUDA's order, of those that it shows
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(names))
    facts = "hetermoe_cli.profiler.profile.device_facts"
    monkeypatch.setattr(facts, lambda device: DeviceFacts(product=names[device.index]))
    monkeypatch.setattr("hetermoe_cli.profiler.profile.require_kernels", lambda index: None)
    preflight._product.cache_clear()
    assert [preflight._product("cuda", index) for index in range(3)] == [*names, None]
    preflight._product.cache_clear()


def test_what_runs_on_one_machine_says_so() -> None:
    check_one_node(plan_of(mixed(("core", 2))), "bench")
    with pytest.raises(UserError, match="field nodes: 2 nodes; bench starts workers on one machine only"):
        check_one_node(plan_of(mixed(("core", 1), ("core", 1))), "bench")


def test_nodes_whose_ranks_are_scattered_are_refused() -> None:
    inputs = mixed(("core", 1), ("card", 1), ("core", 1))
    check_nodes(plan_of(inputs))
    nodes = [n.model_copy(update={"machine": "box" if n.device == "core" else None}) for n in inputs.cluster.nodes]
    apart = inputs.model_copy(update={"cluster": inputs.cluster.model_copy(update={"nodes": nodes})})
    assert apart.nodes == [[0, 2], [1]]
    assert apart.cluster.node_names == ["box", "node1"]
    with pytest.raises(UserError, match="field nodes: node groups of machine box have others between them"):
        check_nodes(plan_of(apart))


def test_two_types_of_one_machine_may_train_together() -> None:
    inputs = mixed(("core", 1), ("card", 2))
    core, card = (inputs.profiles[name].model_copy(update={"accelerator": "cpu"}) for name in ("core", "card"))
    nodes = [node.model_copy(update={"machine": "box"}) for node in inputs.cluster.nodes]
    cluster = inputs.cluster.model_copy(update={"nodes": nodes})
    inputs = inputs.model_copy(update={"cluster": cluster, "profiles": {"core": core, "card": card}})
    assert [inputs.device_index(rank) for rank in range(3)] == [0, 1, 2]
    check_devices(plan_of(inputs))

"""Classes of devices, and which of them may be said to host most."""

import random
from itertools import permutations

import pytest
from instances import random_inputs

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.instance.choice import ALL, Symmetries, group, symmetry_keys
from hetermoe_cli.spec.cluster import Device


def random_devices(rng: random.Random) -> tuple[list[Device], list[int]]:
    """Up to six, in equal nodes of one to three with one or two NICs, and some others; types that share a machine."""
    inputs = random_inputs(rng, devices=1, layers=1, experts=2, batch=8)
    node = inputs.cluster.nodes[0]
    size, count = rng.choice([(1, 3), (2, 2), (2, 3), (3, 2), (1, 4)])
    equal = node.model_copy(update={"name": "equal", "devices": size, "count": count, "nics": rng.choice([1, size])})
    nodes = [equal]
    if rng.random() < 0.5 and size * count < 6:
        nodes.append(node.model_copy(update={"name": "other", "devices": 1, "count": 1, "nics": 1}))
    if rng.random() < 0.3:
        nodes = [node.model_copy(update={"name": f"n{i}", "machine": f"box{i // 2}"}) for i in range(4)]
    cluster = inputs.cluster.model_copy(update={"nodes": nodes})
    devices = CostModel(inputs.model_copy(update={"cluster": cluster})).devices
    equally = rng.random() < 0.6
    return devices, [1 if equally else rng.choice([0, 1]) for _ in devices]


@pytest.mark.parametrize("seed", range(60))
def test_for_any_totals_some_renumbering_keeps_all_pairs_at_once(seed: int) -> None:
    """Renumberings keep equal devices equal, and what shares a NIC or a node together."""
    rng = random.Random(seed)
    devices, sequences = random_devices(rng)
    symmetries, keys = Symmetries(devices, sequences), symmetry_keys(devices, sequences)
    ranks = range(len(devices))
    pairs = [(a, b) for a in ranks for b in ranks if symmetries.leads(a, b)]

    def keeps(moved: tuple[int, ...]) -> bool:
        return all(keys[moved[a]] == keys[a] for a in ranks) and all(
            (getattr(devices[a], what) == getattr(devices[b], what))
            == (getattr(devices[moved[a]], what) == getattr(devices[moved[b]], what))
            for a in ranks
            for b in ranks
            for what in ("nic", "node")
        )

    renumberings = [moved for moved in permutations(ranks) if keeps(moved)]
    for _ in range(20):
        totals = [rng.randint(0, 4) for _ in ranks]
        assert any(all(totals[moved[a]] >= totals[moved[b]] for a, b in pairs) for moved in renumberings)


def test_equal_single_devices_are_in_order_and_larger_nodes_only_behind_the_first() -> None:
    def leads(nodes: list[tuple[str, int]]) -> set[tuple[int, int]]:
        count = sum(size for _, size in nodes)
        inputs = random_inputs(random.Random(0), devices=count, layers=1, experts=2, batch=4 * count)
        group_of = inputs.cluster.nodes[0]
        clusters = [
            group_of.model_copy(update={"name": f"n{i}", "devices": size, "count": 1, "nics": 1})
            for i, (_, size) in enumerate(nodes)
        ]
        inputs = inputs.model_copy(update={"cluster": inputs.cluster.model_copy(update={"nodes": clusters})})
        symmetries = Symmetries(CostModel(inputs).devices, [0] * count)
        return {(a, b) for a in range(count) for b in range(count) if symmetries.leads(a, b)}

    assert leads([("a", 1), ("a", 1), ("a", 1)]) == {(0, 1), (0, 2), (1, 2)}
    assert leads([("a", 2), ("a", 2)]) == {(0, 1), (0, 2), (0, 3), (2, 3)}
    assert leads([("a", 2), ("a", 1)]) == {(0, 1)}


def test_devices_apart() -> None:
    rng = random.Random(1)
    inputs = random_inputs(rng, devices=4, layers=1, experts=2, batch=8, flat=True)
    node = inputs.cluster.nodes[0].model_copy(update={"name": "n", "count": 4})
    cluster = inputs.cluster.model_copy(update={"nodes": [node]})
    devices = CostModel(inputs.model_copy(update={"cluster": cluster})).devices

    def ranks(sequences: tuple[int, ...], apart: int) -> list[tuple[int, ...]]:
        return [found.ranks for found in group(devices, sequences, apart)]

    assert ranks((1, 0, 0, 0), 0) == [(0,), (1, 2, 3)]
    assert ranks((1, 1, 0, 0), 1) == [(0, 1), (2,), (3,)]
    assert ranks((1, 1, 1, 1), 1) == [(0,), (1, 2, 3)]
    assert ranks((1, 1, 0, 0), 2) == [(0, 1), (2,), (3,)]
    assert ranks((1, 1, 0, 0), ALL) == [(0,), (1,), (2,), (3,)]

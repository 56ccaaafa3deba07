"""How many rows travel where a token goes once per device."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import make_inputs, make_layout, make_model, make_schedule
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.load import CountedLoad
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.shared_rows import once_per_device
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.spec.layout import Layout

DISPATCH = Action(Kind.DISPATCH, Pass.FORWARD, 0, 0)


def counted(experts: int, top_k: int, hosts: list[int], chances: np.ndarray) -> np.ndarray:
    """Expected rows per token to every host, over all sets of choices; chances of single experts [E]."""
    result, total = np.zeros(max(hosts) + 1), 0.0
    for chosen in combinations(range(experts), top_k):
        weight = float(np.prod(chances[list(chosen)]))
        total += weight
        for host in {hosts[expert] for expert in chosen}:
            result[host] += weight
    return result / total


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (8, 2), (8, 6), (8, 8), (10, 4)])
def test_exact_where_all_experts_are_alike(experts: int, top_k: int) -> None:
    hosts = [0] * (experts // 2) + [1] * (experts - experts // 2 - 1) + [2]
    rows = np.full((2, experts), 100 * top_k / experts)
    rows[1] = 0
    found, ranks = once_per_device(rows, np.arange(experts), np.array(hosts), top_k)
    assert ranks.tolist() == [0, 1, 2]
    assert found[0] == pytest.approx(100 * counted(experts, top_k, hosts, np.ones(experts)))
    assert not found[1].any()


def test_near_where_some_are_more_likely() -> None:
    hosts, chances = [0, 0, 0, 1, 1, 1, 2, 2], np.array([4.0, 1, 1, 2, 1, 1, 0.5, 0.5])
    inclusion = sum(float(np.prod(chances[list(c)])) * np.isin(np.arange(8), c) for c in combinations(range(8), 2))
    rows = 1000 * inclusion[None] * 2 / inclusion.sum()
    found, _ = once_per_device(rows, np.arange(8), np.array(hosts), 2)
    assert found[0] == pytest.approx(1000 * counted(8, 2, hosts, chances), rel=0.04)


@given(st.lists(st.integers(0, 50), min_size=6, max_size=6), st.integers(1, 3))
def test_between_the_largest_expert_and_all_rows(rows: list[int], top_k: int) -> None:
    load = np.array([rows], dtype=np.float64)
    found, _ = once_per_device(load, np.arange(6), np.array([0, 0, 1, 1, 1, 2]), top_k)
    tokens = load.sum() / top_k
    for host, held in enumerate(([0, 1], [2, 3, 4], [5])):
        assert min(load[0, held].max(), tokens) - 1e-9 <= found[0, host] <= min(load[0, held].sum(), tokens) + 1e-9


def test_no_host() -> None:
    found, ranks = once_per_device(np.ones((2, 4)), np.arange(0), np.arange(0), 2)
    assert (found.shape, ranks.tolist()) == ((2, 0), [])


def layout(dispatch: str) -> Layout:
    schedule = make_schedule("zebra", 2, dispatch=dispatch)  # type: ignore[arg-type]
    return make_layout((1, 0), (0, 4)).model_copy(update={"schedule": schedule})


def test_a_transfer_to_one_host_carries_every_token_once() -> None:
    cost = CostModel(make_inputs())
    whole, once = (LayoutCost(cost, layout(way)).transfer(DISPATCH).seconds for way in ("per_expert", "per_device"))
    latency = cost.network.link(0)[1]
    assert once - latency == pytest.approx((whole - latency) / 2)


def test_counted_rows_are_taken_as_they_are() -> None:
    cost = CostModel(make_inputs())
    experts = np.array([[8.0, 8, 8, 8], [0, 0, 0, 0]])
    ranks = np.array([[0.0, 20], [0, 0]])
    load = CountedLoad(lambda layer, j: experts, lambda layer, j: ranks)
    seconds, (_, latency) = (
        LayoutCost(cost, layout("per_device"), load).transfer(DISPATCH).seconds,
        cost.network.link(0),
    )
    assert seconds - latency == pytest.approx(20 * cost.row_bytes * cost.network.link(0)[0])


@pytest.mark.parametrize("hosted", [1, 2, 3, 4])
def test_the_planners_share_is_that_of_the_layout(hosted: int) -> None:
    inputs = make_inputs(model=make_model(experts=4, top_k=2), dispatch="per_device")
    found, _ = once_per_device(np.full((1, 4), 10.0), np.arange(hosted), np.zeros(hosted, np.intp), 2)
    assert CostModel(inputs).travelling_share(hosted) == pytest.approx(found[0, 0] / (10 * hosted))
    assert CostModel(make_inputs(model=make_model(experts=4, top_k=2))).travelling_share(hosted) == 1

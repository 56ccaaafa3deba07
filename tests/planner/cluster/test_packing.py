"""The packing program against brute force, and its limits."""

import random
from itertools import product
from math import inf

import pytest

from hetermoe_cli.planner.cluster.curves import time_at
from hetermoe_cli.planner.cluster.packing import Curve, Limits, Packer

BATCH = 6


def limits(**changes: object) -> Limits:
    fields: dict[str, object] = {
        "devices": [4, 2], "batch": BATCH, "quantum": 1, "prices": [3.0, 1.0], "most_cost": None, "most_groups": None,
        "solver": "highs",
    }  # fmt: skip
    return Limits(**{**fields, **changes})  # type: ignore[arg-type]


def curves(seed: int) -> dict[tuple[int, ...], Curve]:
    rng = random.Random(seed)
    found = {}
    for composition in [(1, 0), (2, 0), (4, 0), (0, 1), (0, 2), (1, 1), (2, 1)]:
        seconds, each = rng.uniform(0.1, 1), rng.uniform(0.2, 2) / (2 * composition[0] + composition[1])
        found[composition] = [(share, seconds + each * share) for share in (1, 3, BATCH)]
    return found


def brute_force(known: dict[tuple[int, ...], Curve], allowed: Limits) -> tuple[float, float]:
    """(least seconds, least dollars an iteration in hours) over all numbers of groups and shares."""
    best, cheapest = inf, inf
    units = [(c, share) for c in known for share in range(1, BATCH + 1)]

    def extend(first: int, left: int, room: list[int], slowest: float, price: float, groups: int) -> None:
        nonlocal best, cheapest
        if allowed.most_cost is not None and price > allowed.most_cost:
            return
        if allowed.most_groups is not None and groups > allowed.most_groups:
            return
        if left == 0:
            best, cheapest = min(best, slowest), min(cheapest, slowest * price)
            return
        for index in range(first, len(units)):
            c, share = units[index]
            rest = [have - count for have, count in zip(room, c, strict=True)]
            if share <= left and min(rest) >= 0:
                after = max(slowest, time_at(known[c], share))
                extend(index, left - share, rest, after, price + allowed.price(c), groups + 1)

    extend(0, BATCH, list(allowed.devices), 0.0, 0.0, 0)
    return best, cheapest


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (seed, changes)
        for seed, changes in product(range(4), [{}, {"most_groups": 1}, {"most_groups": 2}, {"most_cost": 7.0}])
    ],
)
def test_the_fastest_packing_is_the_brute_force_optimum(seed: int, changes: dict[str, object]) -> None:
    packer, allowed = Packer(limits(**changes), curves(seed)), limits(**changes)
    packing = packer.fastest()
    assert packing is not None
    assert sum(map(sum, packing.values())) == BATCH
    for kind, most in enumerate(allowed.devices):
        assert sum(c[kind] * len(shares) for c, shares in packing.items()) <= most
    assert allowed.most_cost is None or packer.price(packing) <= allowed.most_cost
    assert packer.seconds(packing) == pytest.approx(brute_force(curves(seed), allowed)[0])


@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_packing_is_the_brute_force_optimum(seed: int) -> None:
    packer = Packer(limits(), curves(seed))
    packing = packer.cheapest()
    assert packing is not None
    assert packer.price(packing) * packer.seconds(packing) == pytest.approx(brute_force(curves(seed), limits())[1])


def test_nothing_that_costs_too_much_or_is_too_small() -> None:
    assert Packer(limits(most_cost=0.5), curves(0)).fastest() is None
    assert Packer(limits(devices=[0, 1]), {(0, 1): [(1, 1.0), (2, 2.0)]}).fastest() is None  # takes 2 of 6
    assert Packer(limits(), {}).fastest() is None


def test_times_are_interpolated_between_points_only() -> None:
    curve = [(2, 1.0), (4, 3.0)]
    assert [time_at(curve, share) for share in (1, 2, 3, 4, 5)] == [inf, 1.0, 2.0, 3.0, inf]

"""The loss scale's rules, and what a damaged checkpoint says of it."""

import pytest

from hetermoe_cli.errors import UserError
from hetermoe_cli.runtime.modules.loss_scale import GROWTH_STEPS, LossScale


def test_it_doubles_after_good_steps_in_a_row_only() -> None:
    scale = LossScale(dynamic=True)
    for _ in range(GROWTH_STEPS - 1):
        assert scale.follow(finite=True)
    assert scale.scale == 2**16
    assert scale.follow(finite=False)
    assert scale.scale == 2**15
    for _ in range(GROWTH_STEPS):
        assert scale.follow(finite=True)
    assert scale.scale == 2**16
    assert scale.taken(2 * GROWTH_STEPS) == 2 * GROWTH_STEPS - 1


def test_it_halves_down_to_one() -> None:
    scale = LossScale(dynamic=True)
    assert all(scale.follow(finite=False) for _ in range(16))
    assert (scale.scale, scale.skipped_steps) == (1, 16)
    assert not scale.follow(finite=False)
    assert scale.follow(finite=True)


def test_without_scaling_nothing_is_skipped_and_nothing_grows() -> None:
    scale = LossScale(dynamic=False)
    assert all(scale.follow(finite=True) for _ in range(2 * GROWTH_STEPS))
    assert not scale.follow(finite=False)
    assert (scale.scale, scale.skipped_steps) == (1, 0)


def test_a_run_goes_on_where_its_checkpoint_stopped() -> None:
    first, again = LossScale(dynamic=True), LossScale(dynamic=True)
    for finite in (True, False, True, True):
        first.follow(finite)
    again.restore(first.state(), 4, "here")
    assert again.state() == first.state() == {"scale": 2**15, "good_steps": 2, "skipped_steps": 1}
    unscaled = LossScale(dynamic=False)  # a plan without fp16 goes on from it
    unscaled.restore(first.state(), 4, "here")
    assert (unscaled.scale, unscaled.taken(4)) == (1, 3)
    fresh = LossScale(dynamic=True)  # and the other way round
    fresh.restore(None, 4, "here")
    assert (fresh.scale, fresh.taken(4)) == (2**16, 4)


@pytest.mark.parametrize(
    "change",
    [{"scale": 0.5}, {"scale": "inf"}, {"scale": "much"}, {"good_steps": -1}, {"skipped_steps": 5}, {"scale": None}],
)
def test_a_damaged_state_is_refused(change: dict[str, object]) -> None:
    state = {**LossScale(dynamic=True).state(), **change}
    with pytest.raises(UserError, match=r"manifest.json: field extra.loss_scale: damaged"):
        LossScale(dynamic=True).restore(state, 4, "manifest.json")

"""cost/curves.py: interpolation, extension, monotony, and the rule between sequence lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import make_profile
from hetermoe_cli.cost.curves import AttentionCurve, Cost, Curve
from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.profile import AttentionPoint, Timing


def timings(*forward: float) -> list[Timing]:
    """Backward is three times forward, and ten bytes are kept per second."""
    return [Timing(forward_seconds=f, backward_seconds=3 * f, saved_bytes=int(10 * f)) for f in forward]


def attention(length: int, *forward: float) -> list[AttentionPoint]:
    """Points at 1, 2, 3, ... sequences."""
    return [
        AttentionPoint(sequence_length=length, sequences=n, **timing.model_dump())
        for n, timing in enumerate(timings(*forward), 1)
    ]


def test_measured_sizes_are_met() -> None:
    curve = Curve([10, 20, 40], timings(1.0, 5.0, 6.0))
    assert [curve(size) for size in (10, 20, 40)] == [Cost(1, 3, 10), Cost(5, 15, 50), Cost(6, 18, 60)]


def test_between_two_sizes_it_is_linear() -> None:
    curve = Curve([10, 20, 40], timings(1.0, 5.0, 6.0))
    assert curve(15) == Cost(3, 9, 30)
    assert curve(35) == Cost(5.75, 17.25, 57.5)


def test_outside_the_measured_sizes_the_end_segments_go_on() -> None:
    curve = Curve([10, 20, 40], timings(2.0, 3.0, 5.0))
    assert curve(5) == Cost(1.5, 4.5, 15)
    assert curve(80) == Cost(9, 27, 90)


def test_it_never_falls_below_zero() -> None:
    curve = Curve([10, 20], timings(1.0, 5.0))
    assert curve(5) == Cost(0, 0, 0)


def test_zero_rows_cost_nothing() -> None:
    curve = Curve([10, 20], timings(2.0, 2.5))
    assert curve(1e-9).forward == pytest.approx(1.5)
    assert curve(0) == Cost(0, 0, 0)


def test_one_measured_size_means_proportional() -> None:
    assert Curve([10], timings(2.0))(25) == Cost(5, 15, 50)


@given(st.integers(1, 4), st.lists(st.floats(0.0, 100.0), max_size=6))
def test_many_sizes_at_once_cost_as_one_by_one(points: int, sizes: list[float]) -> None:
    curve = Curve([10, 20, 40, 70][:points], timings(2.0, 2.5, 1.0, 9.0)[:points]).slowed(1.1)
    forward, backward = curve.seconds(np.array(sizes))
    assert [*zip(forward.tolist(), backward.tolist(), strict=True)] == [curve(size)[:2] for size in sizes]


def test_noise_does_not_make_more_work_cheaper() -> None:
    curve = Curve([10, 20, 30], timings(4.0, 3.0, 5.0))
    assert [curve(size).forward for size in (10, 15, 20, 25, 30)] == [4, 4, 4, 4.5, 5]


def test_covers_tells_interpolation_from_extension() -> None:
    curve = Curve([10, 20], timings(1.0, 2.0))
    assert [curve.covers(size) for size in (9.9, 10, 15, 20, 20.1)] == [False, True, True, True, False]


@given(
    st.dictionaries(st.integers(1, 1000), st.floats(1e-6, 1e3), min_size=1, max_size=6),
    st.floats(0, 2000),
    st.floats(0, 2000),
)
def test_more_rows_never_cost_less(points: dict[int, float], one: float, other: float) -> None:
    sizes = sorted(points)
    curve = Curve(sizes, timings(*(points[size] for size in sizes)))
    low, high = curve(min(one, other)), curve(max(one, other))
    assert all(a <= b * (1 + 1e-9) + 1e-9 for a, b in zip(low, high, strict=True))


def test_attention_at_a_profiled_length() -> None:
    curve = AttentionCurve(attention(100, 1.0, 2.0) + attention(200, 5.0, 9.0), 200, "profile x")
    assert curve(1) == pytest.approx(Cost(5, 15, 50))
    assert curve(1.5) == pytest.approx(Cost(7, 21, 70))
    assert curve(0) == Cost(0, 0, 0)


def test_attention_between_lengths_is_exact_for_a_linear_time_per_token() -> None:
    def seconds(length: int) -> float:
        return length * (0.3 + 0.002 * length)

    points = attention(100, seconds(100), 2 * seconds(100)) + attention(400, seconds(400), 2 * seconds(400))
    curve = AttentionCurve(points, 250, "profile x")
    assert curve(1).forward == pytest.approx(seconds(250))
    assert curve(2).backward == pytest.approx(6 * seconds(250))


def test_attention_uses_only_the_two_neighbouring_lengths() -> None:
    near = attention(100, 1.0) + attention(200, 2.0)
    far = attention(50, 77.0) + near + attention(400, 99.0)
    assert AttentionCurve(far, 150, "x")(1) == AttentionCurve(near, 150, "x")(1)


@pytest.mark.parametrize("length", [99, 201])
def test_a_length_outside_the_profile_is_refused(length: int) -> None:
    with pytest.raises(UserError) as caught:
        AttentionCurve(attention(100, 1.0) + attention(200, 5.0), length, "profile T4: field attention")
    assert str(caught.value) == (
        f"profile T4: field attention: sequence length {length} is outside the profiled 100..200: "
        f"profile it with --sequence-lengths {length}"
    )


def test_attention_covers_sequences_at_both_lengths() -> None:
    curve = AttentionCurve(attention(100, 1.0, 2.0) + attention(200, 5.0), 150, "x")
    assert (curve.covers(1), curve.covers(2)) == (True, False)


def test_the_builders_profiles_are_linear() -> None:
    table = make_profile(attention_seconds=0.5, expert_seconds=0.25).tables[0]
    curve = Curve([p.tokens for p in table.expert], table.expert)
    assert [curve(rows).forward for rows in (1, 50, 1000)] == pytest.approx([0.25, 12.5, 250])
    assert AttentionCurve(table.attention, 64, "x")(3) == pytest.approx(Cost(1.5, 3.0, 3 * 64 * 100))


def test_sequences_of_documents_cost_as_many_sequences_of_their_length() -> None:
    points = attention(100, 1.0, 2.0, 3.0) + attention(400, 9.0, 18.0)
    whole, cut = AttentionCurve(points, 400, "x"), AttentionCurve(points, 100, "x", documents=4)
    assert cut(1) == pytest.approx(Cost(4, 12, 40))  # the last segment goes on
    assert cut(0.5) == AttentionCurve(points, 100, "x")(2)
    assert cut(1).forward < whole(1).forward
    assert (cut.covers(0.75), cut.covers(1)) == (True, False)
    assert cut.slowed(2)(1).forward == 8

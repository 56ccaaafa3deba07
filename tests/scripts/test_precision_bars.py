"""Bars of bench_precision.py follow from the curves; its mixed runs have two types of device on one machine."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import bench_precision
from hetermoe_cli.spec.cluster import ClusterSpec, Link, devices
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.train import TrainSpec

STEPS = 100
LINK = Link(bandwidth_gigabytes_per_second=1.0, latency_microseconds=1.0)


def learned(bump: float = 0.0, end: float = 0.0, validation: float = 2.0) -> bench_precision.Learned:
    """A falling curve, off by `bump` in a stretch in the middle and by `end` in its last steps."""
    losses = np.linspace(5.0, 2.0, STEPS)
    losses[40:60] += bump
    losses[-bench_precision.SMOOTHED_STEPS :] += end
    return bench_precision.Learned(losses, validation, 0, 0.1, {})


@pytest.mark.parametrize(
    ("run", "kept"),
    [
        (learned(), [True, True, True]),
        (learned(bump=0.02, end=-0.01, validation=2.01), [True, True, True]),
        (learned(bump=0.022), [False, True, True]),
        (learned(end=-0.011), [True, False, True]),
        (learned(validation=1.989), [True, True, False]),
    ],
)
def test_bars_follow_from_the_curves(run: bench_precision.Learned, kept: list[bool]) -> None:
    case, seed = bench_precision.HALVES[0], bench_precision.OTHER_SEED
    found = {
        case.name: bench_precision.differences(run, learned()),
        seed.name: bench_precision.differences(learned(bump=0.1), learned()),
    }
    assert [bar["holds"] for bar in bench_precision.judge([case], found)] == [*kept, True]


def test_the_same_curve_does_not_pass_for_another_seed() -> None:
    case, seed = bench_precision.HALVES[0], bench_precision.OTHER_SEED
    found = {name: bench_precision.differences(learned(), learned()) for name in (case.name, seed.name)}
    assert bench_precision.judge([case], found)[-1]["holds"] is False


def test_a_single_step_counts_by_its_share_of_the_running_mean() -> None:
    run = learned()
    run.losses[50] += 0.2
    found = bench_precision.differences(run, learned())
    assert found["largest"] == pytest.approx(0.2 / bench_precision.SMOOTHED_STEPS)


def test_mixed_runs_name_what_they_exchange(tmp_path: Path) -> None:
    for case in bench_precision.HALVES:
        _, cluster, train = bench_precision.write_inputs(case, tmp_path)
        spec, found = load(ClusterSpec, cluster), load(TrainSpec, train)
        ranks = devices(spec, {"cpu-pair": LINK})
        precisions = {found.precision_of(rank.type) for rank in ranks}
        assert precisions == ({"bf16", "fp16"} if case.mixed else {case.name})
        assert {rank.node for rank in ranks} == {0}
        assert not case.mixed or f"exchange in {found.precision}" in case.name

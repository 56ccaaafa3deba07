"""The planner on the HeterMoE paper's set-ups with their models, 4K to 32K: speed-ups over every rival, and gaps.

All seconds are modelled (profiles/*.yaml), none measured. Batch: 8 sequences a newer GPU, as assumed in docs/paper.md.
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import bars
from hetermoe_cli.cli.plan import read_inputs
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = range(4, 33, 4)  # in 1024 tokens
RIVALS = ("gather_squeeze", "ep", "dist_ep", "pp")


@dataclass(frozen=True)
class Point:
    """One set-up: model, cluster file, sequences an iteration, 1024 tokens a sequence."""

    model: str
    cluster: str
    batch: int
    length: int

    def plan(self, time_limit: float) -> Plan:
        """The optimal plan."""
        changes = {"sequence_length": 1024 * self.length, "global_batch_sequences": self.batch}
        cluster, train = ROOT / f"plans/clusters/{self.cluster}.yaml", ROOT / "plans/train/paper-4k.yaml"
        inputs = read_inputs(self.model, cluster, train, [ROOT / "profiles"], changes)
        return make_plan(inputs, PlanOptions(solver=SolverOptions(time_limit=time_limit)))


SETUPS = (
    ("mixtral-w1", "o1", 48),
    ("mixtral-d1", "o1", 48),
    ("mixtral-w2", "o2", 32),
    ("mixtral-d1", "o2", 32),
    ("mixtral-d2", "o3", 48),
    ("mixtral-d1", "c1", 16),
    ("mixtral-d3", "c2", 16),
)
BAD_CASE = Point("mixtral-d1", "a40x4-v100x3", 32, 4)


def sample(point: Point, time_limit: float) -> dict[str, Any]:
    """Figures of one plan; speed-ups are null where a rival does not fit.

    `gap`: of the best plan of one group to the bound on these. `ep_ideal_ruled_out`: that bound proves that none of
    them is as fast as EP (Ideal).
    """
    began = time.monotonic()
    plan = point.plan(time_limit)
    seconds = plan.predicted.iteration_seconds
    alone = plan.one_group.iteration_seconds if plan.one_group else seconds
    bound = (plan.one_group or plan).bound.iteration_seconds
    gap = max(0.0, 1 - bound / alone)
    rivals = {name: rival.iteration_seconds for name, rival in plan.baselines.items()}
    result = {
        "model": point.model,
        "cluster": point.cluster,
        "length": point.length,
        "iteration_seconds": seconds,
        "groups": plan.group_count,
        "one_group_seconds": alone,
        "schedule": str(plan.groups[0].schedule),
        "speed_up": {name: None if value is None else value / seconds for name, value in rivals.items()},
        "gap": gap,
        "work_gap": max(0.0, 1 - plan.bound.work_iteration_seconds / seconds),
        "ep_ideal_ruled_out": bool(rivals["ep_ideal"] and rivals["ep_ideal"] < bound),
        "status": plan.solver.status,
        "seconds": time.monotonic() - began,
    }
    ratios = " ".join(f"{name} {value:.3f}" for name, value in result["speed_up"].items() if value)
    print(
        f"{point.model} {point.cluster} {point.length}K: {seconds:.4f} s, {plan.group_count} group(s), gap {gap:.2%}, "
        f"work gap {result['work_gap']:.1%}, {result['seconds']:.1f} s; {ratios}"
        + "; EP (Ideal) ruled out"
        * result["ep_ideal_ruled_out"],
        file=sys.stderr,
    )
    return result


def measure(time_limit: float) -> tuple[list[bars.Bar], list[dict[str, Any]]]:
    """Plan every point of the grid and the paper's bad case, one at a time on each core."""
    points = [Point(*setup, length) for setup in SETUPS for length in LENGTHS]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        samples = list(pool.map(sample, [*points, BAD_CASE], repeat(time_limit)))
    return judged(samples[:-1], samples[-1]), samples


def judged(samples: list[dict[str, Any]], bad: dict[str, Any]) -> list[bars.Bar]:
    """The bars of the grid."""
    ideal = [(s["cluster"], s["speed_up"]["ep_ideal"]) for s in samples if s["speed_up"]["ep_ideal"]]
    found = [
        bars.at_least(f"least speed-up over {name} on the grid", least(samples, name), 1 - 1e-9) for name in RIVALS
    ]
    found += [
        bars.at_least("speed-up over EP (Ideal), mean of the grid", mean(v for _, v in ideal), 1.12),
        bars.at_least("speed-up over EP (Ideal), mean of C1, C2", mean(v for c, v in ideal if c[0] == "c"), 1.07),
        bars.at_least("speed-up over EP (Ideal), least of the grid", min(v for _, v in ideal), 1.0),
        bars.at_least("speed-up over EP (Ideal), 4 A40 : 3 V100, D1, 4K", bad["speed_up"]["ep_ideal"], 1.05),
        bars.at_most(
            "gap of one group to the bound in the default order, largest", max(s["gap"] for s in samples), 0.01
        ),
        bars.at_most("gap to perfectly divisible work, mean", mean(s["work_gap"] for s in samples), 0.06),
    ]
    return found


def least(samples: list[dict[str, Any]], rival: str) -> float:
    """Smallest speed-up over a rival, where it fits."""
    return min(s["speed_up"][rival] for s in samples if s["speed_up"][rival])

"""Set-ups of the HeterMoE paper (section 5 of its evaluation) and all methods on them, for reproduce_paper.py.

Stated: fp16, activation checkpointing (recompute "all") for every method; the largest batch that all baselines have
memory for; all-to-alls of EP and DistEP cut into parts, as Tutel and Lina do; a pipeline's stages are single GPUs.
Assumed (docs/paper.md): which model ran on which set-up; one NIC per GPU; R, window and parts tuned for each point and
method; all of a GPU's memory used.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from math import ceil, gcd, inf, lcm
from pathlib import Path
from statistics import mean

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.baselines.even import ep, even_placement
from hetermoe_cli.planner.baselines.ideal import ep_ideal
from hetermoe_cli.planner.baselines.methods import RIVALS
from hetermoe_cli.planner.baselines.pp import pp
from hetermoe_cli.planner.baselines.rival import Overlap, Rival
from hetermoe_cli.planner.baselines.roles import dist_ep, gather_squeeze
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import ClusterSpec, NodeGroup
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.library import load_links
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.named_models import NAMED_MODELS
from hetermoe_cli.spec.profile import Profile
from hetermoe_cli.spec.schedule_choice import ScheduleChoice
from hetermoe_cli.spec.train import TrainSpec

ROOT = Path(__file__).resolve().parent.parent
PROFILES = [ROOT / "profiles"]
LENGTHS = (4, 8, 12, 16, 20, 24, 28, 32)  # in units of 1024 tokens
MOST_MICRO_BATCHES = 64
MOST_UNITS = 64
GPUS = tuple[tuple[str, int], ...]  # (type, count), attention GPUs first

MIXED: GPUS = (("A40", 2), ("V100", 2))
ON_PREMISE = (("O1", "W1"), ("O1", "D1"), ("O2", "W2"), ("O2", "D1"), ("O3", "D2"))
AWS = (("C1", "D1"), ("C2", "D3"))


@dataclass(frozen=True)
class Case:
    """How EP's all-to-alls overlap (also in EP (Ideal) and on equal GPUs, and in parts those of DistEP), and the least
    number of sequences per attention GPU in a batch; None: as many as memory allows."""

    overlap: Overlap = "parts"
    per_attention_gpu: int | None = None


@dataclass(frozen=True)
class Point:
    """One model and sequence length on one set of GPUs; `batch` sequences an iteration."""

    gpus: GPUS
    network: str
    model: str
    kilotokens: int
    batch: int
    overlap: Overlap


@cache
def setup_of(name: str) -> tuple[GPUS, str]:
    """GPUs and network of a set-up, from its cluster file."""
    nodes = load(ClusterSpec, ROOT / "plans" / "clusters" / f"{name.lower()}.yaml").nodes
    return tuple((node.device, node.count * node.devices) for node in nodes), str(nodes[0].network)


def unit_of(gpus: GPUS) -> int:
    """The smallest batch that attention GPUs, and all GPUs, can share equally.

    EP splits a batch evenly over all GPUs: without this it would get uneven shares on twelve and nine GPUs.
    """
    return lcm(gpus[0][1], sum(count for _, count in gpus))


def sized(case: Case, at: Point) -> Point:
    """The point with the case's batch, in units of the smallest one and at least that."""
    unit = at.batch
    wanted = case.per_attention_gpu * at.gpus[0][1] / unit if case.per_attention_gpu else largest(at)
    return replace(at, batch=max(1, ceil(wanted)) * unit)


@cache
def largest(at: Point) -> int:
    """How many times the point's batch EP over all GPUs holds at once, one sequence of each GPU a micro-batch."""
    cost, times = cost_of(at), 0
    world, placement = len(cost.devices), even_placement(cost)
    while times < MOST_UNITS:
        count = (times + 1) * at.batch // world
        schedule = ScheduleChoice.zebra(count, recompute="all")
        layout = Layout(schedule=schedule, sequences_per_rank=[1] * world, placement=placement)
        if overflow(LayoutCost(cost, layout)):
            break
        times += 1
    return times


def point(case: Case, setup: str, model: str, kilotokens: int) -> Point:
    """A point of the grid of set-ups."""
    gpus, network = setup_of(setup)
    return sized(case, Point(gpus, network, model, kilotokens, unit_of(gpus), case.overlap))


def ratio_point(case: Case, old: int, kilotokens: int) -> Point:
    """D1 on 4 A40 and `old` V100, with experts in proportion to the V100, four on each as on O1."""
    gpus = (("A40", 4), ("V100", old))
    return sized(case, Point(gpus, "ethernet-100g", f"D1-{4 * old}", kilotokens, unit_of(gpus), case.overlap))


def eight_experts(case: Case, gpus: GPUS, kilotokens: int) -> Point:
    """D1 with 8 experts; the batch is that of 2 A40 + 2 V100, which others are compared with."""
    mixed = sized(case, Point(MIXED, "ethernet-100g", "D1-8", kilotokens, unit_of(MIXED), case.overlap))
    return replace(mixed, gpus=gpus)


def model_of(name: str) -> ModelConfig:
    """W1, W2, D1, D2, D3; D1-8 is D1 with 8 experts."""
    base, _, experts = name.partition("-")
    model = NAMED_MODELS[f"mixtral-{base.lower()}"]
    return model.model_copy(update={"experts": int(experts)}) if experts else model


@cache
def profile_of(name: str) -> Profile:
    """A modelled profile, read once."""
    return load(Profile, PROFILES[0] / f"{name}.yaml")


@cache
def cost_of(at: Point) -> CostModel:
    """The cost model of a point."""
    nodes = [
        NodeGroup(name=name, count=count, device=name, devices=1, network=at.network, interconnect="pcie4-x16")
        for name, count in at.gpus
    ]
    cluster = ClusterSpec(name="-".join(f"{count}{name}" for name, count in at.gpus), nodes=nodes)
    train = TrainSpec(
        sequence_length=1024 * at.kilotokens,
        global_batch_sequences=at.batch,
        precision="fp16",
        recompute="all",
        memory_headroom=1.0,
    )
    return CostModel(
        Inputs(
            model=model_of(at.model),
            cluster=cluster,
            links={name: record.link for name, record in load_links(cluster, PROFILES).items()},
            profiles={name: profile_of(name) for name, _ in at.gpus},
            train=train,
        )
    )


METHODS: dict[str, Callable[[CostModel, int], Rival]] = {
    **RIVALS,
    "hetermoe": gather_squeeze,  # the paper's method: attention on the newer type, zebra, its greedy Asym-EA
    "no_asym": partial(gather_squeeze, asymmetric=False),
}


@cache
def run(at: Point, method: str) -> Rival:
    """The best that a method finds."""
    return methods_at(at.overlap)[method](cost_of(at), MOST_MICRO_BATCHES)


@cache
def methods_at(overlap: Overlap) -> dict[str, Callable[[CostModel, int], Rival]]:
    """All methods, where all-to-alls of EP in its three forms overlap so."""
    disaggregated = "parts" if overlap == "parts" else "none"
    chosen = {
        "ep": partial(ep, overlap=overlap),
        "ep_ideal": partial(ep_ideal, overlap=overlap),
        "dist_ep": partial(dist_ep, overlap=disaggregated),
        "pp": single_stages,
    }
    return METHODS | chosen


def single_stages(cost: CostModel, limit: int) -> Rival:
    """PP of single GPUs, in as many equal pipelines as possible: 6 of A40 and V100 on O1, 4 of A40 and 2 V100 on O2."""
    kinds = Counter(device.type for device in cost.devices)
    return pp(cost, limit, pipelines=gcd(*kinds.values()))


def speed_up(at: Point, over: str, method: str = "hetermoe") -> float | None:
    """Seconds of `over` by those of `method`; None where one does not fit.

    EP (Ideal) is only compared where each GPU type holds the model alone, as its definition needs.
    """
    rival, ours = run(at, over), run(at, method)
    if inf in (rival.seconds, ours.seconds) or "does not fit" in rival.reason:
        return None
    return rival.seconds / ours.seconds


def busy(at: Point, method: str) -> list[float]:
    """Mean share of the iteration that the GPUs of each type compute."""
    layout = run(at, method).layout
    if layout is None:
        return [0.0 for _ in at.gpus]
    cost = cost_of(at)
    shares = simulate(LayoutCost(cost, layout)).busy_share(layout.world_size)
    return [mean(shares[d.rank] for d in cost.devices if d.type == name) for name, _ in at.gpus]


def moved(at: Point) -> float:
    """Mean experts of a layer that Asym-EA runs on attention GPUs."""
    layout = run(at, "hetermoe").layout
    if layout is None:
        return 0.0
    return mean(len(part) for p in layout.placement for part in p.experts[: at.gpus[0][1]]) * at.gpus[0][1]


def attention_over_experts(at: Point) -> float | None:
    """T_A / T_E of Algorithm 1, forward, as HeterMoE runs the point: attention on one type, experts on the other."""
    layout = run(at, "hetermoe").layout
    if layout is None:
        return None
    cost, (_, attending), (_, hosting) = cost_of(at), *at.gpus
    old, total = cost.of(attending), layout.sequences_per_micro_batch
    experts = cost.model.experts / hosting * old.expert(cost.rows_per_expert(total)).forward
    return cost.of(0).attention(total / attending).forward / experts

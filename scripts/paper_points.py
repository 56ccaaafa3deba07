"""Set-ups of the HeterMoE paper (section 5 of its evaluation) and all methods on them, for reproduce_paper.py.

Assumed, since the paper does not state it (docs/paper.md): which model ran on which set-up; one NIC per GPU; the global
batch; R and window tuned per point and method; all of a GPU's memory used. Stated: fp16, activation checkpointing
(recompute "all") for every method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import ceil, inf, lcm
from pathlib import Path
from statistics import mean

from hetermoe_cli.cost import CostModel, LayoutCost
from hetermoe_cli.planner.baselines import RIVALS, Rival
from hetermoe_cli.planner.baselines.even import ep
from hetermoe_cli.planner.baselines.ideal import ep_ideal
from hetermoe_cli.planner.baselines.roles import gather_squeeze
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import ClusterSpec, NodeGroup
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.library import load_links
from hetermoe_cli.spec.model import NAMED_MODELS, ModelConfig
from hetermoe_cli.spec.plan import Inputs
from hetermoe_cli.spec.profile import Profile
from hetermoe_cli.spec.train import TrainSpec

ROOT = Path(__file__).resolve().parent.parent
PROFILES = [ROOT / "profiles"]
LENGTHS = (4, 8, 12, 16, 20, 24, 28, 32)  # in units of 1024 tokens
MOST_MICRO_BATCHES = 64
GPUS = tuple[tuple[str, int], ...]  # (type, count), attention GPUs first

ON_PREMISE = (("O1", "W1"), ("O1", "D1"), ("O2", "W2"), ("O2", "D1"), ("O3", "D2"))
AWS = (("C1", "D1"), ("C2", "D3"))


@dataclass(frozen=True)
class Case:
    """Assumptions that the paper leaves open: sequences per attention GPU, and whether EP overlaps its all-to-alls with
    the compute of other micro-batches (also in EP (Ideal) and on equal GPUs). The paper's EP is DeepSpeed-MoE, whose
    published layer waits for its all-to-alls."""

    per_attention_gpu: int = 8
    ep_overlaps: bool = False


@dataclass(frozen=True)
class Point:
    """One model and sequence length on one set of GPUs; `batch` sequences an iteration."""

    gpus: GPUS
    network: str
    model: str
    kilotokens: int
    batch: int
    ep_overlaps: bool


@cache
def setup_of(name: str) -> tuple[GPUS, str]:
    """GPUs and network of a set-up, from its cluster file."""
    nodes = load(ClusterSpec, ROOT / "plans" / "clusters" / f"{name.lower()}.yaml").nodes
    return tuple((node.device, node.count * node.devices) for node in nodes), str(nodes[0].network)


def batch_of(gpus: GPUS, per_attention_gpu: int) -> int:
    """The smallest batch of so many sequences per attention GPU that attention GPUs, and all GPUs, can share equally.

    EP splits a batch evenly over all GPUs: without this it would get uneven shares on twelve and nine GPUs.
    """
    attention = gpus[0][1]
    both = lcm(attention, sum(count for _, count in gpus))
    return ceil(per_attention_gpu * attention / both) * both


def point(case: Case, setup: str, model: str, kilotokens: int) -> Point:
    """A point of the grid of set-ups."""
    gpus, network = setup_of(setup)
    batch = batch_of(gpus, case.per_attention_gpu)
    return Point(gpus, network, model, kilotokens, batch, case.ep_overlaps)


def ratio_point(case: Case, old: int, kilotokens: int) -> Point:
    """D1 on 4 A40 and `old` V100."""
    gpus = (("A40", 4), ("V100", old))
    return Point(gpus, "ethernet-100g", "D1", kilotokens, 4 * case.per_attention_gpu, case.ep_overlaps)


def eight_experts(case: Case, gpus: GPUS, kilotokens: int) -> Point:
    """D1 with 8 experts; the batch is that of 2 A40 + 2 V100, which others are compared with."""
    return Point(gpus, "ethernet-100g", "D1-8", kilotokens, 2 * case.per_attention_gpu, case.ep_overlaps)


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
            links=load_links(cluster, PROFILES),
            profiles={name: profile_of(name) for name, _ in at.gpus},
            train=train,
        )
    )


METHODS: dict[str, Callable[[CostModel, int], Rival]] = {
    **RIVALS,
    "hetermoe": gather_squeeze,  # the paper's method: attention on the newer type, zebra, its greedy Asym-EA
    "no_asym": partial(gather_squeeze, asymmetric=False),
}
WITHOUT_OVERLAP = {"ep": partial(ep, overlaps=False), "ep_ideal": partial(ep_ideal, overlaps=False)}


@cache
def run(at: Point, method: str) -> Rival:
    """The best that a method finds."""
    methods = METHODS if at.ep_overlaps else METHODS | WITHOUT_OVERLAP
    return methods[method](cost_of(at), MOST_MICRO_BATCHES)


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

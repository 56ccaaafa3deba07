"""Models and layouts of bench_engine.py, and their plans: real CPU workers with one thread each, nothing emulated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from demo import ROOT, hetermoe
from emulated_plans import manual_plan
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.spec.cluster import ClusterSpec
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.spec.library import collect_inputs
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.schedule_choice import ScheduleChoice
from hetermoe_cli.spec.train import TrainSpec

WRITTEN = "Written by scripts/bench_engine.py."


@dataclass(frozen=True)
class Widths:
    """What a profile is measured for: the sizes of a layer."""

    name: str
    hidden: int
    ffn: int
    heads: int

    def model(self, layers: int, experts: int) -> ModelConfig:
        """Two experts a token."""
        return ModelConfig(
            name=self.name, layers=layers, hidden_size=self.hidden, ffn_size=self.ffn, attention_heads=self.heads,
            kv_heads=self.heads, head_size=self.hidden // self.heads, experts=experts, top_k=2, vocab_size=256,
        )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model, who attends to how many sequences of a micro-batch, who hosts experts, and in which order all runs."""

    widths: Widths
    layers: int
    experts: int
    length: int
    sequences: tuple[int, ...]
    hosts: tuple[int, ...]
    micro_batches: int
    window: int = 0  # 0: all micro-batches

    @property
    def model(self) -> ModelConfig:
        """Its model."""
        return self.widths.model(self.layers, self.experts)

    @property
    def layout(self) -> Layout:
        """Experts in equal runs of numbers over the hosts, the same in every layer."""
        share = self.experts // len(self.hosts)
        held: list[list[int]] = [[] for _ in self.sequences]
        for place, rank in enumerate(self.hosts):
            held[rank] = list(range(place * share, (place + 1) * share))
        return Layout(
            schedule=ScheduleChoice(micro_batches=self.micro_batches, window=self.window or self.micro_batches),
            sequences_per_rank=list(self.sequences),
            placement=[LayerPlacement(experts=held)] * self.layers,
        )

    @property
    def train(self) -> TrainSpec:
        """The batch of all micro-batches."""
        batch = sum(self.sequences) * self.micro_batches
        return TrainSpec(sequence_length=self.length, global_batch_sequences=batch, precision="fp32", warmup_steps=1)

    def split(self, micro_batches: int, window: int = 0) -> "Shape":
        """The same global batch in another number of micro-batches."""
        assert self.micro_batches % micro_batches == 0
        sequences = tuple(count * self.micro_batches // micro_batches for count in self.sequences)
        return replace(self, sequences=sequences, micro_batches=micro_batches, window=window)


def measure_profile(widths: Widths, lengths: Sequence[int], folder: Path) -> None:
    """Profile this machine's CPU and the link between two workers."""
    model = folder / f"{widths.name}.yaml"
    dump(widths.model(1, 2), model, WRITTEN)
    lengths_text = ",".join(map(str, lengths))
    what = ("--device", "cpu", "--model", model, "--sequence-lengths", lengths_text)
    hetermoe("profile", "--quick", *what, "--output", folder)


def write_plan(shape: Shape, profiles: Path, path: Path) -> Path:
    """The plan of a shape's layout, on as many CPU workers of this machine as it has ranks."""
    cluster = load(ClusterSpec, ROOT / "plans/clusters/cpu2.yaml")
    nodes = [cluster.nodes[0].model_copy(update={"devices": len(shape.sequences)})]
    cluster = cluster.model_copy(update={"name": f"cpu{len(shape.sequences)}", "nodes": nodes})
    inputs = collect_inputs(shape.model, cluster, shape.train, [profiles])
    dump(manual_plan(inputs, LayoutCost(CostModel(inputs), shape.layout)), path, WRITTEN)
    return path

"""Layout (what the engine runs) and Plan (the layout, its inputs, and the reasons for it)."""

from datetime import date
from typing import Literal

from pydantic import Field, model_validator

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Spec, sha256
from hetermoe_cli.spec.cluster import ClusterSpec, Device, Link, devices
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.profile import Profile
from hetermoe_cli.spec.train import Recompute, TrainSpec

ScheduleName = Literal["zebra", "windowed", "sequential"]
ExpertOrder = Literal["after", "between"]
Assignment = Literal["optimal", "gather_squeeze", "ep", "dist_ep", "manual"]


class ScheduleChoice(Spec):
    """Which order to run: R micro-batches in windows that go forward and backward one after another.

    `window` micro-batches are in flight together: all of them is zebra, one is sequential. `experts`: attending ranks
    run their experts after the layer's attention of all micro-batches in the window, or between them.
    `recompute`: which stages run again in backward instead of keeping their activations.
    """

    micro_batches: PositiveInt
    window: PositiveInt
    experts: ExpertOrder = "after"
    recompute: Recompute = "none"

    @model_validator(mode="after")
    def _check(self) -> "ScheduleChoice":
        if self.micro_batches % self.window:
            raise ValueError(f"window {self.window} does not divide micro_batches {self.micro_batches}")
        return self

    @classmethod
    def zebra(cls, micro_batches: int, *, recompute: Recompute = "none") -> "ScheduleChoice":
        """All micro-batches in flight together."""
        return cls(micro_batches=micro_batches, window=micro_batches, recompute=recompute)

    @classmethod
    def sequential(cls, micro_batches: int, *, recompute: Recompute = "none") -> "ScheduleChoice":
        """One micro-batch after another, nothing overlapped."""
        return cls(micro_batches=micro_batches, window=1, recompute=recompute)

    @property
    def name(self) -> ScheduleName:
        """zebra, windowed or sequential."""
        if self.window == self.micro_batches:
            return "zebra"
        return "sequential" if self.window == 1 else "windowed"

    @property
    def recompute_attention(self) -> bool:
        """Whether attention stages run again in backward."""
        return self.recompute in ("attention", "all")

    @property
    def recompute_experts(self) -> bool:
        """Whether expert stages run again in backward."""
        return self.recompute in ("experts", "all")

    def __str__(self) -> str:
        parts = [self.name, f"R = {self.micro_batches}"]
        parts += [f"windows of {self.window}"] * (self.name == "windowed")
        parts += ["experts between micro-batches"] * (self.experts == "between")
        again = {"all": ["recomputation"], "none": []}.get(self.recompute, [f"recomputation of {self.recompute}"])
        parts += again
        return ", ".join(parts)


class LayerPlacement(Spec):
    """Where one layer's experts live: `experts[rank]` are hosted there, `replicated` on every attending rank."""

    experts: list[list[NonNegativeInt]]
    replicated: list[NonNegativeInt] = Field(default_factory=list)


class Layout(Spec):
    """All that the schedule, the simulator and the engine need to know of a plan.

    `sequences_per_rank[r]` is what rank r attends to per micro-batch; 0 makes it a pure expert rank.
    """

    schedule: ScheduleChoice
    sequences_per_rank: list[NonNegativeInt] = Field(min_length=1)
    placement: list[LayerPlacement] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "Layout":
        if not any(self.sequences_per_rank):
            raise ValueError("sequences_per_rank: at least one rank must attend to a sequence")
        counts = {len(p.replicated) + sum(map(len, p.experts)) for p in self.placement}
        for layer, placement in enumerate(self.placement):
            if len(placement.experts) != self.world_size:
                raise ValueError(
                    f"placement.{layer}.experts: {len(placement.experts)} ranks listed, "
                    f"sequences_per_rank has {self.world_size}"
                )
            everyone = sorted([e for host in placement.experts for e in host] + placement.replicated)
            if everyone != list(range(len(everyone))) or len(counts) != 1:
                raise ValueError(f"placement.{layer}: every expert must be placed exactly once")
        return self

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.sequences_per_rank)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.placement)

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return len(self.placement[0].replicated) + sum(map(len, self.placement[0].experts))

    @property
    def micro_batches(self) -> int:
        """R."""
        return self.schedule.micro_batches

    @property
    def micro_batches_alive(self) -> int:
        """Micro-batches whose activations are kept at once."""
        return self.schedule.window

    @property
    def sequences_per_micro_batch(self) -> int:
        """Sequences of one micro-batch over all ranks."""
        return sum(self.sequences_per_rank)

    @property
    def attending(self) -> list[int]:
        """Ranks that attend to at least one sequence."""
        return [rank for rank, count in enumerate(self.sequences_per_rank) if count]

    def hosting(self, layer: int) -> list[int]:
        """Ranks that host at least one expert of `layer` (replicated ones not counted)."""
        return [rank for rank, experts in enumerate(self.placement[layer].experts) if experts]

    def local_experts(self, layer: int, rank: int) -> list[int]:
        """Experts of `layer` that `rank` computes: hosted, then (if it attends) replicated."""
        placement = self.placement[layer]
        return placement.experts[rank] + (placement.replicated if self.sequences_per_rank[rank] else [])


class Memory(Spec):
    """Bytes of one rank, by kind."""

    weights_bytes: NonNegativeInt
    gradients_bytes: NonNegativeInt
    optimizer_bytes: NonNegativeInt
    activations_bytes: NonNegativeInt
    buffers_bytes: NonNegativeInt
    framework_bytes: NonNegativeInt
    capacity_bytes: PositiveInt

    @property
    def total_bytes(self) -> int:
        """All kinds together."""
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.buffers_bytes
            + self.framework_bytes
        )


class Prediction(Spec):
    """The simulator's replay of the layout with a balanced router. Modelled, not measured."""

    iteration_seconds: PositiveFloat
    tokens_per_second: PositiveFloat
    busy_share_per_rank: list[NonNegativeFloat]


class Bound(Spec):
    """Lower bounds on the iteration: over the searched space, and of perfectly divisible work."""

    iteration_seconds: NonNegativeFloat
    work_iteration_seconds: NonNegativeFloat
    exact_over: Literal["devices", "classes", "not solved"]


class Baseline(Spec):
    """A rival layout under the same cost model; null seconds and the reason where it does not fit."""

    iteration_seconds: PositiveFloat | None
    schedule: ScheduleChoice | None = None
    reason: str = ""


class SolverReport(Spec):
    """How the plan was found."""

    name: str
    status: str
    seconds: NonNegativeFloat
    candidates: NonNegativeInt = 0
    solved: NonNegativeInt = 0


class Inputs(Spec):
    """Everything a plan was computed from; profiles hold only the kernel tables that were used."""

    model: ModelConfig
    cluster: ClusterSpec
    links: dict[str, Link]
    profiles: dict[str, Profile]
    train: TrainSpec

    def hashes(self) -> dict[str, str]:
        """sha256 of every input, by name."""
        result = {"model": sha256(self.model), "cluster": sha256(self.cluster), "train": sha256(self.train)}
        result |= {f"links.{name}": sha256(link) for name, link in sorted(self.links.items())}
        result |= {f"profiles.{name}": sha256(profile) for name, profile in sorted(self.profiles.items())}
        return result

    def devices(self) -> list[Device]:
        """One Device per rank."""
        return devices(self.cluster, self.links)


class Plan(Spec):
    """A layout with its prediction, bounds, memory, baselines, and its inputs with their hashes."""

    kind: Literal["plan"] = "plan"
    schema_version: Literal[1] = 1
    date: date
    assignment: Assignment
    schedule: ScheduleChoice
    sequences_per_rank: list[NonNegativeInt]
    placement: list[LayerPlacement]
    predicted: Prediction
    bound: Bound
    gap: NonNegativeFloat
    memory: list[Memory]
    baselines: dict[str, Baseline]
    solver: SolverReport
    notes: list[str] = Field(default_factory=list)
    inputs: Inputs
    inputs_sha256: dict[str, str]

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        layout = self.layout
        model, train, world = self.inputs.model, self.inputs.train, self.inputs.cluster.world_size
        if layout.world_size != world:
            raise ValueError(f"sequences_per_rank: {layout.world_size} ranks, the cluster has {world} devices")
        if (layout.layers, layout.experts) != (model.layers, model.experts):
            raise ValueError(
                f"placement: {layout.layers} layers of {layout.experts} experts, "
                f"the model has {model.layers} of {model.experts}"
            )
        batch = layout.sequences_per_micro_batch * layout.micro_batches
        if batch != train.global_batch_sequences:
            raise ValueError(
                f"sequences_per_rank: {batch} sequences an iteration, "
                f"train.global_batch_sequences is {train.global_batch_sequences}"
            )
        return self

    @property
    def layout(self) -> Layout:
        """What the engine runs."""
        return Layout(schedule=self.schedule, sequences_per_rank=self.sequences_per_rank, placement=self.placement)

    def verify(self, source: str) -> None:
        """UserError if an input was edited after planning, so that its hash no longer matches."""
        hashes = self.inputs.hashes()
        for name in sorted(hashes.keys() | self.inputs_sha256.keys()):
            if hashes.get(name) != self.inputs_sha256.get(name):
                raise UserError(
                    f"{source}: field inputs.{name}: its hash does not match inputs_sha256.{name}: "
                    "the input was changed after planning; run `hetermoe plan` again"
                )

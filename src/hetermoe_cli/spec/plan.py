"""Plan: layouts of groups of ranks, the inputs they were made from, and the reasons for them."""

from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.base import (
    ExtendedSpec,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Spec,
)
from hetermoe_cli.spec.explanation import Explanation, Variant
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import LayerPlacement, Layout, PipelineStage
from hetermoe_cli.spec.schedule_choice import ScheduleChoice
from hetermoe_cli.spec.train import TrainSpec
from hetermoe_cli.spec.world import World

Objective = Literal["time", "cost"]
Assignment = Literal["optimal", "gather_squeeze", "ep", "dist_ep", "hetero_ep", "pp", "manual"]


class Group(ExtendedSpec):
    """A layout, and the groups of ranks that run it side by side, each with a full copy of the model.

    `replicas`: the ranks of each, ascending. Rank r of the layout is the r-th of them.
    """

    later: ClassVar[frozenset[str]] = frozenset({"pipeline", "shifts", "head"})

    replicas: list[list[NonNegativeInt]] = Field(min_length=1)
    schedule: ScheduleChoice
    sequences_per_rank: list[NonNegativeInt] = Field(min_length=1)
    placement: list[LayerPlacement] = Field(min_length=1)
    pipeline: list[PipelineStage] = Field(default_factory=list)
    shifts: list[list[NonNegativeInt]] = Field(default_factory=list)
    head: list[NonNegativeInt] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> "Group":
        world = self.layout.world_size
        for index, ranks in enumerate(self.replicas):
            if len(ranks) != world or sorted(set(ranks)) != ranks:
                raise ValueError(f"replicas.{index}: must be {world} different ranks in ascending order")
        return self

    @classmethod
    def of(cls, layout: Layout, replicas: list[list[int]]) -> "Group":
        """`layout` on each of `replicas`."""
        return cls(replicas=replicas, **{name: getattr(layout, name) for name in Layout.model_fields})

    @property
    def layout(self) -> Layout:
        """What each replica runs."""
        return Layout(**{name: getattr(self, name) for name in Layout.model_fields})

    @property
    def sequences(self) -> int:
        """Sequences of an iteration that one replica takes."""
        return self.layout.sequences_per_micro_batch * self.schedule.micro_batches


def world_of(groups: Sequence[Group]) -> World:
    """All copies of the model, on processes of the same numbers as ranks: no device may be left out."""
    return World.side_by_side([(group.layout, ranks) for group in groups for ranks in group.replicas])


def ranks_in(groups: Iterable[Group]) -> list[int]:
    """All that are in some group, ascending."""
    return sorted(rank for group in groups for ranks in group.replicas for rank in ranks)


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
    """The simulator's replay of the layout under the inputs' expert load. Modelled, not measured."""

    iteration_seconds: PositiveFloat
    tokens_per_second: PositiveFloat
    busy_share_per_rank: list[NonNegativeFloat]

    @classmethod
    def of(cls, train: TrainSpec, seconds: float, busy: Iterable[float], traced: float) -> "Prediction":
        """Of an iteration of `seconds`. `busy`: shares of one of `traced` seconds, another one under a load."""
        return cls(
            iteration_seconds=seconds,
            tokens_per_second=train.tokens / seconds,
            busy_share_per_rank=[share * traced / seconds for share in busy],
        )


class Bound(Spec):
    """Lower bounds on the iteration: over the searched space in the default order without shifts, and of perfectly
    divisible work.

    The second holds for any number of groups; so does the first where the plan's `max_groups` is not 1.
    """

    iteration_seconds: NonNegativeFloat
    work_iteration_seconds: NonNegativeFloat
    exact_over: Literal["devices", "classes", "not solved"]


class Baseline(Spec):
    """A rival layout under the same cost model; null seconds and the reason where it does not fit."""

    iteration_seconds: PositiveFloat | None
    schedule: ScheduleChoice | None = None
    reason: str = ""


class Economy(Spec):
    """What the devices in a plan's groups cost, where the cluster file has all prices; those in no group are not paid.

    `most_tokens_per_dollar`: no plan on these devices can have more (perfectly divisible work on the cheapest types).
    """

    dollars_per_hour: PositiveFloat
    tokens_per_dollar: PositiveFloat
    most_tokens_per_dollar: PositiveFloat


class SolverReport(Spec):
    """How the plan was found."""

    name: str
    status: str
    seconds: NonNegativeFloat
    candidates: NonNegativeInt = 0
    solved: NonNegativeInt = 0


class LoadReport(Spec):
    """What the expert load does to a plan. Simulated seconds.

    `imbalance_per_layer`: the hottest expert's rows over the mean; `worst_layer` has the largest.
    `balanced_iteration_seconds`: the best plan for a balanced router, with one; `numbered_iteration_seconds`: the same
    plan under the load, its experts placed by number (null where memory does not hold that).
    """

    imbalance_per_layer: list[PositiveFloat]
    worst_layer: NonNegativeInt
    balanced_iteration_seconds: PositiveFloat | None
    numbered_iteration_seconds: PositiveFloat | None


class OneGroup(Spec):
    """The best plan of one group, where several are faster: its seconds, and the bound on all such plans."""

    iteration_seconds: PositiveFloat
    bound: Bound


class Plan(Spec):
    """Groups with their prediction, bounds, memory, baselines, and the inputs with their hashes.

    Ranks in no group are left out on purpose; their memory and busy share are zero. `max_groups`: how many groups the
    search allowed (null: any number). A plan of one group for a small cluster, where several were not found to be
    faster, says 1: its bound is of one group.
    """

    kind: Literal["plan"] = "plan"
    schema_version: Literal[1] = 1
    date: date
    assignment: Assignment
    objective: Objective = "time"
    max_groups: PositiveInt | None = 1
    groups: list[Group] = Field(min_length=1)
    predicted: Prediction
    bound: Bound
    gap: NonNegativeFloat
    one_group: OneGroup | None = None
    memory: list[Memory]
    baselines: dict[str, Baseline]
    economy: Economy | None = None
    solver: SolverReport
    load: LoadReport | None = None
    notes: list[str] = Field(default_factory=list)
    explanation: Explanation | None = None
    what_if: list[Variant] = Field(default_factory=list)
    inputs: Inputs
    inputs_sha256: dict[str, str]

    @model_validator(mode="before")
    @classmethod
    def _one_layout(cls, data: Any) -> Any:
        """A file written before there were groups has one layout over all ranks."""
        names = ("schedule", "sequences_per_rank", "placement")
        if not isinstance(data, dict) or "groups" in data or not all(name in data for name in names):
            return data
        rest = {name: value for name, value in data.items() if name not in names}
        replicas = [list(range(len(data["sequences_per_rank"])))]
        return {**rest, "groups": [{"replicas": replicas, **{name: data[name] for name in names}}]}

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        model, train, cluster = self.inputs.model, self.inputs.train, self.inputs.cluster
        ranks = self.used_ranks
        if len(set(ranks)) != len(ranks) or max(ranks) >= cluster.world_size:
            raise ValueError(f"groups: ranks must be below {cluster.world_size} and in one group each")
        if len(self.memory) != cluster.world_size:
            raise ValueError(f"memory: {len(self.memory)} ranks, the cluster has {cluster.world_size} devices")
        nodes = [cluster.nodes[index] for index in cluster.group_of_rank]
        kinds = [(node.device, str(node.network), str(node.interconnect)) for node in nodes]
        for index, group in enumerate(self.groups):
            if len({tuple(kinds[rank] for rank in replica) for replica in group.replicas}) > 1:
                raise ValueError(f"groups.{index}.replicas: they differ in their devices")
            shape = (len(group.placement), group.layout.experts)
            if shape != (model.layers, model.experts):
                raise ValueError(
                    f"groups.{index}.placement: {shape[0]} layers of {shape[1]} experts, "
                    f"the model has {model.layers} of {model.experts}"
                )
        if self.inputs.expert_load:
            self.inputs.expert_load.check(model, "inputs.expert_load")
        batch = sum(len(group.replicas) * group.sequences for group in self.groups)
        if batch != train.global_batch_sequences:
            raise ValueError(
                f"groups: {batch} sequences an iteration, "
                f"train.global_batch_sequences is {train.global_batch_sequences}"
            )
        return self

    @property
    def group_count(self) -> int:
        """Full copies of the model that train side by side."""
        return sum(len(group.replicas) for group in self.groups)

    @property
    def used_ranks(self) -> list[int]:
        """Ranks that are in a group."""
        return ranks_in(self.groups)

    @property
    def world(self) -> World:
        """All copies of the model (world_of)."""
        return world_of(self.groups)

    @property
    def layout(self) -> Layout:
        """The layout of a plan with one group over all ranks; else UserError."""
        self.check_one_group("plan")
        return self.groups[0].layout

    def check_one_group(self, source: str) -> None:
        """UserError unless one group holds all ranks."""
        if self.group_count > 1:
            raise UserError(
                f"{source}: field groups: {self.group_count} of them, this works on one: plan --max-groups 1"
            )
        if len(self.groups[0].replicas[0]) != self.inputs.cluster.world_size:
            raise UserError(
                f"{source}: field groups: devices of the cluster are left out, this works on all: describe a cluster "
                "without them and plan that"
            )

    def verify(self, source: str) -> None:
        """UserError if an input was edited after planning, so that its hash no longer matches."""
        hashes = self.inputs.hashes()
        for name in sorted(hashes.keys() | self.inputs_sha256.keys()):
            if hashes.get(name) != self.inputs_sha256.get(name):
                raise UserError(
                    f"{source}: field inputs.{name}: its hash does not match inputs_sha256.{name}: "
                    "the input was changed after planning; run `hetermoe plan` again"
                )

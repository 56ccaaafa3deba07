"""RunSpec (run.yaml): the plan plus the resolved options. A worker reads this file and nothing else."""

from typing import Literal

from pydantic import Field, model_validator

from hetermoe_cli.spec.base import NonNegativeInt, PositiveFloat, PositiveInt, Spec
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.plan import Group, Plan, world_of
from hetermoe_cli.spec.profile import Precision
from hetermoe_cli.spec.rebalance import Rebalance
from hetermoe_cli.spec.world import World

LAUNCHER = "HETERMOE_LAUNCHER"  # variable: the process id of the launcher, without which workers end


class Emulation(Spec):
    """The plan's model is nominal: costs are read for it. `executed` is what really runs, stretched to those costs.

    Nominal rows of an action = real rows x nominal tokens / real tokens; all seconds are multiplied by `time_scale`.
    """

    executed: ModelConfig
    sequence_length: PositiveInt
    time_scale: PositiveFloat

    def mismatch(self, nominal: ModelConfig) -> str:
        """The first field in which `executed` must be like the plan's model and is not; empty if there is none."""
        for field in ("layers", "experts", "top_k"):
            found, wanted = getattr(self.executed, field), getattr(nominal, field)
            if found != wanted:
                return f"{field} is {found}, the plan's model has {wanted}"
        return ""


class RunSpec(Spec):
    """One training run. Paths are absolute; `sources` empty means the default corpus. `weights_from`: a folder
    of Hugging Face's weights to begin with.

    Every `drift_every` steps (0: never) measured load and speeds are compared with what the placement was solved for;
    `rebalance`: experts move then, where that pays. `rebalanced`: where they had moved to when the run resumes.
    """

    kind: Literal["run"] = "run"
    schema_version: Literal[1] = 1
    plan: Plan
    folder: str
    sources: list[str] = Field(default_factory=list)
    corpus_sha256: str
    validation_share: PositiveFloat = Field(default=0.05, lt=1)
    precision: Precision
    router: Literal["learned", "balanced"] = "learned"
    steps: PositiveInt
    weights_from: str | None = None
    resume_from: str | None = None
    start_step: NonNegativeInt = 0
    checkpoint_every: NonNegativeInt = 0
    keep_checkpoints: PositiveInt = 2
    validate_every: NonNegativeInt = 0
    validation_batches: PositiveInt = 4
    trace_steps: NonNegativeInt = 5
    threads_per_rank: PositiveInt = 1
    drift_every: NonNegativeInt = 20
    rebalance: bool = False
    rebalanced: Rebalance | None = None
    emulation: Emulation | None = None

    @model_validator(mode="after")
    def _check(self) -> "RunSpec":
        if self.emulation and (problem := self.emulation.mismatch(self.plan.inputs.model)):
            raise ValueError(f"emulation.executed.{problem}")
        if len(self.plan.used_ranks) < self.plan.inputs.cluster.world_size:
            raise ValueError("plan.groups: a worker is started for every device, so none may be left out")
        if self.rebalanced and not self.rebalanced.is_of(self.plan.groups):
            raise ValueError("rebalanced: its experts moved from their places in another plan")
        return self

    @property
    def model(self) -> ModelConfig:
        """The model that is really trained."""
        return self.emulation.executed if self.emulation else self.plan.inputs.model

    @property
    def groups(self) -> list[Group]:
        """The plan's groups with the experts where they are now."""
        return self.rebalanced.groups if self.rebalanced else self.plan.groups

    @property
    def world(self) -> World:
        """All copies of the model, with the experts where they are now."""
        return world_of(self.groups)

    @property
    def nodes(self) -> list[list[int]]:
        """The ranks of every node that workers start on; an emulated run has one."""
        return [list(range(self.world.size))] if self.emulation else self.plan.inputs.nodes

    @property
    def predicted_seconds(self) -> float:
        """Of an iteration, as predicted for where the experts are now."""
        found = self.rebalanced or self.plan.predicted
        return found.iteration_seconds * self.time_scale

    @property
    def rank_precisions(self) -> list[Precision]:
        """What every rank computes in; rows and shared gradients travel in `precision`."""
        devices, train = self.plan.inputs.devices(), self.plan.inputs.train
        return [self.precision if self.emulation else train.precision_of(device.type) for device in devices]

    @property
    def sequence_length(self) -> int:
        """The sequence length that is really trained."""
        return self.emulation.sequence_length if self.emulation else self.plan.inputs.train.sequence_length

    def tokens_per_second(self, iteration_seconds: float) -> float:
        """Tokens/s of an iteration that took so long here; of an emulated run, nominal tokens a nominal second."""
        train = self.plan.inputs.train
        return train.tokens * self.time_scale / iteration_seconds

    @property
    def row_scale(self) -> float:
        """Nominal rows per real row."""
        return self.plan.inputs.train.sequence_length / self.sequence_length

    @property
    def time_scale(self) -> float:
        """Seconds of the run per nominal second."""
        return self.emulation.time_scale if self.emulation else 1.0

"""TrainSpec: what to train for; it shapes the plan."""

from typing import Literal

from pydantic import Field, model_validator

from hetermoe_cli.spec.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Spec
from hetermoe_cli.spec.profile import Precision

# Stages that run again in backward instead of keeping their activations; a head never does.
Recompute = Literal["none", "attention", "experts", "all"]


class TrainSpec(Spec):
    """Batch, precision and optimizer of a run. The learning rate warms up linearly, then follows a cosine."""

    kind: Literal["train"] = "train"
    schema_version: Literal[1] = 1
    sequence_length: PositiveInt
    global_batch_sequences: PositiveInt
    precision: Precision = "fp16"
    recompute: Recompute | Literal["auto"] = "auto"
    steps: PositiveInt = 100
    learning_rate: PositiveFloat = 1e-3
    minimum_learning_rate_ratio: NonNegativeFloat = Field(default=0.1, le=1)
    warmup_steps: NonNegativeInt = 10
    weight_decay: NonNegativeFloat = 0.1
    beta1: NonNegativeFloat = Field(default=0.9, lt=1)
    beta2: NonNegativeFloat = Field(default=0.95, lt=1)
    adam_epsilon: PositiveFloat = 1e-8
    gradient_clip: PositiveFloat = 1.0
    seed: NonNegativeInt = 0
    memory_headroom: PositiveFloat = Field(default=0.9, le=1)

    @model_validator(mode="after")
    def _check(self) -> "TrainSpec":
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is larger than steps {self.steps}")
        return self

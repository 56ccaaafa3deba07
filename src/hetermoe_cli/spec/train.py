"""TrainSpec: what to train for; it shapes the plan."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hetermoe_cli.spec.base import ExtendedSpec, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from hetermoe_cli.spec.profile import Precision

# Stages that run again in backward instead of keeping their activations; a head never does.
Recompute = Literal["none", "attention", "experts", "all", "full"]  # full: experts do not even keep their rows
# The dense part's state: whole on every attending rank; its optimizer states (ZeRO-1), or also its weights and
# gradients, in equal shares over a group's attending ranks, with the weights gathered in every forward and backward.
DenseState = Literal["replicated", "optimizer", "full"]
# How a token's row travels: to every expert that it chose, or once to every device that hosts some of them.
Dispatch = Literal["per_expert", "per_device"]
# Text is packed into sequences without gaps, whatever its documents' lengths. "joined": attention crosses from one
# document to the next; "masked": it does not, and positions start again in each.
Documents = Literal["joined", "masked"]


class TrainSpec(ExtendedSpec):
    """Batch, precision, text and optimizer of a run. The learning rate warms up linearly, then follows a cosine.

    Every text file is a document, or several where `document_separator` (such as <|endoftext|>) stands between them.
    In token files the id `document_end` ends a document (of text, 0 is a byte that no text holds).
    `document_tokens`: how many tokens the document of an average token has, for predictions of masked documents;
    without it they take a sequence as one document, which is an upper bound.
    """

    later: ClassVar[frozenset[str]] = frozenset(
        {"dense_state", "dispatch", "device_precision"}
        | {"documents", "document_separator", "document_tokens", "document_end"}
    )

    kind: Literal["train"] = "train"
    schema_version: Literal[1] = 1
    sequence_length: PositiveInt
    global_batch_sequences: PositiveInt
    precision: Precision = "fp16"  # also what rows and gradients of what several ranks share are exchanged in
    device_precision: dict[str, Precision] = Field(default_factory=dict)  # of these device types instead
    recompute: Literal[Recompute, "auto"] = "auto"  # auto: full only for models of more than two experts a token
    dense_state: Literal[DenseState, "auto"] = "replicated"
    dispatch: Dispatch = "per_expert"
    documents: Documents = "joined"
    document_separator: str | None = Field(default=None, min_length=1)
    document_tokens: PositiveInt | None = None
    document_end: NonNegativeInt = 0
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

    def precision_of(self, device_type: str) -> Precision:
        """What devices of this type compute in."""
        return self.device_precision.get(device_type, self.precision)

    @property
    def tokens(self) -> int:
        """Of an iteration."""
        return self.global_batch_sequences * self.sequence_length

    @property
    def attention_tokens(self) -> int:
        """What one causal attention goes over, as predictions take it: a document, at most a sequence."""
        return min(self.document_tokens or self.sequence_length, self.sequence_length)

    @model_validator(mode="after")
    def _check(self) -> "TrainSpec":
        if self.recompute == "full" and self.dense_state == "full":
            raise ValueError("recompute full needs the weights of two layers at once: not with dense_state full")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is larger than steps {self.steps}")
        if self.document_tokens and self.documents != "masked":
            raise ValueError("document_tokens: joined documents attend to each other: set documents: masked")
        used = {self.precision, *self.device_precision.values()}
        if "fp64" in used and len(used) > 1:
            raise ValueError("device_precision: fp64 keeps fp64 optimizer states, so it cannot be mixed with another")
        return self

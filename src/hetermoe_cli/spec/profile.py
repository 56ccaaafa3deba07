"""Profile: how fast one device type runs attention, experts and the head, and how much memory they take."""

from datetime import date
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hetermoe_cli.spec.base import ExtendedSpec, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Spec
from hetermoe_cli.spec.model import LayerShape

Precision = Literal["fp16", "bf16", "fp32", "fp64"]
BYTES_PER_ELEMENT: dict[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}


class Timing(Spec):
    """Median seconds of one kernel group at one size; `saved_bytes` is what autograd keeps from forward to backward.

    `spread` is (75th - 25th percentile) / median over the repeats of forward + backward; null when modelled.
    """

    forward_seconds: PositiveFloat
    backward_seconds: PositiveFloat
    saved_bytes: NonNegativeInt
    spread: NonNegativeFloat | None = None


class AttentionPoint(Timing):
    """Combine of the layer before, attention, norms and gate, for `sequences` sequences."""

    sequence_length: PositiveInt
    sequences: PositiveInt


class DensePoint(AttentionPoint):
    """One dense layer: attention, norms and SwiGLU network, for `sequences` sequences."""


class ExpertPoint(Timing):
    """One SwiGLU expert on `tokens` rows; its share of several where the device runs them as one grouped product."""

    tokens: PositiveInt


class HeadPoint(Timing):
    """Final norm, LM head and loss on `tokens` tokens."""

    tokens: PositiveInt


class KernelTable(ExtendedSpec):
    """All measurements for one layer shape at one precision; `dense` where the shape has dense layers."""

    later: ClassVar[frozenset[str]] = frozenset({"dense"})

    shape: LayerShape
    precision: Precision
    attention: list[AttentionPoint] = Field(min_length=1)
    dense: list[DensePoint] = Field(default_factory=list)
    expert: list[ExpertPoint] = Field(min_length=1)
    head: list[HeadPoint] = Field(min_length=1)
    optimizer_seconds_per_parameter: PositiveFloat
    peak_bytes: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _check(self) -> "KernelTable":
        for name, sizes in (
            ("attention", [(p.sequence_length, p.sequences) for p in self.attention]),
            ("expert", [p.tokens for p in self.expert]),
            ("head", [p.tokens for p in self.head]),
        ):
            if sizes != sorted(set(sizes)):  # type: ignore[type-var]
                raise ValueError(f"{name}: points must be sorted by size, without duplicates")
        sizes = [(p.sequence_length, p.sequences) for p in self.attention if self.shape.dense_ffn_size]
        if sizes != [(p.sequence_length, p.sequences) for p in self.dense]:
            wanted = "points of the sizes of attention" if sizes else "no points, as its shape has no dense_ffn_size"
            raise ValueError(f"dense: expected {wanted}")
        return self


class DeviceFacts(Spec):
    """What NVML (or the operating system) says of the device; null where it does not say."""

    product: str | None = None
    compute_capability: str | None = None
    memory_bytes: PositiveInt | None = None
    driver: str | None = None
    power_limit_watts: PositiveFloat | None = None
    sm_clock_megahertz: PositiveInt | None = None
    memory_clock_megahertz: PositiveInt | None = None
    pcie_generation: PositiveInt | None = None
    pcie_width: PositiveInt | None = None
    ecc: bool | None = None
    mig: bool | None = None


class Profile(Spec):
    """One device type. `source` says whether figures were measured on it or derived from data sheets."""

    kind: Literal["profile"] = "profile"
    schema_version: Literal[1] = 1
    device: str
    accelerator: Literal["cpu", "cuda"]
    source: Literal["measured", "modelled"]
    date: date
    software: dict[str, str] = Field(default_factory=dict)
    comment: str = ""
    facts: DeviceFacts
    memory_bytes: PositiveInt
    framework_bytes: NonNegativeInt
    tables: list[KernelTable] = Field(min_length=1)

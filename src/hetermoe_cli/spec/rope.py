"""RoPE scaling as Hugging Face's configs spell it: how a model reads sequences longer than it was first trained on."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hetermoe_cli.spec.base import NonNegativeFloat, PositiveFloat, PositiveInt, Spec

Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class LinearScaling(Spec):
    """Positions divided by `factor`."""

    rope_type: Literal["linear"] = "linear"
    factor: Factor


class Llama3Scaling(Spec):
    """Llama 3.1: slow frequencies divided by `factor`, fast ones kept, a ramp between.

    Slow and fast: fewer than `low_freq_factor`, more than `high_freq_factor` turns in the first context length.
    """

    rope_type: Literal["llama3"] = "llama3"
    factor: Factor
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> "Llama3Scaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}"
            )
        return self


class YarnScaling(Spec):
    """YaRN (arXiv 2309.00071): the like with a ramp over dimensions, and cos and sin times `attention_factor`.

    That is 0.1 ln(factor) + 1 if absent; with `mscale` and `mscale_all_dim` (DeepSeek) a ratio of two such values.
    """

    rope_type: Literal["yarn"] = "yarn"
    factor: Factor
    original_max_position_embeddings: PositiveInt
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: NonNegativeFloat | None = None
    mscale_all_dim: NonNegativeFloat | None = None
    truncate: bool = True

    @model_validator(mode="after")
    def _check(self) -> "YarnScaling":
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} must be above beta_slow {self.beta_slow}")
        return self


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="rope_type")]

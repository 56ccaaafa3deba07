"""ExpertLoad: which share of a layer's rows each expert gets, instead of equal ones, and how that moves."""

from math import isfinite
from typing import Literal

from pydantic import Field, model_validator

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.base import NonNegativeFloat, Spec
from hetermoe_cli.spec.model import ModelConfig

ROUNDING = 1.01  # written shares may be rounded: a token still visits an expert once at most


class ExpertLoad(Spec):
    """`layers[layer][expert]`: rows, or shares of them, in any unit that is one within a layer.

    `source` says where the figures come from. `samples`: the same of single steps, where it is known how the load moves
    from step to step; a plan's seconds are their mean. A mean load is more even than any step's.
    """

    kind: Literal["expert_load"] = "expert_load"
    schema_version: Literal[1] = 1
    source: str = ""
    layers: list[list[NonNegativeFloat]] = Field(min_length=1)
    samples: list[list[list[NonNegativeFloat]]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> "ExpertLoad":
        self._check_layers(self.layers, "layers")
        for number, layers in enumerate(self.samples):
            if len(layers) != len(self.layers):
                raise ValueError(f"samples.{number}: {len(layers)} layers, layers has {len(self.layers)}")
            self._check_layers(layers, f"samples.{number}")
        return self

    def _check_layers(self, layers: list[list[float]], field: str) -> None:
        for layer, values in enumerate(layers):
            if len(values) != len(self.layers[0]):
                raise ValueError(f"{field}.{layer}: {len(values)} experts, layers.0 has {len(self.layers[0])}")
            if not sum(values) > 0:
                raise ValueError(f"{field}.{layer}: no expert gets a row")
            if not isfinite(sum(values)):
                raise ValueError(f"{field}.{layer}: the figures are too large to add up: write shares")

    @property
    def steps(self) -> list["ExpertLoad"]:
        """The load of every sample; without samples the load itself."""
        return [ExpertLoad(source=self.source, layers=layers) for layers in self.samples] or [self]

    @property
    def shares(self) -> list[list[float]]:
        """[layers][experts] shares of the layer's rows."""
        return [[value / sum(values) for value in values] for values in self.layers]

    @property
    def imbalance(self) -> list[float]:
        """Per layer, the hottest expert's rows over the mean."""
        return [max(values) * len(values) / sum(values) for values in self.layers]

    def check(self, model: ModelConfig, source: str) -> None:
        """UserError if it is another model's, or if an expert gets more rows than there are tokens."""
        found = (len(self.layers), len(self.layers[0]))
        if found != (model.layers, model.experts):
            raise UserError(
                f"{source}: field layers: {found[0]} layers of {found[1]} experts, model {model.name} has "
                f"{model.layers} of {model.experts}: name a load of this model"
            )
        self._check_hottest(model, source, "layers")
        for number, step in enumerate(self.steps if self.samples else []):
            step._check_hottest(model, source, f"samples.{number}")

    def _check_hottest(self, model: ModelConfig, source: str, field: str) -> None:
        for layer, shares in enumerate(self.shares):
            hottest = max(shares)
            if hottest * model.top_k > ROUNDING:
                raise UserError(
                    f"{source}: field {field}.{layer}.{shares.index(hottest)}: {hottest:.0%} of the layer's rows, but "
                    f"with top-{model.top_k} an expert gets at most {1 / model.top_k:.0%}: check the counts"
                )

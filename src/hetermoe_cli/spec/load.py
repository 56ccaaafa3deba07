"""ExpertLoad: which share of a layer's rows each expert gets, instead of equal ones."""

from typing import Literal

from pydantic import Field, model_validator

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.base import NonNegativeFloat, Spec
from hetermoe_cli.spec.model import ModelConfig

ROUNDING = 1.01  # written shares may be rounded: a token still visits an expert once at most


class ExpertLoad(Spec):
    """`layers[layer][expert]`: rows, or shares of them, in any unit that is one within a layer.

    `source` says where the figures come from.
    """

    kind: Literal["expert_load"] = "expert_load"
    schema_version: Literal[1] = 1
    source: str = ""
    layers: list[list[NonNegativeFloat]] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "ExpertLoad":
        for layer, values in enumerate(self.layers):
            if len(values) != len(self.layers[0]):
                raise ValueError(f"layers.{layer}: {len(values)} experts, layers.0 has {len(self.layers[0])}")
            if not sum(values) > 0:
                raise ValueError(f"layers.{layer}: no expert gets a row")
        return self

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
        for layer, shares in enumerate(self.shares):
            hottest = max(shares)
            if hottest * model.top_k > ROUNDING:
                raise UserError(
                    f"{source}: field layers.{layer}.{shares.index(hottest)}: {hottest:.0%} of the layer's rows, but "
                    f"with top-{model.top_k} an expert gets at most {1 / model.top_k:.0%}: check the counts"
                )

"""Parts: the modules that one rank holds under a layout."""

import torch
from torch import nn

from hetermoe_cli.model.attention import Router
from hetermoe_cli.model.moe import ExpertGroup
from hetermoe_cli.model.transformer import DenseModel, initialise
from hetermoe_cli.runtime.mesh import Mesh
from hetermoe_cli.runtime.stage import ExpertParts
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.plan import Layout

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Parts(nn.Module):
    """`dense` on attending ranks, and the local experts of every layer (possibly none)."""

    def __init__(self, config: ModelConfig, layout: Layout, rank: int, router: Router = "learned") -> None:
        super().__init__()
        attends = bool(layout.sequences_per_rank[rank])
        self.dense = DenseModel(config, router) if attends else None
        self.experts = nn.ModuleList(
            ExpertParts(
                ExpertGroup(config, layer, placement.experts[rank]),
                ExpertGroup(config, layer, placement.replicated if attends else []),
            )
            for layer, placement in enumerate(layout.placement)
        )
        self.dtype = torch.get_default_dtype()

    def experts_of(self, layer: int) -> ExpertParts:
        """The local experts of a layer."""
        parts = self.experts[layer]
        assert isinstance(parts, ExpertParts)
        return parts

    def shared_parameters(self) -> list[nn.Parameter]:
        """What every attending rank holds a copy of."""
        dense = list(self.dense.parameters()) if self.dense else []
        return dense + [p for layer in range(len(self.experts)) for p in self.experts_of(layer).replicated.parameters()]

    def own_parameters(self) -> list[nn.Parameter]:
        """What exists once in the world: hosted experts."""
        return [p for layer in range(len(self.experts)) for p in self.experts_of(layer).hosted.parameters()]


def build_parts(
    config: ModelConfig, layout: Layout, mesh: Mesh, precision: str, seed: int, router: Router = "learned"
) -> Parts:
    """This rank's modules on its device, initialised equally under every layout."""
    parts = Parts(config, layout, mesh.rank, router)
    parts.dtype = DTYPES[precision]
    parts.to(device=mesh.device, dtype=parts.dtype)
    initialise(parts, config, seed)
    return parts

"""The dense part that an attending rank holds, and the single-device reference model."""

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from hetermoe_cli.model.attention import AttentionBlock, Routed, Router
from hetermoe_cli.model.moe import ExpertGroup, combine
from hetermoe_cli.spec.model import ModelConfig


class DenseModel(nn.Module):
    """Everything but the experts: embedding, attention blocks, final norm, head."""

    def __init__(self, config: ModelConfig, router: Router = "learned") -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(AttentionBlock(config, router) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def stage(self, layer: int, hidden: Tensor) -> Routed:
        """Attention stage of `layer` on hidden [B, S, H]."""
        routed: Routed = self.layers[layer](hidden)
        return routed

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropy in nats; hidden [B, S, H], targets [B, S]. Scalar."""
        logits = self.head(self.norm(hidden))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


class Transformer(nn.Module):
    """The whole model on one device: what every distributed run is compared with."""

    def __init__(self, config: ModelConfig, router: Router = "learned") -> None:
        super().__init__()
        self.config = config
        self.dense = DenseModel(config, router)
        self.experts = nn.ModuleList(
            ExpertGroup(config, layer, range(config.experts)) for layer in range(config.layers)
        )

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropy in nats; tokens and targets [B, S] int64. Scalar."""
        hidden = self.dense.embedding(tokens)
        for layer, group in enumerate(self.experts):
            routed = self.dense.stage(layer, hidden)
            order = routed.experts.flatten().argsort(stable=True)
            counts = routed.experts.flatten().bincount(minlength=self.config.experts).tolist()
            outputs = group(routed.rows[order // self.config.top_k], counts)
            in_token_order = torch.empty_like(outputs).index_copy(0, order, outputs)
            hidden = combine(
                routed.hidden, in_token_order.view(len(routed.rows), self.config.top_k, -1), routed.weights
            )
        return self.dense.loss(hidden, targets)


def initialise(parts: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every tensor from a generator seeded by (seed, name), so that any layout starts from equal weights.

    Matrices are normal with config.initializer_range, norms are ones.
    """
    with torch.no_grad():
        for name, tensor in named_tensors(parts).items():
            if tensor.dim() == 1:
                tensor.fill_(1.0)
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            tensor.copy_(values * config.initializer_range)


def parameter_slices(parts: nn.Module) -> dict[str, tuple[nn.Parameter, int | None]]:
    """Layout-independent name -> (parameter, expert index in it or None). Walks DenseModel and ExpertGroup modules."""
    result: dict[str, tuple[nn.Parameter, int | None]] = {}
    for module in parts.modules():
        if isinstance(module, DenseModel):
            result |= {name: (parameter, None) for name, parameter in module.named_parameters()}
        elif isinstance(module, ExpertGroup):
            result |= {name: (parameter, index) for name, parameter, index in module.named_slices()}
    return result


def named_tensors(parts: nn.Module) -> dict[str, Tensor]:
    """Layout-independent name -> detached view of the weights."""
    return {
        name: parameter.detach() if index is None else parameter.detach()[index]
        for name, (parameter, index) in parameter_slices(parts).items()
    }

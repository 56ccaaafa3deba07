"""The dense part that an attending rank holds, and the single-device reference model."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hetermoe_cli.model.kernels.documents import Documents, find_documents
from hetermoe_cli.model.kernels.head_loss import summed_cross_entropy
from hetermoe_cli.model.layers.attention import AttentionBlock, DenseBlock, Routed
from hetermoe_cli.model.layers.embedding import Embedding
from hetermoe_cli.model.layers.gate import Router
from hetermoe_cli.model.layers.moe import ExpertGroup
from hetermoe_cli.model.layers.norm import RMSNorm
from hetermoe_cli.spec.model import ModelConfig


class DenseModel(nn.Module):
    """Everything but the experts: embedding, dense layers, attention blocks of the MoE layers, final norm, head.

    With `document_end`, the token that ends a document, attention and positions stay inside documents. `layers`: those
    of a pipeline stage; what other stages have is not there: embedding and dense layers are on the first one, norm and
    head on the last, unless `head` says otherwise.
    """

    def __init__(
        self,
        config: ModelConfig,
        router: Router = "learned",
        document_end: int | None = None,
        layers: range | None = None,
        head: bool | None = None,
    ) -> None:
        super().__init__()
        self.document_end = document_end
        layers = range(config.layers) if layers is None else layers
        first, last = layers.start == 0, layers.stop == config.layers if head is None else head
        self.embedding = _embedding(config) if first else nn.Identity()
        self.dense_layers = nn.ModuleList(DenseBlock(config) for _ in range(first * config.dense_layers))
        self.layers = nn.ModuleList(
            AttentionBlock(config, router) if layer in layers else nn.Identity() for layer in range(config.layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_epsilon) if last else nn.Identity()
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if last else nn.Identity()

    def documents(self, tokens: Tensor) -> Documents | None:
        """What the stages need to know of tokens [B, S], on the CPU; None where attention does not stop at borders."""
        if self.document_end is None:
            return None
        return find_documents(tokens, self.document_end, next(self.parameters()).device)

    def embed(self, tokens: Tensor, documents: Documents | None = None) -> Tensor:
        """What the first MoE layer reads: embedding and dense layers on tokens [B, S]; [B, S, H]."""
        hidden: Tensor = self.embedding(tokens)
        for block in self.dense_layers:
            hidden = block(hidden, documents)
        return hidden

    def stage(self, layer: int, hidden: Tensor, documents: Documents | None = None) -> Routed:
        """Attention stage of `layer` on hidden [B, S, H]."""
        routed: Routed = self.layers[layer](hidden, documents)
        return routed

    def loss(self, hidden: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
        """Summed cross entropy in nats, in fp32 or wider, whose gradients come times `scale`; hidden [B, S, H], targets
        [B, S]. Scalar."""
        assert isinstance(self.head, nn.Linear)
        normed: Tensor = self.norm(hidden)
        return summed_cross_entropy(normed.flatten(0, 1), self.head.weight, targets.flatten(), scale)

    def update_biases(self, rows: Tensor) -> None:
        """Move the gates' selection biases, if any, after a step in which the experts got rows [layers, E] float64."""
        for block, loads in zip(self.layers, rows, strict=True):
            if isinstance(block, AttentionBlock):
                block.gate.update_bias(loads)


def _embedding(config: ModelConfig) -> Embedding:
    # torch's own values are overwritten anyway; on the meta device they load its compiler, 55 MB and a second
    values = torch.empty(config.vocab_size, config.hidden_size)
    return Embedding(config.vocab_size, config.hidden_size, _weight=values)


class Outcome(NamedTuple):
    """Sums over tokens: `loss` cross entropy in nats, `router_losses` [2] auxiliary and z-loss with their coefficients;
    `expert_rows` [layers, E] float64."""

    loss: Tensor
    router_losses: Tensor
    expert_rows: Tensor


class Transformer(nn.Module):
    """The whole model on one device: what every distributed run is compared with."""

    def __init__(self, config: ModelConfig, router: Router = "learned", document_end: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.dense = DenseModel(config, router, document_end)
        self.experts = nn.ModuleList(
            ExpertGroup(config, layer, range(config.experts)) for layer in range(config.layers)
        )

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """What training minimises, summed over tokens; tokens and targets [B, S] int64. Scalar."""
        outcome = self.run(tokens, targets)
        return outcome.loss + outcome.router_losses.sum()

    def run(self, tokens: Tensor, targets: Tensor) -> Outcome:
        """One pass over tokens and targets, [B, S] int64 each."""
        documents = self.dense.documents(tokens)
        hidden = self.dense.embed(tokens, documents)
        router_losses, rows = hidden.new_zeros(2), []
        for layer, group in enumerate(self.experts):
            routed = self.dense.stage(layer, hidden, documents)
            chosen, count = routed.experts.flatten(), self.config.experts
            counts = chosen.bincount(minlength=count)[:count]
            order = chosen.argsort(stable=True)[: int(counts.sum())]  # dropped ones sort last
            outputs = group(routed.rows[order // self.config.top_k], counts.tolist())
            in_token_order = outputs.new_zeros(len(chosen), outputs.shape[-1]).index_copy(0, order, outputs)
            chosen_outputs = in_token_order.view(*routed.weights.shape, -1)
            hidden = routed.hidden + (chosen_outputs * routed.weights[..., None]).sum(dim=1).view_as(hidden)
            rows.append(counts.double())
            if routed.losses is not None:
                router_losses = router_losses + routed.losses
        return Outcome(self.dense.loss(hidden, targets), router_losses, torch.stack(rows))


def initialise(parts: nn.Module, config: ModelConfig, seed: int) -> None:
    """Give every tensor its first values (`initialise_tensor`)."""
    for name, tensor in named_tensors(parts).items():
        initialise_tensor(name, tensor, config, seed)


def initialise_tensor(name: str, tensor: Tensor, config: ModelConfig, seed: int) -> None:
    """Fill a tensor from a generator seeded by (seed, name), so that any layout starts from equal weights.

    Matrices are normal with config.initializer_range, norms are ones.
    """
    if tensor.dim() == 1:
        tensor.fill_(1.0)
        return
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
    tensor.copy_(values.mul_(config.initializer_range))


def parameter_slices(parts: nn.Module) -> dict[str, tuple[nn.Parameter, int | None]]:
    """Layout-independent name -> (parameter, expert index in it or None). Walks DenseModel and ExpertGroup modules."""
    result: dict[str, tuple[nn.Parameter, int | None]] = {}
    for module in parts.modules():
        if isinstance(module, DenseModel):
            result |= {name: (parameter, None) for name, parameter in module.named_parameters()}
        elif isinstance(module, ExpertGroup):
            result |= {name: (parameter, index) for name, parameter, index in module.named_slices()}
    return result


def named_state(parts: nn.Module) -> dict[str, Tensor]:
    """Layout-independent name -> what training changes besides parameters: selection biases of attending ranks."""
    models = (module for module in parts.modules() if isinstance(module, DenseModel))
    return {name: buffer for model in models for name, buffer in model.named_buffers()}


def named_tensors(parts: nn.Module) -> dict[str, Tensor]:
    """Layout-independent name -> detached view of the weights."""
    return {
        name: parameter.detach() if index is None else parameter.detach()[index]
        for name, (parameter, index) in parameter_slices(parts).items()
    }

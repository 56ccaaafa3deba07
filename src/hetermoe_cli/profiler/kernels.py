"""Microbenchmarks of the engine's own stages: attention, dense layer, experts, head, optimizer -> KernelTable.

A stage is cut as the engine cuts it: its inputs are detached leaves, its backward begins with a gradient
for every output. Rows are put into the order of messages and back (crossing.py). Parameters accumulate into
existing gradients, as from the second micro-batch on.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.kernels.grouped import has_grouped_gemm
from hetermoe_cli.model.layers.moe import ExpertGroup
from hetermoe_cli.model.transformer import DenseModel, initialise
from hetermoe_cli.profiler.crossing import ExpertSide, TokenSide
from hetermoe_cli.profiler.measure import (
    Caches,
    Case,
    Effort,
    Progress,
    Samples,
    Stopwatch,
    measure,
    saved_bytes,
)
from hetermoe_cli.profiler.tables import rounded
from hetermoe_cli.runtime.modules.parts import DTYPES
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.profile import AttentionPoint, DensePoint, ExpertPoint, HeadPoint, KernelTable, Precision

# Experts in one grouped product, of which one's share is kept. Ranks hold from one to many: on a CPU one alone takes
# 0.9 to 2.5 times as long as one of four (the fewer rows the more), one of 16 takes 0.8 to 1.3 times.
_GROUP = 4
_AMPERE = (8, 0)  # first compute capability with bf16; is_bf16_supported() also says True where it is emulated


@dataclass(frozen=True)
class Sizes:
    """Where to measure; `tokens` serves experts and head."""

    sequence_lengths: tuple[int, ...]
    sequences: tuple[int, ...]
    tokens: tuple[int, ...]


class Timed(TypedDict):
    """The fields of a Timing."""

    forward_seconds: float
    backward_seconds: float
    saved_bytes: int
    spread: float


def profile_kernels(
    config: ModelConfig,
    precision: Precision,
    device: torch.device,
    sizes: Sizes,
    effort: Effort,
    progress: Progress | None = None,
) -> KernelTable:
    """Measure one layer of `config` on `device`.

    Seconds are medians. `peak_bytes` is the allocator's peak over all points on CUDA, null on the CPU.
    UserError if the device lacks the precision, or a size does not fit into its memory.
    """
    require_precision(precision, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    bench = Bench(config, DTYPES[precision], device)
    lengths = list(itertools.product(sorted(set(sizes.sequence_lengths)), sorted(set(sizes.sequences))))
    tokens = sorted(set(sizes.tokens))
    groups = [
        [bench.attention(length, count) for length, count in lengths],
        [bench.dense_layer(length, count) for length, count in lengths if config.dense_layers],
        [bench.expert(count) for count in tokens],
        [bench.head(count) for count in tokens],
    ]
    cases = list(itertools.chain.from_iterable(groups))
    kept = [saved_bytes(case, bench.parameters) // case.parts for case in cases]
    samples = measure(cases, device, effort, progress)
    timed = (timing(*figures) for figures in zip(cases, samples, kept, strict=True))
    attention, dense, expert, head = (list(itertools.islice(timed, len(group))) for group in groups)
    return KernelTable(
        shape=config.shape,
        precision=precision,
        attention=[
            AttentionPoint(sequence_length=length, sequences=count, **point)
            for (length, count), point in zip(lengths, attention, strict=True)
        ],
        dense=[
            DensePoint(sequence_length=length, sequences=count, **point)
            for (length, count), point in zip(lengths, dense, strict=False)  # none without dense layers
        ],
        expert=[ExpertPoint(tokens=count, **point) for count, point in zip(tokens, expert, strict=True)],
        head=[HeadPoint(tokens=count, **point) for count, point in zip(tokens, head, strict=True)],
        optimizer_seconds_per_parameter=bench.optimizer_seconds(effort),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def require_precision(precision: Precision, device: torch.device) -> None:
    """UserError where measuring would time an emulation or fail."""
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < _AMPERE:
        raise UserError("profile: precision bf16 needs compute capability 8.0 or newer; take fp16")


def timing(case: Case, samples: Samples, kept: int) -> Timed:
    """Medians, spread and saved bytes of one part of a case."""
    return {
        "forward_seconds": rounded(statistics.median(samples.forward) / case.parts),
        "backward_seconds": rounded(statistics.median(samples.backward) / case.parts),
        "saved_bytes": kept,
        "spread": round(samples.spread(), 4),
    }


class Bench:
    """One layer's modules on one device, and the cases that run them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.dense = DenseModel(config.model_copy(update={"layers": 1, "dense_layers": min(config.dense_layers, 1)}))
        grouped = has_grouped_gemm(torch.empty(0, device=device, dtype=dtype), (config.hidden_size, config.ffn_size))
        self.experts = _GROUP if grouped else 1
        self.group = ExpertGroup(config, layer=0, ids=range(self.experts))
        parts = nn.ModuleList([self.dense, self.group])
        initialise(parts, config, seed=0)
        parts.to(device=device, dtype=dtype)
        self.parameters = list(parts.parameters())
        for parameter in self.parameters:
            parameter.grad_dtype = torch.promote_types(dtype, torch.float32)  # as the engine accumulates them
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)

    def attention(self, length: int, sequences: int) -> Case:
        """Combine of the layer before, then attention, norms, gate and shared experts of this one."""
        side = TokenSide(sequences * length, self.config.top_k, self.device)

        def forward(leaves: list[Tensor]) -> list[Tensor]:
            routed = self.dense.stage(0, side.arrive(leaves[0]))
            losses = [] if routed.losses is None else [routed.losses]
            return [routed.hidden, *side.depart(routed.rows, routed.weights), *losses]

        label = f"attention of {sequences} x {length} tokens"
        return Case(label, lambda: [self._leaf(sequences, length, self.config.hidden_size)], forward)

    def dense_layer(self, length: int, sequences: int) -> Case:
        """One dense layer: attention, norms, SwiGLU network."""
        return Case(
            f"a dense layer on {sequences} x {length} tokens",
            lambda: [self._leaf(sequences, length, self.config.hidden_size)],
            lambda leaves: [self.dense.dense_layers[0](leaves[0])],
        )

    def expert(self, tokens: int) -> Case:
        """An expert on `tokens` rows: alone, or one of several where the engine runs those of a rank in one product."""
        count = self.experts * tokens
        side = ExpertSide(count, self.device)

        def forward(leaves: list[Tensor]) -> list[Tensor]:
            rows, weights = side.arrive(*leaves)
            return [side.depart(self.group(rows, [tokens] * self.experts, weights))]

        return Case(
            f"{self.experts} x an expert on {tokens} tokens",
            lambda: [self._leaf(count, self.config.hidden_size), self._leaf(count)],
            forward,
            parts=self.experts,
        )

    def head(self, tokens: int) -> Case:
        """Combine of the last layer, final norm, head and loss."""
        targets = torch.arange(tokens, device=self.device)[None] % self.config.vocab_size
        side = TokenSide(tokens, self.config.top_k, self.device)
        return Case(
            f"the head on {tokens} tokens",
            lambda: [self._leaf(1, tokens, self.config.hidden_size)],
            lambda leaves: [self.dense.loss(side.arrive(leaves[0]), targets)],
        )

    def optimizer_seconds(self, effort: Effort) -> float:
        """AdamW seconds per parameter, fused where supported; half precision keeps and updates fp32 masters."""
        weights: list[Tensor] = [*self.dense.layers.parameters(), *self.group.parameters()]
        masters = [w.detach().to(torch.promote_types(self.dtype, torch.float32), copy=True) for w in weights]
        step = adamw(masters).step
        samples, caches = [], Caches(self.device)
        for _ in range(effort.visits + 1):
            watch = Stopwatch(self.device)
            caches.empty()
            watch.mark()
            for master, weight in zip(masters, weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.to(master.dtype)
            step()
            if self.dtype != masters[0].dtype:
                with torch.no_grad():
                    torch._foreach_copy_(weights, masters)
            watch.mark()
            samples += watch.seconds()
        return rounded(statistics.median(samples[1:]) / sum(w.numel() for w in weights))

    def _leaf(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype, requires_grad=True)


def adamw(tensors: Sequence[Tensor]) -> torch.optim.AdamW:
    """Fused AdamW, or the plain one where this torch has no fused kernel for the device."""
    try:
        return torch.optim.AdamW(tensors, fused=True)
    except RuntimeError:
        return torch.optim.AdamW(tensors)

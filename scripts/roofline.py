"""Seconds and bytes of the kernel groups of one layer shape, from sustained rates: the model behind derive_profiles.py.

A plain sum, nothing overlaps inside a kernel group:

    seconds = GEMM flops / GEMM rate + attention-core flops / core rate + bytes / bandwidth + kernels x launch

`bytes` are what element-wise kernels read and write, each operation once, and the weights that the GEMMs read.
Backward: GEMM x2 (gradients of inputs and of weights), attention core x2.5 (FlashAttention 2, Dao 2023, recomputes
the scores: 5 products against 2), everything else x2.
"""

from dataclasses import dataclass

from hetermoe_cli.spec.model import NAMED_MODELS, LayerShape
from hetermoe_cli.spec.profile import BYTES_PER_ELEMENT, Precision

PRECISION: Precision = "fp16"  # what the paper trains in, and the only mixed precision that V100 and T4 have
LAUNCH_SECONDS = 5e-6  # one kernel launch, typical of CUDA drivers
ATTENTION_KERNELS, EXPERT_KERNELS, HEAD_KERNELS = 20, 4, 8  # launches of a forward, counted in model/*.py
BACKWARD, CORE_BACKWARD = 2.0, 2.5


@dataclass(frozen=True)
class Work:
    """One forward: GEMM flops, attention-core flops, bytes moved, kernels launched."""

    gemm: float
    core: float
    traffic: float
    kernels: int


@dataclass(frozen=True)
class Rates:
    """Sustained flop/s of GEMMs and of the attention core, bytes/s of memory."""

    gemm: float
    core: float
    bandwidth: float

    def forward(self, work: Work) -> float:
        """Seconds."""
        return work.core / self.core + self._rest(work)

    def backward(self, work: Work) -> float:
        """Seconds."""
        return CORE_BACKWARD * work.core / self.core + BACKWARD * self._rest(work)

    def _rest(self, work: Work) -> float:
        return work.gemm / self.gemm + work.traffic / self.bandwidth + work.kernels * LAUNCH_SECONDS


def attention_widths(shape: LayerShape) -> tuple[int, int, int]:
    """Widths of all queries and of all keys, and the number of experts that the gate scores.

    A LayerShape does not name the experts: the largest count of the named models of that shape stands in (the gate
    is less than 1 % of the flops).
    """
    experts = max((m.experts for m in NAMED_MODELS.values() if m.shape == shape), default=8)
    return shape.attention_heads * shape.head_size, shape.kv_heads * shape.head_size, experts


def attention_work(shape: LayerShape, length: int, sequences: int) -> Work:
    """Combine of the layer before, norms, projections, RoPE, causal attention, gate."""
    query, key, experts = attention_widths(shape)
    hidden, tokens, element = shape.hidden_size, length * sequences, BYTES_PER_ELEMENT[PRECISION]
    weights = hidden * (2 * query + 2 * key + experts)
    combine, norms, residual = (shape.top_k + 2) * hidden, 4 * hidden, 3 * hidden
    rope, repeat = 2 * (query + key), 2 * (key + query)
    moved = tokens * (combine + norms + residual + rope + repeat + 3 * experts) + weights
    causal_core = 2 * sequences * length**2 * query  # QK' and PV, 2 flops each, half of them masked
    return Work(2 * tokens * weights, causal_core, element * moved, ATTENTION_KERNELS)


def expert_work(shape: LayerShape, tokens: int) -> Work:
    """One SwiGLU expert."""
    weights = 3 * shape.hidden_size * shape.ffn_size
    moved = tokens * 3 * shape.ffn_size + weights
    return Work(2 * tokens * weights, 0, BYTES_PER_ELEMENT[PRECISION] * moved, EXPERT_KERNELS)


def head_work(shape: LayerShape, tokens: int) -> Work:
    """Combine, final norm, LM head, loss."""
    weights = shape.hidden_size * shape.vocab_size
    moved = tokens * ((shape.top_k + 4) * shape.hidden_size + 2 * shape.vocab_size) + weights
    return Work(2 * tokens * weights, 0, BYTES_PER_ELEMENT[PRECISION] * moved, HEAD_KERNELS)


def attention_saved_bytes(shape: LayerShape, length: int, sequences: int, element: int, fused_norm: bool = True) -> int:
    """What autograd and the stage keep of model/attention.py and combine, `element` bytes each; no parameters.

    Leaves hidden, expert outputs and weights; both residuals and both norms' outputs; rotated query, repeated key and
    value, attention output and its copy in token order (fp32 log-sum-exp beside it); gate scores, top k and their sum,
    int64 choices, inverse norms; once: cos and sin. Without a fused RMSNorm (the CPU) each norm keeps one tensor more.
    Grouped-query attention is assumed (without groups the whole qkv stays alive as value).
    """
    query, _, experts = attention_widths(shape)
    per_token = element * ((5 + shape.top_k) * shape.hidden_size + 5 * query + experts + 2 * shape.top_k + 1)
    per_token += (
        4 * shape.attention_heads + 8 * shape.top_k + 2 * 4 + (0 if fused_norm else 2 * element * shape.hidden_size)
    )
    return sequences * length * per_token + element * length * shape.head_size


def expert_saved_bytes(shape: LayerShape, tokens: int, element: int) -> int:
    """Rows, gate and up, silu(gate), their product."""
    return tokens * element * (shape.hidden_size + 4 * shape.ffn_size)


def head_saved_bytes(shape: LayerShape, tokens: int, element: int, fused_norm: bool = True) -> int:
    """Leaves hidden, expert outputs and weights; residual and its norm; log-probabilities, int64 targets."""
    norm = 1 if fused_norm else 2
    per_token = element * ((2 + shape.top_k + norm) * shape.hidden_size + shape.vocab_size + shape.top_k)
    return tokens * (per_token + 8 + 4)

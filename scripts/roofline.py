"""Seconds and bytes of the kernel groups of one layer shape, from sustained rates: the model behind derive_profiles.py.

A plain sum, nothing overlaps inside a kernel group:

    seconds = GEMM flops / GEMM rate + attention-core flops / core rate + bytes / bandwidth + kernels x launch

`bytes` are what element-wise kernels read and write, each operation once, and the weights that the GEMMs read.
Backward: GEMM x2 (gradients of inputs and of weights), everything else x2, but for the attention core: FlashAttention 2
(Dao 2023) recomputes the scores, so its products are 3 as wide as keys and 2 as wide as values against 1 and 1 of
forward. That is x2.5 where keys and values have one width and x2.6 for DeepSeek-V3's 192 and 128.

An attention stage of a model with shared experts runs them on its own tokens. Latent attention is counted as training
runs it: keys and values of all heads are projected up from the latents and go through the same core, values in their
own width (a kernel that pads them to the keys' width takes up to 20 % longer).
"""

from dataclasses import dataclass

from hetermoe_cli.spec.latent import LatentAttention
from hetermoe_cli.spec.model import LayerShape, logit_tokens
from hetermoe_cli.spec.named_models import NAMED_MODELS

ELEMENT_BYTES = 2  # fp16 and bf16
LAUNCH_SECONDS = 5e-6  # one kernel launch, typical of CUDA drivers
ATTENTION_KERNELS, EXPERT_KERNELS, HEAD_KERNELS = 20, 4, 4  # launches of a forward, counted in model/
PART_KERNELS = 12  # of a part of the head's tokens
LOGIT_BYTES, MATRIX_BYTES = 2 + 8 + 6 + 4, 4 + 12  # that a head moves for each (head_work)
DENSE_KERNELS = 12  # of a dense layer without its SwiGLU network: no combine, no gate
LATENT_KERNELS = 8  # more than ATTENTION_KERNELS: three projections, two norms, copies that join the parts of a head
QK_NORM_KERNELS = 2  # norms of queries and keys
BACKWARD = 2.0


@dataclass(frozen=True)
class Work:
    """One forward: GEMM flops, attention-core flops (and those of its backward), bytes moved, kernels launched."""

    gemm: float
    core: float
    core_backward: float
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
        return work.core_backward / self.core + BACKWARD * self._rest(work)

    def _rest(self, work: Work) -> float:
        return work.gemm / self.gemm + work.traffic / self.bandwidth + work.kernels * LAUNCH_SECONDS


@dataclass(frozen=True)
class Part:
    """What one way to attend, or the shared experts, add to an attention stage.

    `weights` are all read once; `moved` and `saved` count elements a token, `saved_bytes` other bytes a token.
    """

    weights: int
    moved: int
    saved: int
    saved_bytes: int = 0
    kernels: int = 0


def grouped(shape: LayerShape) -> Part:
    """GQA: projections, RoPE, keys and values repeated for their queries; norms of query and key where there are any.

    Saved: rotated query, repeated key and value, attention output and its copy in token order; for the norms the whole
    qkv and inverse norms in fp32. Groups are assumed (without them the whole qkv stays alive as value).
    """
    query, key = shape.attention_heads * shape.head_size, shape.kv_heads * shape.head_size
    rope = repeat = 2 * (query + key)
    return Part(
        weights=2 * shape.hidden_size * (query + key),
        moved=rope + repeat + shape.qk_norm * 2 * (query + key),
        saved=5 * query + shape.qk_norm * (query + 2 * key),
        saved_bytes=shape.qk_norm * 4 * (shape.attention_heads + shape.kv_heads),
        kernels=shape.qk_norm * QK_NORM_KERNELS,
    )


def latent(shape: LayerShape, sizes: LatentAttention) -> Part:
    """MLA: norms of both latents, RoPE on its part of the queries and on the shared key, heads joined from two parts.

    Saved: both latents and their norms, joined query and key, the up-projection that the values are a part of,
    attention output and its copy in token order; two inverse norms in fp32.
    """
    heads, ranks = shape.attention_heads, sizes.query_rank + sizes.key_value_rank
    rope, join = 2 * (heads + 1) * sizes.rope_size, 2 * 2 * heads * shape.head_size
    up = heads * (sizes.nope_size + sizes.value_size)
    return Part(
        weights=sizes.matrix_parameters(shape.hidden_size, heads),
        moved=2 * ranks + rope + join,
        saved=2 * ranks + sizes.rope_size + 2 * heads * shape.head_size + up + 2 * heads * sizes.value_size,
        saved_bytes=2 * 4,
        kernels=LATENT_KERNELS,
    )


def swiglu(hidden: int, width: int) -> Part:
    """A SwiGLU network added to the residual: shared experts of their widths together, or a dense layer's.

    Saved: gate and up, and what the last product reads; the rows are the norm's output.
    """
    if not width:
        return Part(0, 0, 0)
    return Part(weights=3 * hidden * width, moved=3 * width + 3 * hidden, saved=3 * width, kernels=EXPERT_KERNELS + 1)


def parts(shape: LayerShape, width: int) -> tuple[Part, Part]:
    """How the shape attends, and a SwiGLU network behind it."""
    attends = latent(shape, shape.latent) if shape.latent else grouped(shape)
    return attends, swiglu(shape.hidden_size, width)


def shared_width(shape: LayerShape) -> int:
    """Of the shared experts together."""
    return shape.shared_experts * shape.ffn_size


def gate_experts(shape: LayerShape) -> int:
    """The number of experts that the gate scores.

    A LayerShape does not name it: the largest count of the named models of that shape stands in (the gate is less than
    1 % of the flops).
    """
    return max((m.experts for m in NAMED_MODELS.values() if m.shape == shape), default=8)


def attention_work(shape: LayerShape, length: int, sequences: int) -> Work:
    """Combine of the layer before, norms, projections, RoPE, causal attention, gate, shared experts."""
    hidden, experts, added = shape.hidden_size, gate_experts(shape), parts(shape, shared_width(shape))
    combine = (shape.top_k + 2) * hidden
    return _stage_work(shape, length, sequences, added, combine + 3 * experts, hidden * experts, ATTENTION_KERNELS)


def dense_work(shape: LayerShape, length: int, sequences: int) -> Work:
    """A dense layer: norms, projections, RoPE, causal attention, SwiGLU network."""
    return _stage_work(shape, length, sequences, parts(shape, shape.dense_ffn_size), 0, 0, DENSE_KERNELS)


def _stage_work(
    shape: LayerShape, length: int, sequences: int, added: tuple[Part, Part], moved: int, weights: int, kernels: int
) -> Work:
    """Norms, residual and attention core with what `added` says; `moved` elements a token and `weights` more."""
    tokens, norms, residual = length * sequences, 4 * shape.hidden_size, 3 * shape.hidden_size
    weights += sum(part.weights for part in added)
    moved = tokens * (moved + norms + residual + sum(part.moved for part in added)) + weights
    key = shape.attention_heads * shape.head_size
    value = shape.attention_heads * (shape.latent.value_size if shape.latent else shape.head_size)
    pairs = sequences * length**2  # of query and key; half of them masked, 2 flops for each product
    kernels += sum(part.kernels for part in added)
    return Work(
        2 * tokens * weights, pairs * (key + value), pairs * (3 * key + 2 * value), ELEMENT_BYTES * moved, kernels
    )


def expert_work(shape: LayerShape, tokens: int) -> Work:
    """One SwiGLU expert."""
    weights = 3 * shape.hidden_size * shape.ffn_size
    moved = tokens * 3 * shape.ffn_size + weights
    return Work(2 * tokens * weights, 0, 0, ELEMENT_BYTES * moved, EXPERT_KERNELS)


def head_work(shape: LayerShape, tokens: int) -> Work:
    """Combine, final norm, LM head, loss; gradients are found with the loss, so a third of all (kernels/head_loss.py).

    Logits, in bytes: written 2, read twice and written in fp32 by softmax 8, scaled into their place 6, read by two
    products 4. For each part of the tokens the matrix is read twice, 4, and its gradient written, read and added to
    that of the parts before in fp32, 12.
    """
    weights, parts = shape.hidden_size * shape.vocab_size, -(-tokens // logit_tokens(shape.vocab_size))
    moved = ELEMENT_BYTES * tokens * (shape.top_k + 4) * shape.hidden_size
    found = LOGIT_BYTES * tokens * shape.vocab_size + MATRIX_BYTES * parts * weights
    kernels = HEAD_KERNELS + round(PART_KERNELS * parts / (1 + BACKWARD))
    return Work(2 * tokens * weights, 0, 0, moved + found / (1 + BACKWARD), kernels)


def attention_saved_bytes(shape: LayerShape, length: int, sequences: int, element: int) -> int:
    """What autograd and the stage keep of model/layers/attention.py, `element` bytes each; no parameters.

    What it reads, the second residual and both norms' outputs; what the parts keep (fp32 log-sum-exp beside it); gate
    scores, top k and their sum, int64 choices, inverse norms; once: cos and sin.
    """
    k, added = shape.top_k, parts(shape, shared_width(shape))
    elements = 4 * shape.hidden_size + gate_experts(shape) + k + 1
    return _stage_saved_bytes(shape, length, sequences, element, added, elements, 8 * k)


def dense_saved_bytes(shape: LayerShape, length: int, sequences: int, element: int) -> int:
    """What autograd keeps of a dense layer: both residuals, both norms' outputs; the rest as in an attention stage."""
    added = parts(shape, shape.dense_ffn_size)
    return _stage_saved_bytes(shape, length, sequences, element, added, 4 * shape.hidden_size, 0)


def _stage_saved_bytes(
    shape: LayerShape,
    length: int,
    sequences: int,
    element: int,
    added: tuple[Part, Part],
    elements: int,
    others: int,
) -> int:
    """`elements` and `others` (bytes) a token, and what `added`, attention core and norms keep."""
    elements += sum(part.saved for part in added)
    others += 4 * shape.attention_heads + 2 * 4 + sum(part.saved_bytes for part in added)
    rope = shape.latent.rope_size if shape.latent else shape.head_size
    return sequences * length * (element * elements + others) + element * length * rope


def expert_saved_bytes(shape: LayerShape, tokens: int, element: int) -> int:
    """Rows, their weights, gate and up."""
    return tokens * element * (shape.hidden_size + 1 + 2 * shape.ffn_size)


def head_saved_bytes(shape: LayerShape, tokens: int, element: int) -> int:
    """What it reads, and inverse norms of that: gradients are found with the loss."""
    return tokens * (element * shape.hidden_size + 4)

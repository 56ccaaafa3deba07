"""ModelConfig: a decoder of MoE layers."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from hetermoe_cli.spec.base import ExtendedSpec, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from hetermoe_cli.spec.latent import LatentAttention
from hetermoe_cli.spec.rope import RopeScaling

# Of ModelConfig, and what they are called in files; none of them changes a shape or a plan.
ROUTER_FIELDS = (
    "router_score",
    "router_renormalise",
    "router_scale",
    "router_balance",
    "router_auxiliary_loss",
    "router_bias_rate",
    "router_z_loss",
    "router_capacity",
)
MOST_LAYERS, MOST_EXPERTS = 1024, 4096  # plans list every expert of every layer; published models have a tenth of both
_LOGITS, _LEAST_TOKENS = 2**26, 1024  # at once; with fewer tokens adding up the matrix's gradients takes long


def logit_tokens(vocab_size: int) -> int:
    """Tokens whose logits the head has at a time."""
    return max(_LEAST_TOKENS, _LOGITS // vocab_size)


class LayerShape(ExtendedSpec):
    """What a kernel measurement depends on: the widths of one layer, of a dense layer (if the model begins with such
    layers) and of the head, and the rows combined a token.

    The number of experts and the gate's kind are not among them: they only enter the gate, less than 1 % of an
    attention stage's flops.
    """

    later: ClassVar[frozenset[str]] = frozenset({"shared_experts", "qk_norm", "latent", "dense_ffn_size"})

    hidden_size: PositiveInt
    ffn_size: PositiveInt
    attention_heads: PositiveInt
    kv_heads: PositiveInt
    head_size: PositiveInt
    top_k: PositiveInt
    vocab_size: PositiveInt
    shared_experts: NonNegativeInt = 0
    qk_norm: bool = False
    latent: LatentAttention | None = None
    dense_ffn_size: NonNegativeInt = 0

    def label(self) -> str:
        """Short text for errors and tables."""
        shared = f", {self.shared_experts} shared" if self.shared_experts else ""
        ranks = f", latent {self.latent.query_rank}/{self.latent.key_value_rank}" if self.latent else ""
        dense = f", dense ffn {self.dense_ffn_size}" if self.dense_ffn_size else ""
        norms = " normalised" if self.qk_norm else ""
        return (
            f"hidden {self.hidden_size}, ffn {self.ffn_size}{shared}{dense}, "
            f"heads {self.attention_heads}/{self.kv_heads}x{self.head_size}{norms}{ranks}, "
            f"top-{self.top_k}, vocab {self.vocab_size}"
        )


class ModelConfig(ExtendedSpec):
    """Decoder with GQA or latent attention (RoPE), RMSNorm, SwiGLU experts and a top-k gate.

    `layers` counts the MoE layers: those that have experts to place. `dense_layers` more come before them, whose SwiGLU
    network of width `dense_ffn_size` every token visits; attending devices run them within the first attention stage.
    (Hugging Face's num_hidden_layers is the sum of both, its first_k_dense_replace the latter.)

    The gate takes softmax or sigmoid scores of all experts, keeps the top k, renormalises them (not for k = 1) and
    multiplies by `router_scale`. Loads are balanced by an auxiliary loss per sequence, or by a bias that is added to
    the scores for the selection only and moves by `router_bias_rate` after each step, with or without that loss. Both
    losses are sums over layers: `router_auxiliary_loss` x mean over sequences, `router_z_loss` x mean over tokens.
    With `router_capacity` an expert takes at most so many times its even share of a sequence's rows, the first ones in
    token order; the rest are dropped: neither sent nor combined, the other choices of their token keep their weights.
    `shared_experts` of width ffn_size are visited by every token; the attending device runs them on its own tokens in
    the attention stage. With `qk_norm` every head's query and key pass an RMSNorm before RoPE, as in Qwen3. `latent`
    attention takes the place of GQA; head_size is then that of queries and keys.
    """

    later: ClassVar[frozenset[str]] = frozenset(
        {"shared_experts", "dense_layers", "dense_ffn_size", "qk_norm", "latent", "rope_scaling", *ROUTER_FIELDS}
    )

    kind: Literal["model"] = "model"
    schema_version: Literal[1] = 1
    name: str
    layers: Annotated[PositiveInt, Field(le=MOST_LAYERS)]
    hidden_size: PositiveInt
    ffn_size: PositiveInt
    attention_heads: PositiveInt
    kv_heads: PositiveInt
    head_size: PositiveInt
    experts: Annotated[PositiveInt, Field(le=MOST_EXPERTS)]
    top_k: PositiveInt
    vocab_size: PositiveInt
    shared_experts: NonNegativeInt = 0
    dense_layers: Annotated[NonNegativeInt, Field(le=MOST_LAYERS)] = 0
    dense_ffn_size: NonNegativeInt = 0
    qk_norm: bool = False
    latent: LatentAttention | None = None
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    router_renormalise: bool = True
    router_scale: PositiveFloat = 1.0
    router_balance: Literal["none", "auxiliary", "bias"] = "none"
    router_auxiliary_loss: NonNegativeFloat = 0.0
    router_bias_rate: NonNegativeFloat = 0.0
    router_z_loss: NonNegativeFloat = 0.0
    router_capacity: PositiveFloat | None = None
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: PositiveFloat = 1e-5
    initializer_range: NonNegativeFloat = 0.02

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is larger than experts {self.experts}")
        if self.attention_heads % self.kv_heads:
            raise ValueError(f"attention_heads {self.attention_heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} must be even for RoPE")
        if self.rope_scaling and self.rope_theta <= 1:
            raise ValueError(f"rope_theta {self.rope_theta} must be above 1 with rope_scaling")
        if self.dense_layers and not self.dense_ffn_size:
            raise ValueError(f"dense_layers {self.dense_layers} needs a dense_ffn_size above 0")
        if self.dense_ffn_size and not self.dense_layers:
            raise ValueError(f"dense_ffn_size {self.dense_ffn_size} needs dense_layers above 0")
        if self.latent:
            self._check_latent(self.latent)
        self._check_router()
        return self

    def _check_router(self) -> None:
        kind, auxiliary, rate = self.router_balance, self.router_auxiliary_loss, self.router_bias_rate
        if kind == "auxiliary" and not auxiliary:
            raise ValueError("router_balance auxiliary needs a router_auxiliary_loss above 0, such as 0.01")
        if kind == "bias" and not rate:
            raise ValueError("router_balance bias needs a router_bias_rate above 0, such as 0.001")
        if kind == "none" and auxiliary:
            raise ValueError(f"router_auxiliary_loss {auxiliary} needs router_balance auxiliary or bias")
        if kind != "bias" and rate:
            raise ValueError(f"router_bias_rate {rate} needs router_balance bias")

    def _check_latent(self, latent: LatentAttention) -> None:
        if latent.rope_size % 2:
            raise ValueError(f"latent.rope_size {latent.rope_size} must be even for RoPE")
        if self.head_size != latent.nope_size + latent.rope_size:
            raise ValueError(
                f"head_size {self.head_size} must be latent.nope_size + latent.rope_size, "
                f"{latent.nope_size} + {latent.rope_size}"
            )
        if self.kv_heads != self.attention_heads:
            raise ValueError(
                f"kv_heads {self.kv_heads} must be attention_heads {self.attention_heads} with latent attention"
            )
        if self.qk_norm:
            raise ValueError("qk_norm goes with GQA: latent attention has norms of its own")

    @property
    def shape(self) -> LayerShape:
        """The widths that select a profile's kernel table."""
        return LayerShape(**{name: getattr(self, name) for name in LayerShape.model_fields})

    @property
    def rope_size(self) -> int:
        """How wide the part of a query or a key is that RoPE turns."""
        return self.latent.rope_size if self.latent else self.head_size

    @property
    def value_size(self) -> int:
        """How wide a head's value is."""
        return self.latent.value_size if self.latent else self.head_size

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert (three SwiGLU matrices)."""
        return 3 * self.hidden_size * self.ffn_size

    @property
    def attention_layer_parameters(self) -> int:
        """Parameters of one MoE layer without its routed experts: attention, shared experts, gate, two norms."""
        shared = self.shared_experts * self.expert_parameters
        return self._attention_parameters + shared + self.hidden_size * (self.experts + 2)

    @property
    def dense_layer_parameters(self) -> int:
        """Parameters of one dense layer: attention, SwiGLU network, two norms."""
        return self._attention_parameters + self.hidden_size * (3 * self.dense_ffn_size + 2)

    @property
    def first_stage_parameters(self) -> int:
        """Parameters of the first attention stage: the dense layers, and its own layer without the routed experts."""
        return self.dense_layers * self.dense_layer_parameters + self.attention_layer_parameters

    @property
    def _attention_parameters(self) -> int:
        """Projections, and the norms of latents or of heads where there are any."""
        if self.latent:
            matrices = self.latent.matrix_parameters(self.hidden_size, self.attention_heads)
            return matrices + self.latent.query_rank + self.latent.key_value_rank
        norms = 2 * self.head_size if self.qk_norm else 0
        return 2 * self.hidden_size * self.head_size * (self.attention_heads + self.kv_heads) + norms

    @property
    def edge_parameters(self) -> int:
        """Parameters outside the layers: embedding, LM head (untied), final norm."""
        return self.hidden_size * (2 * self.vocab_size + 1)

    @property
    def dense_parameters(self) -> int:
        """Everything that an attending device holds besides routed experts."""
        stages = (self.layers - 1) * self.attention_layer_parameters + self.first_stage_parameters
        return stages + self.edge_parameters

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.dense_parameters + self.layers * self.experts * self.expert_parameters

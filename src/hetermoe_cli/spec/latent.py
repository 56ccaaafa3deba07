"""Multi-head latent attention: its widths and what it holds."""

from hetermoe_cli.spec.base import PositiveInt, Spec


class LatentAttention(Spec):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): ranks of the latents, widths of one head.

    Queries and keys of a head are `nope_size` wide without position and `rope_size` with RoPE, whose key all heads
    share; values are `value_size` wide.
    """

    query_rank: PositiveInt
    key_value_rank: PositiveInt
    nope_size: PositiveInt
    rope_size: PositiveInt
    value_size: PositiveInt

    def matrix_parameters(self, hidden: int, heads: int) -> int:
        """Parameters of the projections down to the latents, up from them, and out; a token takes 2 flops for each."""
        down = hidden * (self.query_rank + self.key_value_rank + self.rope_size)
        queries = self.query_rank * heads * (self.nope_size + self.rope_size)
        keys_values = self.key_value_rank * heads * (self.nope_size + self.value_size)
        return down + queries + keys_values + heads * self.value_size * hidden

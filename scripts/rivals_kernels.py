"""What is left of a training step if only torch's heavy kernels remain, called as any trainer has to call them."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from hetermoe_cli.model.kernels.causal import attend
from hetermoe_cli.profiler.kernels import adamw
from hetermoe_cli.runtime.modules.parts import DTYPES
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.profile import Precision
from hetermoe_cli.spec.train import TrainSpec


class Kernels:
    """One rank's matrix products, attention kernels and optimizer step, of a step with even expert loads.

    The experts are shared out and so is the optimizer; every product has rows, weights and gradients of its own, as in
    a step. One process runs them while no other does. No norm, RoPE, activation, gate, permutation, loss, message, or
    gradient to add up.
    """

    def __init__(self, model: ModelConfig, train: TrainSpec, precision: Precision, ranks: int) -> None:
        self.dtype = DTYPES[precision]
        tokens = train.global_batch_sequences * train.sequence_length // ranks
        hosted, query = model.experts // ranks, model.attention_heads * model.head_size
        joined = query + 2 * model.kv_heads * model.head_size
        dense = [(tokens, model.hidden_size, joined), (tokens, query, model.hidden_size)]
        rows = tokens * model.top_k // hosted
        expert = [(rows, model.hidden_size, 2 * model.ffn_size), (rows, model.ffn_size, model.hidden_size)]
        head = [(tokens, model.hidden_size, model.vocab_size)]
        self._products = [
            tuple(torch.randn(size, dtype=self.dtype) for size in ((m, i), (o, i), (m, o)))
            for m, i, o in [*(dense + expert * hosted) * model.layers, *head]
        ]
        self._layers = model.layers
        shape = (train.global_batch_sequences // ranks, model.attention_heads, train.sequence_length, model.head_size)
        self._heads = [torch.randn(shape, dtype=self.dtype, requires_grad=True) for _ in range(3)]
        self._mixed = torch.randn(shape, dtype=self.dtype)
        parameters = model.parameters // ranks
        master = torch.zeros(parameters, dtype=torch.promote_types(self.dtype, torch.float32))
        master.grad = torch.zeros_like(master)
        self._step = adamw([master]).step

    def seconds(self, steps: int) -> list[float]:
        """Of so many steps on one thread."""
        assert torch.get_num_threads() == 1
        return [self._seconds() for _ in range(steps)]

    def _seconds(self) -> float:
        began = time.monotonic()
        for _ in self._results():
            pass
        self._step()
        return time.monotonic() - began

    def _results(self) -> Iterator[Tensor]:
        for rows, weight, gradient in self._products:
            yield rows @ weight.T
            yield gradient @ weight
            yield gradient.T @ rows
        for _ in range(self._layers):
            mixed = attend(*self._heads)
            yield from torch.autograd.grad(mixed, self._heads, self._mixed)

"""A first training step of a model of nothing, so that what torch loads for the first one is there."""

import torch

from hetermoe_cli.model.optimizer import make_optimizer
from hetermoe_cli.model.transformer import Transformer, initialise
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.train import TrainSpec

_LENGTH = 16


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """One step of each kind of work: its kernels, their scratch space and torch's own modules take 80 MB on the CPU."""
    config = ModelConfig(
        name="warm-up", layers=1, hidden_size=32, ffn_size=32, attention_heads=2, kv_heads=1, head_size=16, experts=2,
        top_k=2, vocab_size=256,
    )  # fmt: skip
    model = Transformer(config)
    initialise(model, config, seed=0)
    model.to(device=device, dtype=dtype)
    tokens = torch.zeros(1, _LENGTH, dtype=torch.int64, device=device)
    model(tokens, tokens).backward()
    make_optimizer(model, TrainSpec(sequence_length=_LENGTH, global_batch_sequences=1)).step()

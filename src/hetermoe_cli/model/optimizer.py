"""AdamW and its learning rate."""

import math

import torch
from torch import nn

from hetermoe_cli.spec.train import TrainSpec

_FUSED_DEVICES = {"cpu", "cuda"}


def learning_rate(train: TrainSpec, step: int) -> float:
    """Rate of step 0, 1, ...: linear up to `learning_rate` in the warm-up, then a cosine to its minimum at `steps`."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    decaying = max(train.steps - train.warmup_steps, 1)
    progress = min((step - train.warmup_steps) / decaying, 1.0)
    lowest = train.minimum_learning_rate_ratio
    return train.learning_rate * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(parts: nn.Module, train: TrainSpec) -> torch.optim.AdamW:
    """AdamW over all parameters of `parts`, decaying only matrices; fused where torch has a kernel."""
    parameters = list(parts.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=learning_rate(train, 0),
        betas=(train.beta1, train.beta2),
        eps=train.adam_epsilon,
        fused=all(p.device.type in _FUSED_DEVICES for p in parameters),
    )

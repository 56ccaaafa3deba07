"""Gradients of a model against central differences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

STEP = 1e-6


def check_gradients(
    model: nn.Module, tokens: Tensor, targets: Tensor, wanted: Callable[[str], bool] = lambda name: True
) -> None:
    """The loss's gradient to every wanted parameter, along a random direction, in float64; choices of experts must be
    locally constant."""
    model(tokens, targets).backward()
    generator, checked = torch.Generator().manual_seed(2), 0
    for name, parameter in model.named_parameters():
        if not wanted(name):
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * STEP)
                ends.append(model(tokens, targets).item())
                parameter.sub_(direction, alpha=sign * STEP)
        assert parameter.grad is not None
        expected = (parameter.grad * direction).sum().item()
        assert (ends[0] - ends[1]) / (2 * STEP) == pytest.approx(expected, rel=1e-5, abs=1e-6), name
        checked += 1
    assert checked

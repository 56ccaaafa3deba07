"""Where gradients accumulate, and when they are rounded."""

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from builders import make_layout
from hetermoe_cli.model.optimizer import AdamW
from hetermoe_cli.runtime import gradients as module
from hetermoe_cli.runtime.gradients import Gradients, clip_factor
from hetermoe_cli.runtime.mesh import Mesh
from hetermoe_cli.runtime.trainer import last_of_runs
from hetermoe_cli.schedule.action import Kind, Pass
from hetermoe_cli.schedule.lower import training_schedule

MESH = Mesh(0, 1, torch.device("cpu"), *cast(Any, (None, None)), attending=None)


def parameter(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.ones(3, dtype=dtype))


def add(p: nn.Parameter, value: float) -> None:
    """One micro-batch whose gradient is `value`."""
    (p * torch.tensor(value, dtype=p.dtype)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_contributions_of_many_micro_batches_are_not_lost(dtype: torch.dtype) -> None:
    shared, own = parameter(dtype), parameter(dtype)
    gradients = Gradients([[shared]], [own], MESH, dtype)
    for p in (shared, own):
        add(p, 1.0)
        for _ in range(2**12):
            add(p, 2.0**-12)  # in place, 1 + 2^-12 is 1 in both
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        gradients.fold([p])
        assert p.grad is None
        assert gradients._places[p].dtype == dtype
        assert gradients._places[p].tolist() == [2.0] * 3


def test_gradients_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is left out, and no wide copy of a whole one is made: torch makes one of what a sum has of it."""
    monkeypatch.setattr(module, "_FOLDED", 4)
    shared = nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))
    gradients = Gradients([[shared]], [], MESH, torch.bfloat16)
    shared.grad = torch.arange(15, dtype=torch.float32).view(3, 5)
    sums = []

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "add_":
                sums.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with Sums():
        gradients.fold([shared])
    assert gradients._places[shared].tolist() == torch.arange(15).view(3, 5).tolist()
    assert sums == [4, 4, 4, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_gradients_accumulate_in_place(dtype: torch.dtype) -> None:
    shared, own = parameter(dtype), parameter(dtype)
    gradients = Gradients([[shared]], [own], MESH, dtype)
    for p in (shared, own):
        add(p, 1.0)
        add(p, 0.5)
        gradients.fold([p])
        assert p.grad is gradients._places[p]
        assert p.grad.tolist() == [1.5] * 3
    gradients.zero()
    assert [p.grad.tolist() for p in (shared, own) if p.grad is not None] == [[0] * 3] * 2


def test_shared_gradients_are_kept_as_they_are_exchanged_own_ones_in_the_ranks_precision() -> None:
    for own, exchange in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        shared, hosted = parameter(own), parameter(own)
        gradients = Gradients([[shared]], [hosted], MESH, exchange)
        for p in (shared, hosted):
            add(p, 0.25)
            gradients.fold([p])
        assert (gradients._places[shared].dtype, gradients._places[hosted].dtype) == (exchange, own)
        assert gradients._places[shared].tolist() == gradients._places[hosted].tolist() == [0.25] * 3


@pytest.mark.parametrize("exchange", [torch.float32, torch.float16])
def test_a_step_undoes_the_scale(exchange: torch.dtype) -> None:
    """Also where some gradients are in place and some are not."""
    shared, own = parameter(torch.float32), parameter(torch.float32)
    gradients = Gradients([[shared]], [own], MESH, exchange)
    plain = [parameter(torch.float32) for _ in range(2)]
    for p in (shared, own):
        add(p, 512.0)
    gradients.fold([shared, own])
    optimizer = AdamW([{"params": [shared, own]}], {}, lr=0.1, eps=1.0)
    gradients.apply(optimizer, 1 / 1024)
    for p in plain:
        p.grad = torch.full((3,), 0.5)
    torch.optim.AdamW(plain, lr=0.1, eps=1.0).step()
    assert torch.equal(torch.stack([shared, own]), torch.stack(plain))
    gradients.zero()
    add(own, 1.0)
    assert gradients._places[own].tolist() == [1.0] * 3


def test_clipping_never_enlarges() -> None:
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25)


@pytest.mark.parametrize(("schedule", "windows"), [("zebra", 1), ("windowed", 2), ("sequential", 4)])
def test_a_layer_is_rounded_once_a_window(schedule: Any, windows: int) -> None:
    layout = make_layout((1, 0), (0, 4), layers=3, micro_batches=4, schedule=schedule)
    for rank, kinds in ((0, (Kind.ATTENTION, Kind.HEAD)), (1, (Kind.EXPERT,))):
        order = training_schedule(layout).compute[rank]
        last = last_of_runs(order)
        assert {action.kind for action in last} - {Kind.SYNCHRONISE, Kind.OPTIMIZER} == set(kinds)
        for kind in kinds:
            layers = [0] if kind is Kind.HEAD else range(3)
            for layer in layers:
                mine = [a for a in order if (a.kind, a.layer, a.direction) == (kind, layer, Pass.BACKWARD)]
                assert len([a for a in mine if a in last]) == windows
                assert mine[-1] in last

"""Where gradients accumulate, and when they are rounded."""

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from builders import make_layout, make_model
from hetermoe_cli.model.kernels import pieces
from hetermoe_cli.model.layers.moe import ExpertGroup
from hetermoe_cli.model.optimizer import AdamW
from hetermoe_cli.runtime.machine.mesh import Mesh
from hetermoe_cli.runtime.modules.gradients import Gradients, clip_factor
from hetermoe_cli.runtime.step.trainer import last_of_runs
from hetermoe_cli.schedule.action import Kind, Pass
from hetermoe_cli.schedule.lower import training_schedule

CONFIG = make_model()
MESH = Mesh(0, 1, torch.device("cpu"), *cast(Any, (None, None)), attending=None)


def parameter(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.ones(3, dtype=dtype))


def add(p: nn.Parameter, value: float) -> None:
    """One micro-batch whose gradient is `value`."""
    (p * torch.tensor(value, dtype=p.dtype)).sum().backward()


class Sums(TorchDispatchMode):
    """Elements of every sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "add_":
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


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
    monkeypatch.setattr(pieces, "_ELEMENTS", 4)
    shared = nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))
    gradients = Gradients([[shared]], [], MESH, torch.bfloat16)
    shared.grad = torch.arange(15, dtype=torch.float32).view(3, 5)
    with Sums() as sums:
        gradients.fold([shared])
    assert gradients._places[shared].tolist() == torch.arange(15).view(3, 5).tolist()
    assert sums.sizes == [4, 4, 4, 3]


def test_a_card_adds_a_gradient_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one kernel, which makes no wide copy; meta tensors stand in for a card's."""
    monkeypatch.setattr(pieces, "_ELEMENTS", 4)
    mesh = Mesh(0, 1, torch.device("meta"), *cast(Any, (None, None)), attending=None)
    shared = nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16, device="meta"))
    gradients = Gradients([[shared]], [], mesh, torch.bfloat16)
    shared.grad = torch.zeros(3, 5, dtype=torch.float32, device="meta")
    with Sums() as sums:
        gradients.fold([shared])
    assert sums.sizes == [15]
    assert shared.grad is None


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_fused_step_takes_the_factor_with_it(dtype: torch.dtype, tolerance: float) -> None:
    found, plain = parameter(dtype), parameter(dtype)
    gradients = Gradients([[]], [found], MESH, dtype)
    add(found, 0.7)
    optimizer = AdamW([{"params": [found]}], {}, lr=0.1, eps=1.0, fused=True)
    for factor in (1 / 3, 1.0):  # nothing of the first stays for the second
        gradients.zero()
        add(found, 0.7)
        gradients.apply(optimizer, factor)
    reference = torch.optim.AdamW([plain], lr=0.1, eps=1.0)
    for value in (0.7 / 3, 0.7):
        plain.grad = torch.full((3,), value, dtype=dtype)
        reference.step()
    torch.testing.assert_close(found, plain, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_experts_had_before_is_neither_cleared_nor_added_to(dtype: torch.dtype) -> None:
    """The first micro-batch writes, the second adds; an expert without rows, and one that nothing ran on, has zeros."""
    used, idle = (ExpertGroup(CONFIG, 0, ids) for ids in ([0, 1], [2]))
    used, idle = used.to(dtype), idle.to(dtype)
    stacks = [*used.parameters(), *idle.parameters()]
    for stack in stacks:
        nn.init.normal_(stack)
    gradients = Gradients([list(idle.parameters())], used.parameters(), MESH, dtype, stacks=stacks)
    rows = torch.ones(3, CONFIG.hidden_size, dtype=dtype, requires_grad=True)
    sums = []
    for counts in ([[2, 1], [0, 3]], [[3, 0], [3, 0]]):
        for place in gradients._places.values():
            place.fill_(torch.nan)
        gradients.zero()
        for one in counts:
            used(rows, one).sum().backward()
        gradients.fold(stacks)
        sums.append([p.grad.clone() for p in used.parameters() if p.grad is not None])
        assert all(p.grad is gradients._places[p] for p in stacks)
        assert all(not p.grad.count_nonzero() for p in idle.parameters() if p.grad is not None)
    assert all(not found[1].count_nonzero() for found in sums[1])
    for both, first in zip(*sums, strict=True):  # all rows are alike: one row's gradient is a third of three rows'
        torch.testing.assert_close(both[0], first[0] / 3, rtol=1e-4, atol=1e-4)
        assert both[1].count_nonzero()


@pytest.mark.parametrize("by_autograd", [False, True])
def test_narrow_experts_add_to_wide_places_and_step(by_autograd: bool) -> None:
    """As where ranks compute in bf16 and exchange fp32; by autograd as on CUDA, or where a hook waits."""
    group = ExpertGroup(CONFIG, 0, [0, 1]).bfloat16()
    stacks = list(group.parameters())
    for stack in stacks:
        nn.init.normal_(stack)
        if by_autograd:
            stack.register_hook(lambda gradient: gradient)
    gradients = Gradients([stacks], [], MESH, torch.float32, stacks=stacks)
    rows = torch.ones(3, CONFIG.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    found = []
    for _ in range(2):
        gradients.zero()
        group(rows, [1, 2]).sum().backward()
        gradients.fold(stacks)
        found.append([gradients._places[stack].clone() for stack in stacks])
    assert all(place.count_nonzero() for place in found[0])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
    masters = {stack: stack.detach().float() for stack in stacks}
    before = [stack.detach().clone() for stack in stacks]
    optimizer = AdamW([{"params": list(masters.values())}], masters, lr=0.5, fused=True)
    gradients.apply(optimizer, 0.5)
    assert not any(torch.equal(stack, old) for stack, old in zip(stacks, before, strict=True))


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

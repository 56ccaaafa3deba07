"""States, or all of the dense part, in shares of their holders: equal to the reference, saved in whole, resumed on any
plan."""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_engine_equality import (
    BIAS,
    CASES,
    DENSE,
    LATENT,
    LENGTH,
    LOSSES,
    MIXED,
    SIGMOID,
    STEPS,
    Case,
    batches,
    hosts,
    reference,
    starve,
)
from test_groups_equality import ALL, ALONE, Groups
from test_groups_equality import CASES as MIXED_GROUPS
from test_groups_equality import SHARDED as EQUAL_GROUPS
from torch.utils._python_dispatch import TorchDispatchMode
from workers import run_workers

from builders import make_inputs
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.sharers import Sharers
from hetermoe_cli.model.optimizer import part_of
from hetermoe_cli.model.transformer import named_tensors
from hetermoe_cli.model.weights.training_state import (
    restore_training,
    training_names,
    training_shapes,
    training_tensors,
)
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.spec.world import World

SHARDED = {
    "EP 2": CASES["EP 2"],
    "EP 4 uneven": CASES["EP 4 uneven"],
    "three attend": Case([3, 1, 0, 4], MIXED, 1, recompute="all", features=SIGMOID),
    "windows, replicated, bias": Case([1, 1, 0, 0], MIXED, 4, schedule="windowed", features=BIAS),
    "dense layers": Case([2, 1, 1, 0], MIXED, 2, recompute="attention", features=DENSE | {"dense_layers": 2}),
    "latent, recompute": Case([2, 1, 1, 0], MIXED, 2, recompute="all", features=LATENT | DENSE),
    "one attends": CASES["1+1 R=2"],
    "one attends to copies": Case([4, 0], hosts([2], [0, 1, 3], replicated=(5, 4)), 2),
    "copies of two, backwards": Case([1, 1], hosts([1], [0], replicated=(5, 2, 4, 3)), 4, "windowed"),
    "copies of three": Case([2, 1, 1], hosts([0], [], [4, 1], replicated=(2, 5, 3)), 2, recompute="experts"),
    "copies only": Case([1, 3], hosts([], [], replicated=(0, 1, 2, 3, 4, 5)), 2),
}
FULL = SHARDED | {
    "2+1": CASES["2+1"],
    "mixed, windows, between": CASES["mixed, windows, between, recompute"],
    "sequential": CASES["EP 2 sequential"],
    "interleaved": CASES["EP 2 between, interleaved"],
    "one layer": Case([1, 1], [LayerPlacement(experts=[[0, 1, 2], [3, 4, 5]])], 4, "windowed", features={"layers": 1}),
}
WINDOWS = Case([1, 1], hosts([0, 1, 2], [3, 4, 5]), 2, schedule="sequential", recompute="all")
GROUPS = {  # each gathers among its own ranks
    "three and two": Groups(
        copies=[(Case([2, 0, 1, 1], hosts([0], [2, 1], [5], [3, 4]), 1), [0, 1, 4, 5]), (WINDOWS, [2, 3])]
    ),
    "two in windows and one alone": Groups(
        copies=[
            (Case([1, 0, 1], hosts([1, 0], [2, 3], [4], replicated=(5,)), 3, schedule="sequential"), [0, 1, 3]),
            (ALONE, [2]),
        ],
        features=BIAS | LOSSES | {"router_balance": "bias"},
    ),
    "one alone first": Groups(
        copies=[(Case([2], hosts(ALL), 1), [0]), (WINDOWS, [1, 2]), (Case([2, 0], hosts([], ALL), 1), [3, 4])]
    ),
    "replicated in both, other orders": Groups(
        copies=[
            (
                Case([1, 1], hosts([1, 0], [2, 3], replicated=(5, 4)), 2, "sequential", expert_order="between"),
                [1, 3],
            ),
            (Case([1, 1], hosts([0], [1, 2, 3], replicated=(4, 5)), 2, transfers="interleaved"), [0, 2]),
        ],
        features=DENSE | SIGMOID,
    ),
}  # fmt: skip
FULL |= GROUPS
SEVERAL = MIXED_GROUPS | {"equal": EQUAL_GROUPS}
SHARES = {  # not with a fully sharded dense part
    name: CASES[name]
    for name in (
        "pipeline of 3 stages, one window, bias, dense layers",
        "pipeline, EP and zebra, uneven, windows",
        "head in parts of sequences, windows, between, recompute",
        "pipeline, head on the last stage's host",
        "head on a host and one that attends, in shifts",
        "shifts, one helps once",
        "shifts, alone with all experts, windows of one, recompute",
    )
}
STATES = [*((name, "optimizer") for name in (*SHARDED, *SEVERAL, *SHARES)), *((name, "full") for name in FULL)]
PADDING = 4 * 4 + 3 * 16 * 4  # elements that the last share has less, of experts and of a fully sharded dense part
PAIR = Case([2, 2], hosts([0, 1], [2, 3], replicated=(4, 5)), 2)
OTHER = {"optimizer": "full", "full": "optimizer"}
PRECISIONS = {"fp64": (), "bf16": (), "fp16": ("fp16", "bf16"), "fp32": ("bf16", "fp32")}


def build(case: Case, precision: str = "fp64", ranks: tuple[str, ...] = (), state: str = "optimizer"):
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.step.trainer import Trainer

    layout = in_state(case.layout, state)
    trainer = Trainer.build(
        case.model, layout, case.train, join(layout, "cpu"), sequence_length=LENGTH, precision=precision,
        rank_precisions=ranks,
    )  # fmt: skip
    with whole_weights(trainer):
        starve(trainer.parts)
    return trainer


def in_state(layout: Layout | World, state: str) -> World:
    """Its layouts with that dense state."""

    def changed(layout: Layout) -> Layout:
        schedule = layout.schedule.model_copy(update={"dense_state": state})
        return Layout.model_validate({**dict(layout), "schedule": schedule})

    return World.side_by_side([(changed(copy.layout), copy.processes) for copy in World.of(layout).replicas])


@contextmanager
def whole_weights(trainer):
    """Collective: weights can be read as the next step takes them, and written alike on all ranks."""
    shards = trainer.shards
    for layer in range(trainer.layout.layers + 1 if shards else 0):
        shards.make_room(layer)
        shards.gather(layer, kept=True)
    yield
    kept = [segment for layer in shards._kept for _, segment in layer] if shards else []
    for segment in [*shards.segments, *kept] if shards else ():
        for one, piece in zip(segment.slices, segment.pieces, strict=True):
            if piece and not torch.equal(piece.weight.to(one[0].dtype), piece.of(part_of(*one))):
                piece.weight.copy_(piece.of(part_of(*one)))
    for layer in range(len(shards.segments) if shards else 0):
        shards.release(layer)


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().float().clone().numpy() for name, tensor in tensors.items()}


def weights(rank: int, case: Case, state: str) -> list[Any]:
    """Per step, figures and the masters that this rank saves, at last all weights that it has in the next step; then
    the elements that the optimizer holds, and those of what others hold too. Nothing but steps gathers weights."""
    trainer, result = build(case, state=state), []
    for step in range(STEPS):
        found = trainer.step(batches(), step)
        figures = [found.loss, *found.router_losses, found.gradient_norm]
        shared = trainer.shards.tensors(trainer.optimizer)
        masters = training_tensors(trainer.parts, trainer.optimizer) | shared
        result.append((figures, {n: t.clone().numpy() for n, t in masters.items() if "@" not in n}))
    with whole_weights(trainer):
        result[-1][1].update({n: t.clone().numpy() for n, t in named_tensors(trainer.parts).items()})
    held = sum(state["exp_avg"].numel() for state in trainer.optimizer.state.values())
    shared = sum(p.numel() for p in trainer.shards.pieces)
    alone = sum(p.numel() for p in trainer.parts.parameters() if p not in trainer.shards.pieces)
    return [result, held, held - alone, shared]


def predicted(case: Case, state: str) -> list[float]:
    """By process, the parameters that the cost model has it step."""
    world = in_state(case.layout, state)
    layouts = [replica.layout for replica in world.replicas]
    inputs = make_inputs([("new", 1)] * world.size, model=case.model, global_batch_sequences=world.sequences)
    costs = [LayoutCost(CostModel(inputs), layout) for layout in layouts]
    for cost in costs:
        cost.sharers = Sharers.of((layout, 1) for layout in layouts)
    return [costs[copy].parameters(rank) for copy, rank in map(world.seat, range(world.size))]


@pytest.mark.parametrize(("name", "state"), STATES)
def test_equals_single_device_reference(name: str, state: str) -> None:
    case = (FULL | SEVERAL | SHARES)[name]
    expected, ranks = reference(case), run_workers(len(case.sequences), weights, case, state)
    for step, wanted in enumerate(expected):
        assert wanted.weights.keys() <= {key for found, *_ in ranks for key in found[step][1]}
        for found, *_ in ranks:
            assert found[step][0] == pytest.approx(wanted.figures, rel=1e-12, abs=1e-12)
            for key in found[step][1].keys() & wanted.weights.keys():
                np.testing.assert_allclose(found[step][1][key], wanted.weights[key], rtol=0, atol=1e-9, err_msg=key)
    assert [held for _, held, _, _ in ranks] == pytest.approx(predicted(case, state), abs=PADDING)
    groups, dense = len(World.of(case.layout).replicas), case.model.dense_parameters
    everything = case.model.parameters + (dense * (groups - 1) if state == "full" else 0)
    assert sum(held for _, held, _, _ in ranks) == everything  # each element once, or once a group
    alike = groups == 1 and not case.pipeline and not World.of(case.layout).replicas[0].layout.head
    if alike and sum(map(bool, case.sequences)) > 1:
        for attends, (*_, held, shared) in zip(case.sequences, ranks, strict=True):
            assert held <= shared / sum(map(bool, case.sequences)) + PADDING
            assert bool(shared) == bool(attends)


def whole(trainer) -> dict[str, torch.Tensor]:
    """What all ranks save, together."""
    mine = training_tensors(trainer.parts, trainer.optimizer)
    if trainer.shards:
        mine |= trainer.shards.tensors(trainer.optimizer)
    everyone: list[Any] = [None] * trainer.mesh.world_size
    torch.distributed.all_gather_object(everyone, {name: tensor.clone() for name, tensor in mine.items()})
    return {name: tensor for rank in everyone for name, tensor in rank.items()}


def kept_on(rank: int, case: Case) -> tuple[int, list[str]]:
    """Tensors to be saved, and the devices that copies were asked for (None: where the tensor is)."""
    trainer, asked = build(case, state="optimizer"), []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("clone", "_to_copy"):
                asked.append(str((kwargs or {}).get("device")))
            return func(*args, **(kwargs or {}))

    with Copies():
        saved = trainer.shards.tensors(trainer.optimizer)
    return len(saved), asked


def test_what_is_saved_leaves_the_device_at_once() -> None:
    for saved, asked in run_workers(2, kept_on, PAIR):
        assert saved > 0
        assert asked == ["cpu"] * saved


def resumed(trainer, state: dict[str, torch.Tensor], steps: int):
    """`trainer` with that state."""
    needed = {name: state[name] for name in training_names(trainer.parts)}
    restore_training(trainer.parts, trainer.optimizer, needed, steps)
    return trainer


def interrupted(rank: int, case: Case, precision: str, ranks: tuple[str, ...], state: str) -> dict[str, Any]:
    """Six steps at once, in two halves, and the second half in other states."""
    trainer = build(case, precision, ranks, state)
    trainer.loss_scale.scale = 1.0
    for step in range(3):
        trainer.step(batches(), step)
    kept = whole(trainer)
    others = {
        name: resumed(build(case, precision, ranks, s), kept, 3)
        for name, s in (("again", state), ("plain", "replicated"), ("other", OTHER[state]))
    }
    found = {"names": {name: tuple(tensor.shape) for name, tensor in kept.items()}}
    for name, one in {"at once": trainer, **others}.items():
        one.loss_scale.scale = 1.0
        losses = [one.step(batches(), step).loss for step in range(3, 6)]
        with whole_weights(one):
            found[name] = losses, arrays(dict(one.parts.named_parameters())), arrays(whole(one))
    return found


@pytest.mark.parametrize("state", OTHER)
@pytest.mark.parametrize(
    "precision", ["fp64", "fp16", *(pytest.param(p, marks=pytest.mark.long) for p in ("bf16", "fp32"))]
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped_and_in_other_states_too(precision: str, state: str) -> None:
    found = run_workers(2, interrupted, PAIR, precision, PRECISIONS[precision], state)
    for rank in found:
        assert rank["names"] == training_shapes(PAIR.model)
        losses, own, saved = rank["at once"]
        assert rank["again"][0] == losses
        for mine, theirs in ((own, rank["again"][1]), (saved, rank["again"][2])):
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(value, theirs[name]) for name, value in mine.items())
        for other in ("plain", "other"):
            assert rank[other][0] == pytest.approx(losses, rel=1e-3)
            for name, value in rank[other][2].items():
                np.testing.assert_allclose(
                    value, saved[name], rtol=1e-2, atol=1e-2 if precision != "fp64" else 1e-9, err_msg=name
                )
    dense = [{n: v for n, v in rank["at once"][1].items() if n.startswith("dense")} for rank in found]
    ranks = PRECISIONS[precision]
    for name, value in dense[0].items():  # to the bit where both ranks compute in one precision
        if not ranks:
            np.testing.assert_array_equal(value, dense[1][name], err_msg=name)


def trained_states(rank: int, case: Case, exchange: str, precisions: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Masters and moments of the dense part after three steps, those that this rank would save if its group did."""
    World.counts_dense = lambda world, process: True  # type: ignore[method-assign]
    trainer = build(case, exchange, precisions, "full")
    for step in range(3):
        trainer.step(batches(), step)
    shared = trainer.shards.tensors(trainer.optimizer) if trainer.shards else {}
    found = arrays(training_tensors(trainer.parts, trainer.optimizer) | shared)
    return {name: tensor for name, tensor in found.items() if ".experts." not in name}


@pytest.mark.parametrize("exchange", ["bf16", "fp32"])
def test_groups_step_their_shares_alike(exchange: str) -> None:
    """To the bit, though they cut the dense part at other places, and compute in other precisions."""
    case, precisions = GROUPS["three and two"], ("bf16", "fp32", "bf16", "fp32", "bf16", "bf16")
    ranks = run_workers(len(case.sequences), trained_states, case, exchange, precisions)
    seen: dict[str, np.ndarray] = {}
    for replica in case.layout.replicas:
        group = {name: value for process in replica.processes for name, value in ranks[process].items()}
        assert group.keys() == {name for name in training_shapes(case.model) if ".experts." not in name}
        for name, value in group.items():
            np.testing.assert_array_equal(value, seen.setdefault(name, value), err_msg=name)


PLANS = {  # of four ranks
    "copies": (Case([2, 1, 1, 0], hosts([1], [], [0], [3], replicated=(5, 2, 4)), 2), "optimizer"),
    "groups": (replace(MIXED_GROUPS["replicated in one group"], features={}), "optimizer"),
    "mixed groups": (MIXED_GROUPS["replicated in both groups"], "optimizer"),
    "full": (Case([1, 1, 0, 0], MIXED, 4, schedule="windowed"), "full"),
    "head apart": (
        Case([2, 1, 1, 0], hosts([1], [], [0], [3], replicated=(5, 2, 4)), 2, head=[0, 1, 0, 2]),
        "optimizer",
    ),
    "pipeline": (replace(CASES["pipeline, EP and zebra, uneven, windows"], features={}), "optimizer"),
    "plain": (Case([1, 1, 1, 1], hosts([0, 5], [1, 2], [3], [4]), 2), "replicated"),
}


def around(rank: int, precision: str) -> list[tuple[str, float, dict[str, np.ndarray]]]:
    """What a run saved, after it went through every plan, and the loss of a step from there."""
    first, state = PLANS["copies"]
    trainer = build(first, precision, state=state)
    for step in range(2):
        trainer.step(batches(), step)
    kept = whole(trainer)
    result = [("at first", trainer.step(batches(), 2).loss, arrays(kept))]
    for name, (case, state) in PLANS.items():
        trainer = resumed(build(case, precision, state=state), kept, 2)
        kept = whole(trainer)
        result.append((name, trainer.step(batches(), 2).loss, arrays(kept)))
    return result


@pytest.mark.parametrize("precision", ["fp64", pytest.param("bf16", marks=pytest.mark.long)])
def test_a_checkpoint_goes_through_all_plans_unchanged(precision: str) -> None:
    for (_, loss, saved), *others in run_workers(4, around, precision):
        assert saved.keys() == training_shapes(PAIR.model).keys()
        for name, other, tensors in others:
            assert other == pytest.approx(loss, rel=1e-12 if precision == "fp64" else 1e-2), name
            assert tensors.keys() == saved.keys()
            assert all(np.array_equal(tensor, tensors[key]) for key, tensor in saved.items()), name


def held(shards) -> tuple[int, int]:
    """Segments with whole weights, and with whole gradients."""
    gradients = [any(p.grad is not None for p in segment.parameters) for segment in shards.segments]
    return sum(segment.whole.untyped_storage().size() > 0 for segment in shards.segments), sum(gradients)


def watched(rank: int, case: Case) -> list[tuple[int, int]]:
    """What is held, or there is room for, whenever room is made in a step and a validation; at last after both."""
    trainer, found = build(case, state="full"), []
    shards = trainer.shards
    if shards.segments:
        make_room = shards.make_room

        def look_at_room(layer: int) -> None:
            assert not shards.segments[layer].whole.untyped_storage().size()
            make_room(layer)
            found.append(held(shards))

        shards.make_room = look_at_room
    trainer.step(batches(), 0)
    trainer.validate(batches(), 1)
    return [*found, held(shards)] if found else []


@pytest.mark.parametrize("name", ["2+1", "windows, replicated, bias", "sequential"])
def test_whole_weights_and_gradients_are_there_only_where_they_are_used(name: str) -> None:
    case = FULL[name]
    for attends, found in zip(case.sequences, run_workers(len(case.sequences), watched, case), strict=True):
        assert bool(found) == bool(attends)
        if found:
            assert max(whole for whole, _ in found) == 2
            assert max(gradients for _, gradients in found) <= 1
            assert found[-1] == (0, 0)


def built(rank: int, case: Case, state: str) -> list[int]:
    """Elements of dense weights and wide masters that are there whenever a segment was filled, and at last."""
    from hetermoe_cli.runtime.modules.parts import Parts

    found: list[int] = []
    fill = Parts.fill

    def fill_and_count(parts: Parts, parameters: Any) -> None:
        fill(parts, parameters)
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().size() for p in parts.dense.parameters()}
        masters = sum(master.numel() * master.element_size() for master in parts.masters.values())
        found.append(sum(storages.values()) + masters)

    Parts.fill = fill_and_count  # type: ignore[method-assign]
    trainer = build(case, "bf16", state=state)
    experts = sum(4 * master.numel() for master in trainer.parts.masters.values())
    sizes = [sum(p.numel() for p in segment.parameters) for segment in trainer.shards.segments]
    return [*found[: len(sizes)], found[-1] - experts, max(sizes), sum(sizes)]


def test_start_up_fills_one_segment_at_a_time() -> None:
    for found in run_workers(2, built, PAIR, "full"):
        *filled, last, largest, everything = found
        assert len(filled) == PAIR.model.layers + 1
        assert max(filled) == 6 * largest < 6 * everything / 2  # bf16 weights and fp32 masters of one segment
        assert last == 0

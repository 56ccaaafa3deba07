"""Experts that move between two steps: training goes on as if they had always been there."""

import numpy as np
import pytest
from test_engine_equality import BIAS, LENGTH, MIXED, STEPS, TRAIN, Case, arrays, batches, hosts, reference, starve
from test_engine_equality import CASES as EQUAL
from test_groups_equality import ALL
from test_groups_equality import CASES as GROUPS
from test_sharded_states import in_state, whole_weights
from workers import run_workers

from hetermoe_cli.model.weights.training_state import training_tensors
from hetermoe_cli.spec.layout import LayerPlacement
from hetermoe_cli.spec.world import World

SPREAD = [
    LayerPlacement(experts=[[0, 5], [1], [2], [3, 4]]),
    LayerPlacement(experts=[[4], [5], [], [0, 1, 2]], replicated=[3]),
    LayerPlacement(experts=[[], [2, 1], [0, 5], [3, 4]]),
]
CASES = {
    "2+2, everything moves, copies come and go": (Case([3, 1, 0, 0], MIXED, 2), SPREAD),
    "2+2, back again": (Case([2, 2, 0, 0], SPREAD, 2, recompute="all", features=BIAS), MIXED),
    "EP 2 -> one host": (Case([2, 2], hosts([0, 1, 2], [3, 4, 5]), 2), hosts([], list(range(6)))),
    "one host -> all replicated": (
        Case([4, 0], hosts([], list(range(6))), 2),
        hosts([], [], replicated=tuple(range(6))),
    ),
    "beside copies that stay": (
        Case([2, 1, 1], hosts([0, 1], [2], [3], replicated=(5, 4)), 2),
        [
            LayerPlacement(experts=[[1], [0, 3], [2]], replicated=[5, 4]),
            LayerPlacement(experts=[[0, 1], [2], [3]], replicated=[4, 5]),
            LayerPlacement(experts=[[0, 1], [2], [3]], replicated=[5, 4]),
        ],
    ),
    "only one layer, windows": (
        Case([1, 1, 0, 0], hosts([], [], [4, 1, 2], [3, 0, 5]), 4, schedule="windowed"),
        [*hosts([], [], [4, 1, 2], [3, 0, 5])[:2], LayerPlacement(experts=[[], [], [0, 4, 1, 5], [3, 2]])],
    ),
    "beside a head apart": (
        Case([1, 1, 0, 0], hosts([], [], [4, 1, 2], [3, 0, 5]), 4, schedule="windowed", head=[1, 0, 2, 0]),
        [*hosts([], [], [4, 1, 2], [3, 0, 5])[:2], LayerPlacement(experts=[[], [2], [0, 4, 1, 5], [3]])],
    ),
    "in pipeline stages, copies come and go": (
        EQUAL["pipeline, EP and zebra, uneven, windows"],
        [
            LayerPlacement(experts=[[1], [3, 0], [], []], replicated=[2, 4, 5]),
            LayerPlacement(experts=[[], [], [2, 1, 0], [3, 5, 4]]),
            LayerPlacement(experts=[[], [], [5, 0], [4, 1]], replicated=[2, 3]),
        ],
    ),
}  # fmt: skip
FIRST = next(iter(CASES))
SHARED = (FIRST, "2+2, back again", "one host -> all replicated", "beside copies that stay", list(CASES)[-1])
STATES = [*((name, "replicated") for name in CASES), *((name, "optimizer") for name in SHARED), (FIRST, "full")]
GROUP_CASES = {
    "three and two, both move": (
        GROUPS["experts elsewhere in each group"],
        [hosts([2, 1], [0, 5], [3, 4]), hosts([4, 0], [5, 1], replicated=(2, 3))],
    ),
    "copies come and go in one group": (
        GROUPS["replicated in both groups"],
        [hosts([5, 1], [3], replicated=(0, 2, 4)), hosts([0], [1, 2, 3], replicated=(4, 5))],
    ),
    "only one of unequal groups": (
        GROUPS["four and one"],
        [SPREAD, hosts(ALL)],
    ),
}
GROUP_STATES = [
    *((name, state) for name in GROUP_CASES for state in ("replicated", "full")),
    *(pytest.param(name, "optimizer", marks=pytest.mark.long) for name in GROUP_CASES),
]
MOVED_AFTER = 1  # steps


Placements = list[list[LayerPlacement]]  # of every copy of the model


def in_other_places(world: World, placements: Placements) -> World:
    copies = zip(world.replicas, placements, strict=True)
    return World.side_by_side(
        [(copy.layout.model_copy(update={"placement": placement}), copy.processes) for copy, placement in copies]
    )


def work(rank: int, case: Case, placements: Placements | None, dense_state: str):
    """Per step the loss and the states that this rank would save, or has a copy of. Experts move after the first."""
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.run.rebalance import move_experts
    from hetermoe_cli.runtime.step.trainer import Trainer

    world = in_state(case.layout, dense_state)
    trainer = Trainer.build(case.model, world, case.train, join(world, "cpu"), sequence_length=LENGTH, precision="fp64")
    with whole_weights(trainer):
        starve(trainer.parts)
    result = []
    for step in range(STEPS):
        found = trainer.step(batches(), step)
        if step + 1 == MOVED_AFTER and placements:
            copy, local = world.seat(rank)
            before, placement = world.replicas[copy].layout.placement, placements[copy]
            groups = {layer: parts.hosted.gate_up for layer, parts in enumerate(trainer.parts.experts)}
            move_experts(trainer, case.model, in_other_places(world, placements), step + 1)
            for layer, parts in enumerate(trainer.parts.experts):
                assert parts.hosted.ids == placement[layer].experts[local]
                same = before[layer].experts[local] == placement[layer].experts[local]
                assert (parts.hosted.gate_up is groups[layer]) is same
            held = {id(master) for group in trainer.optimizer.param_groups for master in group["params"]}
            assert held == {id(p) for p in trainer.optimizer.state}
            pieces = trainer.optimizer.pieces
            shared = {id(piece.weight) for by_index in pieces.values() for piece in by_index.values()}
            assert held == shared | {id(p) for p in trainer.parts.parameters() if p not in pieces}
            assert set(trainer.mesh.shared) == {m for m in trainer.world.communicators() if rank in m}
        saved = trainer.shards.tensors(trainer.optimizer) if trainer.shards else {}
        result.append((found.loss, arrays(training_tensors(trainer.parts, trainer.optimizer) | saved)))
    return result


def compare(case: Case, placements: Placements, dense_state: str) -> None:
    """With the single-device reference, and with a run that moves nothing."""
    expected = reference(case)
    moved, still = (run_workers(len(case.sequences), work, case, goal, dense_state) for goal in (placements, None))
    for step, wanted in enumerate(expected):
        seen: dict[str, np.ndarray] = {}
        unmoved = {key: value for ranks in still for key, value in ranks[step][1].items()}
        for loss, tensors in (ranks[step] for ranks in moved):
            assert loss == pytest.approx(wanted.figures[0], rel=1e-12)
            for key, value in tensors.items():
                np.testing.assert_allclose(value, unmoved[key], rtol=0, atol=1e-9, err_msg=key)
                if "@" not in key and key in wanted.weights:
                    np.testing.assert_allclose(value, wanted.weights[key], rtol=0, atol=1e-9, err_msg=key)
            seen |= tensors
        assert seen.keys() == unmoved.keys()


@pytest.mark.parametrize(("name", "dense_state"), STATES)
def test_equals_the_reference_and_a_run_that_moves_nothing(name: str, dense_state: str) -> None:
    case, placement = CASES[name]
    compare(case, [placement], dense_state)


@pytest.mark.parametrize(("name", "dense_state"), GROUP_STATES)
def test_experts_of_several_groups_move_at_once(name: str, dense_state: str) -> None:
    """Each group's own way: who sums an expert's gradients with whom changes, copies come and go."""
    case, placements = GROUP_CASES[name]
    compare(case, placements, dense_state)


def there_and_back(
    rank: int, case: Case, dense_state: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
    """Ranks of several precisions: masters, moments and rounded weights before and after two moves; the next loss."""
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.run.rebalance import move_experts
    from hetermoe_cli.runtime.step.trainer import Trainer

    precisions = ["fp16", "bf16", "fp32", "bf16"]
    layout = in_state(case.layout, dense_state)
    trainer = Trainer.build(
        case.model, layout, TRAIN, join(layout, "cpu"),
        sequence_length=LENGTH, precision="bf16", rank_precisions=precisions,
    )  # fmt: skip
    taken = sum(not trainer.step(batches(), step).skipped for step in range(4))

    def state() -> dict[str, np.ndarray]:
        with whole_weights(trainer):
            weights = {f"{name}@weight": p.detach().float() for name, p in trainer.parts.named_parameters()}
        saved = trainer.shards.tensors(trainer.optimizer) if trainer.shards else {}
        return arrays(training_tensors(trainer.parts, trainer.optimizer) | saved | weights)

    before = state()
    assert all(before[key].any() for key in before if key.endswith("gate_up@exp_avg_sq"))
    for placement in (SPREAD, MIXED):
        move_experts(trainer, case.model, in_other_places(trainer.world, [placement]), taken)
        assert {p.dtype for p in trainer.parts.parameters()} == {trainer.parts.dtype}
        alone = [p for p in trainer.parts.parameters() if p not in trainer.optimizer.pieces]
        assert len(trainer.parts.masters) == len(alone) * (precisions[rank] != "fp32")
    return before, state(), trainer.step(batches(), 4).loss


@pytest.mark.parametrize("dense_state", ["replicated", "optimizer"])
def test_there_and_back_is_bit_exact_on_ranks_of_several_precisions(dense_state: str) -> None:
    found = run_workers(4, there_and_back, CASES[FIRST][0], dense_state)
    assert 0 < found[0][2] < 10
    for before, after, loss in found:
        assert loss == found[0][2]
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key], after[key]) for key in before)

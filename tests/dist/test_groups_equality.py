"""Several groups side by side equal the plain single-device model: loss, every gradient and weight on every holder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from single_device import trained
from test_engine_equality import (
    BIAS,
    CAPACITY,
    DENSE,
    LENGTH,
    LOSSES,
    MIXED,
    MODEL,
    SIGMOID,
    Case,
    arrays,
    batches,
    compare,
    hosts,
    stages,
    work,
)
from workers import run_workers

from hetermoe_cli.model.weights.training_state import training_shapes, training_tensors
from hetermoe_cli.schedule.action import Kind
from hetermoe_cli.schedule.lower import training_schedules
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.spec.world import World
from hetermoe_cli.trace import LANES, Span, display_name

ALL = list(range(MODEL.experts))


@dataclass
class Groups(Case):
    """Layouts with the processes that each runs on; the dense part's state is the same in all."""

    sequences: list[int] = field(default_factory=list)  # by process
    placement: list[Any] = field(default_factory=list)
    copies: Sequence[tuple[Case, list[int]]] = ()
    dense_state: str = "replicated"

    def __post_init__(self) -> None:
        self.sequences = [0] * sum(len(processes) for _, processes in self.copies)
        for case, processes in self.copies:
            for count, process in zip(case.sequences, processes, strict=True):
                self.sequences[process] = count

    @property
    def layout(self) -> World:  # type: ignore[override]
        return World.side_by_side([(self._state(case.layout), processes) for case, processes in self.copies])

    def _state(self, layout: Layout) -> Layout:
        schedule = layout.schedule.model_copy(update={"dense_state": self.dense_state})
        return layout.model_copy(update={"schedule": schedule})


CUT = [LayerPlacement(experts=experts) for experts in ([ALL, []], [[], ALL], [[], ALL])]
PAIR = Case([2, 0], hosts([], ALL), 2)
ALONE = Case([1], hosts(ALL), 2)
CASES = {
    "1+1 twice": Groups(copies=[(PAIR, [0, 1]), (PAIR, [2, 3])]),
    "1+1 and one alone": Groups(copies=[(Case([3, 0], hosts([], ALL), 2), [0, 2]), (ALONE, [1])]),
    "two alone, one in a window at a time": Groups(
        copies=[(ALONE, [1]), (Case([3], hosts(ALL), 2, schedule="sequential", recompute="all"), [0])]
    ),
    "experts elsewhere in each group": Groups(
        copies=[
            (Case([2, 0, 0], hosts([0], [2, 1], [5, 3, 4]), 2), [0, 1, 4]),
            (Case([1, 0], hosts([4, 0, 2], [5, 1, 3]), 4, recompute="experts"), [2, 3]),
        ]
    ),
    "replicated in one group": Groups(
        copies=[
            (Case([1, 1], hosts([1, 0], [2, 3], replicated=(5, 4)), 2), [0, 1]),
            (Case([4, 0], hosts([], [5, 4, 3, 0, 1, 2]), 1), [2, 3]),
        ],
        features=SIGMOID,
    ),
    "replicated in both groups": Groups(
        copies=[
            (Case([1, 1], hosts([0, 1], [2, 3], replicated=(4, 5)), 2), [0, 2]),
            (Case([2, 0], hosts([0], [1, 2, 3], replicated=(4, 5)), 2), [1, 3]),
        ]
    ),
    "other orders in each group": Groups(
        copies=[
            (Case([1, 0], hosts([0, 1], [2, 3, 4, 5]), 4, schedule="windowed", expert_order="between"), [0, 1]),
            (Case([2, 0], hosts([], ALL), 2, transfers="interleaved", recompute="all"), [2, 3]),
        ],
        features=BIAS | LOSSES | {"router_balance": "bias"},
    ),
    "two pipelines, cut at one place": Groups(
        copies=[
            (Case([1, 1], CUT, 2, schedule="sequential", pipeline=stages((1, [0]), (2, [1]))), [0, 2]),
            (Case([3, 3], CUT, 2, schedule="sequential", pipeline=stages((1, [0]), (2, [1]))), [1, 3]),
        ],
        features=BIAS | DENSE,
    ),
    "a pipeline, one cut elsewhere, and one device": Groups(
        copies=[
            (Case([1, 1], CUT, 2, schedule="sequential", pipeline=stages((1, [0]), (2, [1]))), [0, 1]),
            (
                Case([1, 1], [*CUT[1:2], CUT[0], CUT[0]], 2, pipeline=stages((1, [1]), (2, [0])), recompute="full"),
                [2, 3],
            ),
            (Case([2], hosts(ALL), 2), [4]),
        ],
        features=LOSSES,
    ),
    "the head apart, and one alone": Groups(
        copies=[
            (Case([2, 1, 0], hosts([], [1, 0], [2, 3, 4, 5]), 2, head=[1, 0, 2]), [0, 2, 3]),
            (Case([2], hosts(ALL), 1), [1]),
        ],
        features=BIAS | DENSE,
    ),
    "in shifts, and one alone": Groups(
        copies=[
            (Case([2, 2, 0], hosts([], [1, 0], [2, 3, 4, 5]), 3, shifts=[[0, 2], [1], []]), [0, 2, 3]),
            (ALONE, [1]),
        ],
        features=BIAS | DENSE,
    ),
    "four and one": Groups(
        copies=[
            (Case([2, 1, 0, 0], MIXED, 2, recompute="attention"), [0, 1, 2, 4]),
            (Case([1], hosts(ALL), 2), [3]),
        ],
        features=CAPACITY | LOSSES,
        documents="masked",
    ),
}
SHARDED = Groups(
    copies=[(Case([1, 1], hosts([0, 1, 2], [3, 4, 5]), 2), [0, 1]), (PAIR, [2, 3])], dense_state="optimizer"
)


@pytest.mark.parametrize("name", CASES)
def test_groups_equal_the_single_device_reference(name: str) -> None:
    case = CASES[name]
    assert case.layout.sequences == 8
    compare(case, run_workers(len(case.sequences), work, case))


def spans_of_a_step(rank: int, case: Groups) -> list[Span]:
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.step.trainer import Trainer

    mesh = join(case.layout, "cpu")
    trainer = Trainer.build(case.model, case.layout, case.train, mesh, sequence_length=LENGTH, precision="fp64")
    trainer.step(batches(), 0, record=True)
    return trainer.clock.spans


def test_gradients_are_summed_by_their_lane_as_scheduled_on_hosts_too() -> None:
    case = CASES["experts elsewhere in each group"]
    world = case.layout
    schedules = training_schedules(world)
    for process, spans in enumerate(run_workers(world.size, spans_of_a_step, case)):
        copy, rank = world.seat(process)
        names = [span.name for span in spans if span.lane == LANES[3]]
        reduces = [t for t in schedules[copy].transfers_of(rank) if t.kind is Kind.REDUCE]
        assert names == [display_name(t) for t in reduces]
        assert len(reduces) == MODEL.layers + (process in world.attending)  # hosts have no part in the head's
        assert {span.rank for span in spans} == {process}


def trained_states(rank: int, case: Groups, precisions: tuple[str, ...]) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses, and masters with moments after three steps."""
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.step.trainer import Trainer

    mesh = join(case.layout, "cpu")
    trainer = Trainer.build(
        case.model, case.layout, case.train, mesh, sequence_length=LENGTH, precision="bf16", rank_precisions=precisions
    )
    losses = [trainer.step(batches(), step).loss for step in range(3)]
    return losses, arrays(training_tensors(trainer.parts, trainer.optimizer))


def test_holders_step_alike_where_groups_compute_in_other_precisions() -> None:
    """To the bit: gradients are kept and summed in one precision, masters are in fp32 everywhere."""
    case = CASES["experts elsewhere in each group"]
    ranks = run_workers(5, trained_states, case, ("bf16", "fp32", "bf16", "fp32", "bf16"))
    _, _, wanted = trained(case.train)
    seen: dict[str, np.ndarray] = {}
    for losses, states in ranks:
        assert losses == ranks[0][0]
        for name, value in states.items():
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, seen.setdefault(name, value), err_msg=name)
    assert seen.keys() == training_shapes(MODEL).keys()
    assert ranks[0][0] == pytest.approx(wanted, rel=0.02)

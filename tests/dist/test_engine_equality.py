"""The engine equals the plain single-device model: loss and every gradient, over several optimizer steps."""

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from workers import run_workers

from builders import make_schedule
from hetermoe_cli.model.data.corpus import END_OF_TEXT, Batches
from hetermoe_cli.model.optimizer import learning_rate, make_optimizer
from hetermoe_cli.model.transformer import Transformer, initialise, named_state, named_tensors, parameter_slices
from hetermoe_cli.spec.layout import LayerPlacement, Layout, PipelineStage
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.schedule_choice import ExpertOrder, PassOrder, ScheduleName, TransferOrder
from hetermoe_cli.spec.train import Dispatch, Documents, Recompute, TrainSpec
from hetermoe_cli.spec.world import World

STEPS, LENGTH = 3, 12
MODEL = ModelConfig(
    name="test", layers=3, hidden_size=16, ffn_size=24, attention_heads=4, kv_heads=2, head_size=4,
    experts=6, top_k=2, vocab_size=256, initializer_range=0.2,
)  # fmt: skip


@dataclass
class Case:
    """A layout by name: sequences per rank and micro-batch, experts per rank (cyclic over layers), replicated."""

    sequences: list[int]
    placement: list[LayerPlacement]
    micro_batches: int = 2
    schedule: ScheduleName = "zebra"
    expert_order: ExpertOrder = "after"
    transfers: TransferOrder = "layered"
    recompute: Recompute = "none"
    router: str = "learned"
    documents: Documents = "joined"
    dispatch: Dispatch = "per_expert"
    passes: PassOrder = "in_turn"
    pipeline: list[PipelineStage] = field(default_factory=list)
    shifts: list[list[int]] = field(default_factory=list)
    head: list[int] = field(default_factory=list)
    features: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.model_validate(MODEL.model_dump() | self.features)

    @property
    def train(self) -> TrainSpec:
        return TRAIN.model_copy(update={"documents": self.documents})

    @property
    def layout(self) -> Layout:
        choice = make_schedule(
            self.schedule,
            self.micro_batches,
            experts=self.expert_order,
            transfers=self.transfers,
            recompute=self.recompute,
            dispatch=self.dispatch,
            passes=self.passes,
        )
        return Layout(
            schedule=choice,
            sequences_per_rank=self.sequences,
            placement=self.placement,
            pipeline=self.pipeline,
            shifts=self.shifts,
            head=self.head,
        )


def hosts(*experts: list[int], replicated: tuple[int, ...] = ()) -> list[LayerPlacement]:
    return [LayerPlacement(experts=list(experts), replicated=list(replicated))] * MODEL.layers


MIXED = [
    LayerPlacement(experts=[[5], [], [0, 1, 2], [3, 4]]),
    LayerPlacement(experts=[[], [], [0, 2, 4], [1, 3, 5]]),
    LayerPlacement(experts=[[0], [1], [5], [4]], replicated=[2, 3]),
]


def stages(*parts: tuple[int, list[int]]) -> list[PipelineStage]:
    return [PipelineStage(layers=layers, ranks=ranks) for layers, ranks in parts]


ONE_EACH = [LayerPlacement(experts=[[e for e in range(6) if rank == layer] for rank in range(3)]) for layer in range(3)]
TWO_STAGES = [
    LayerPlacement(experts=[[0, 1, 2], [3, 4, 5], [], []]),
    LayerPlacement(experts=[[], [], [0, 5], [1, 2, 3, 4]]),
    LayerPlacement(experts=[[], [], [], [0, 4]], replicated=[1, 2, 3, 5]),
]
APART = [
    LayerPlacement(experts=[[5], [], [0, 1, 2], [3, 4]]),
    LayerPlacement(experts=[[], [], [0, 2, 4], [1, 3, 5]]),
    LayerPlacement(experts=[[0], [1], [5, 2], [4, 3]]),
]
BY_TURNS = [LayerPlacement(experts=experts) for experts in ([[*range(6)], []], [[], [*range(6)]], [[*range(6)], []])]
SWAPPED = [p.model_copy(update={"experts": p.experts[2:] + p.experts[:2]}) for p in TWO_STAGES]
SIGMOID = {"router_score": "sigmoid", "router_renormalise": False, "router_scale": 2.5, "shared_experts": 2}
LOSSES = {"router_balance": "auxiliary", "router_auxiliary_loss": 0.5, "router_z_loss": 0.1}
BIAS = {"router_score": "sigmoid", "router_balance": "bias", "router_bias_rate": 0.05, "router_auxiliary_loss": 0.1}
DENSE = {"dense_layers": 1, "dense_ffn_size": 20}
CAPACITY = {"router_capacity": 0.8}
LATENT = {
    "kv_heads": 4, "head_size": 6,
    "latent": {"query_rank": 9, "key_value_rank": 7, "nope_size": 2, "rope_size": 4, "value_size": 3},
}  # fmt: skip
ROPE = {
    "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "beta_fast": 2.0, "beta_slow": 0.1
    }
}  # fmt: skip
CASES = {
    "1+1 R=1": Case([8, 0], hosts([], list(range(6))), 1),
    "1+1 R=2": Case([4, 0], hosts([], list(range(6))), 2),
    "1+1 R=4": Case([2, 0], hosts([], list(range(6))), 4),
    "1+1 recompute": Case([4, 0], hosts([], list(range(6))), 2, recompute="all"),
    "1+1 full recompute": Case([4, 0], hosts([], list(range(6))), 2, recompute="full"),
    "2+2 mixed, replicated, full recompute": Case([3, 1, 0, 0], MIXED, 2, recompute="full", features=LOSSES),
    "mixed, windows, between, full recompute": Case(
        [1, 1, 0, 0], MIXED, 4, schedule="windowed", expert_order="between", recompute="full", features=CAPACITY | BIAS
    ),
    "EP 2 interleaved, documents, full recompute": Case(
        [1, 1], hosts([0, 1, 2], [3, 4, 5]), 4, transfers="interleaved", recompute="full", documents="masked",
        features=SIGMOID,
    ),
    "dense layers, latent, full recompute": Case(
        [2, 1, 1, 0], MIXED, 2, recompute="full", features=LATENT | DENSE | {"dense_layers": 2}
    ),
    "1+1 once per device": Case([4, 0], hosts([], list(range(6))), 2, dispatch="per_device", features={"top_k": 3}),
    "EP 2 once per device, loop over experts": Case(
        [2, 2], hosts([0, 1, 2], [3, 4, 5]), 2, dispatch="per_device", features=SIGMOID | {"ffn_size": 25}
    ),
    "2+2 mixed, replicated, once per device, full recompute": Case(
        [3, 1, 0, 0], MIXED, 2, recompute="full", dispatch="per_device", features=LOSSES | {"top_k": 4}
    ),
    "mixed, windows, between, once per device": Case(
        [1, 1, 0, 0], MIXED, 4, schedule="windowed", expert_order="between", dispatch="per_device",
        features=CAPACITY | BIAS | {"top_k": 3},
    ),
    "pipeline of 3 stages": Case(
        [2, 2, 2], ONE_EACH, 4, schedule="sequential", pipeline=stages((1, [0]), (1, [1]), (1, [2]))
    ),
    "pipeline of 3 stages, one window, bias, dense layers": Case(
        [4, 4, 4], ONE_EACH, 2, pipeline=stages((1, [0]), (1, [1]), (1, [2])), features=BIAS | DENSE
    ),
    "pipeline, full recompute, documents": Case(
        [1, 1, 2, 0], TWO_STAGES, 4, schedule="windowed", recompute="full", documents="masked",
        pipeline=stages((1, [0, 1]), (2, [2, 3])), features=DENSE | LOSSES,
    ),
    "pipeline, between, interleaved, once per device, capacity": Case(
        [2, 2, 1, 3], TWO_STAGES, 2, schedule="sequential", expert_order="between", transfers="interleaved",
        dispatch="per_device", pipeline=stages((1, [0, 1]), (2, [2, 3])), features=CAPACITY | BIAS | {"top_k": 3},
    ),
    "pipeline, last ranks first, recompute": Case(
        [3, 1, 1, 3], SWAPPED, 2, schedule="sequential", recompute="all", pipeline=stages((1, [2, 3]), (2, [0, 1])),
        features=LATENT,
    ),
    "pipeline, EP and zebra, uneven, windows": Case(
        [1, 1, 2, 0], TWO_STAGES, 4, schedule="windowed", pipeline=stages((1, [0, 1]), (2, [2, 3])), features=LOSSES
    ),
    "pipeline of 3 stages, woven, dense layers": Case(
        [1, 1, 1], ONE_EACH, 8, schedule="sequential", passes="woven", pipeline=stages((1, [0]), (1, [1]), (1, [2])),
        features=BIAS | DENSE,
    ),
    "pipeline, woven, every stage its own recomputation": Case(
        [1, 1, 2, 0], TWO_STAGES, 4, schedule="sequential", passes="woven", documents="masked", features=LOSSES,
        pipeline=[
            PipelineStage(layers=1, ranks=[0, 1], recompute="attention"),
            PipelineStage(layers=2, ranks=[2, 3], recompute="full"),
        ],
    ),
    "mixed, windows, woven": Case(
        [1, 1, 0, 0], MIXED, 4, schedule="windowed", passes="woven", features=CAPACITY | SIGMOID
    ),
    "EP 2 woven, full recompute, once per device": Case(
        [1, 1], hosts([0, 1, 2], [3, 4, 5]), 4, schedule="sequential", passes="woven", recompute="full",
        dispatch="per_device", features={"top_k": 3},
    ),
    "shifts, one helps once": Case(
        [2, 2, 0], hosts([], [], list(range(6))), 4, shifts=[[0, 2, 3], [1], []], features=DENSE
    ),
    "shifts, hosts attend at times, windows, between, full recompute": Case(
        [1, 1, 1, 0], APART, 4, schedule="windowed", expert_order="between", recompute="full",
        shifts=[[0, 1, 2, 3], [0, 3], [1, 2], []], features=CAPACITY | BIAS,
    ),
    "head on a host and one that attends, in shifts": Case(
        [2, 2, 0], hosts([], [], list(range(6))), 4, shifts=[[0, 2, 3], [1], []], head=[0, 2, 3], recompute="full"
    ),
    "shifts, one as much as two, interleaved, once per device": Case(
        [2, 1, 1, 0], APART, 4, transfers="interleaved", dispatch="per_device", documents="masked",
        shifts=[[0, 2], [1, 3], [1, 3], []], features=LOSSES | {"top_k": 3},
    ),
    "shifts, alone with all experts, windows of one, recompute": Case(
        [2, 2], BY_TURNS, 4, schedule="sequential", recompute="all", shifts=[[1, 2, 3], [0]], features=SIGMOID
    ),
    "1+1 sequential": Case([4, 0], hosts([], list(range(6))), 2, schedule="sequential"),
    "1+1 balanced router": Case([4, 0], hosts([], list(range(6))), 2, router="balanced"),
    "1+1 all replicated": Case([4, 0], hosts([], [], replicated=tuple(range(6))), 2),
    "2+1": Case([2, 2, 0], hosts([], [], list(range(6))), 2),
    "2+1 uneven sequences": Case([3, 1, 0], hosts([], [], list(range(6))), 2),
    "3+1": Case([2, 1, 1, 0], hosts([], [], [], list(range(6))), 2),
    "2+2 R=1": Case([4, 4, 0, 0], hosts([], [], [0, 1, 2], [3, 4, 5]), 1),
    "2+2 R=2": Case([2, 2, 0, 0], hosts([], [], [0, 1, 2], [3, 4, 5]), 2),
    "2+2 R=4": Case([1, 1, 0, 0], hosts([], [], [4, 1, 2], [3, 0, 5]), 4),
    "2+2 experts on attending ranks": Case([2, 2, 0, 0], hosts([0], [1], [2, 3], [4, 5]), 2),
    "2+2 mixed, replicated, recompute": Case([3, 1, 0, 0], MIXED, 2, recompute="all"),
    "2+2 old device attends": Case([2, 1, 1, 0], MIXED, 2),
    "EP 2": Case([2, 2], hosts([0, 1, 2], [3, 4, 5]), 2),
    "EP 4 uneven": Case([1, 1, 1, 1], hosts([0, 1], [2, 3], [4], [5]), 2),
    "2+2 windows": Case([1, 1, 0, 0], hosts([], [], [4, 1, 2], [3, 0, 5]), 4, schedule="windowed"),
    "2+2 experts between": Case([1, 1, 0, 0], hosts([0], [1], [2, 3], [4, 5]), 4, expert_order="between"),
    "mixed, windows, between, recompute": Case(
        [1, 1, 0, 0], MIXED, 4, schedule="windowed", expert_order="between", recompute="all"
    ),
    "recompute attention": Case([2, 2, 0, 0], MIXED, 2, recompute="attention"),
    "recompute experts": Case([2, 2, 0, 0], MIXED, 2, recompute="experts"),
    "EP 2 between, interleaved": Case(
        [1, 1], hosts([0, 1, 2], [3, 4, 5]), 4, expert_order="between", transfers="interleaved"
    ),
    "EP 2 sequential": Case([2, 2], hosts([0, 1, 2], [3, 4, 5]), 2, schedule="sequential"),
    "replicated on ranks that host nothing": Case([2, 2, 0], hosts([], [], [0, 1, 2, 3], replicated=(4, 5)), 2),
    "replicated, recompute, one attends": Case([4, 0], hosts([], [0, 1, 2, 3], replicated=(4, 5)), 2, recompute="all"),
    "one rank": Case([4], hosts(list(range(6))), 2),
    "left out": Case([4, 0, 0], hosts([], list(range(6)), []), 2),
    "sigmoid, scaled, not renormalised, shared experts": Case([3, 1, 0, 0], MIXED, 2, features=SIGMOID),
    "shared experts, recompute": Case([4, 0], hosts([], list(range(6))), 2, recompute="all", features=SIGMOID),
    "router losses, R=1": Case([8, 0], hosts([], list(range(6))), 1, features=LOSSES),
    "router losses, uneven, recompute": Case([3, 1, 0, 0], MIXED, 2, recompute="all", features=LOSSES),
    "router losses, EP, R=4": Case([1, 1], hosts([0, 1, 2], [3, 4, 5]), 4, features=LOSSES),
    "bias, EP": Case([2, 2], hosts([0, 1, 2], [3, 4, 5]), 2, features=BIAS),
    "bias, mixed, windows": Case([1, 1, 0, 0], MIXED, 4, schedule="windowed", features=BIAS),
    "capacity, R=1": Case([8, 0], hosts([], list(range(6))), 1, features=CAPACITY),
    "capacity, EP, R=4": Case([1, 1], hosts([0, 1, 2], [3, 4, 5]), 4, features=CAPACITY | LOSSES),
    "capacity, mixed, windows, recompute": Case(
        [1, 1, 0, 0], MIXED, 4, schedule="windowed", recompute="all", features=CAPACITY | BIAS
    ),
    "dense layer": Case([4, 0], hosts([], list(range(6))), 2, features=DENSE),
    "dense layers, recompute": Case(
        [3, 1, 0], hosts([], [], list(range(6))), 2, recompute="all", features=DENSE | {"dense_layers": 2} | SIGMOID
    ),
    "dense layers, mixed, windows, documents": Case(
        [1, 1, 0, 0], MIXED, 4, schedule="windowed", documents="masked", features=DENSE | {"dense_layers": 2} | LOSSES
    ),
    "documents": Case([4, 0], hosts([], list(range(6))), 2, documents="masked"),
    "norms of queries and keys, mixed, recompute, documents": Case(
        [2, 1, 1, 0], MIXED, 2, recompute="all", documents="masked", features={"qk_norm": True} | DENSE
    ),
    "documents, mixed, windows, recompute, rope scaling": Case(
        [1, 1, 0, 0], MIXED, 4, schedule="windowed", recompute="all", documents="masked", features=ROPE | LOSSES
    ),
    "latent": Case([4, 0], hosts([], list(range(6))), 2, features=LATENT),
    "head on the host": Case([4, 0], hosts([], list(range(6))), 2, head=[0, 1]),
    "head on the host, full recompute": Case([4, 0], hosts([], list(range(6))), 2, recompute="full", head=[0, 1]),
    "head in parts of sequences, windows, between, recompute": Case(
        [3, 1, 0, 0], MIXED, 2, schedule="windowed", expert_order="between", recompute="all", head=[3, 0, 2, 4],
        features=LOSSES | DENSE,
    ),
    "head on all but the first, interleaved, documents": Case(
        [1, 1, 0, 0], MIXED, 4, transfers="interleaved", documents="masked", head=[0, 7, 1, 5], features=BIAS
    ),
    "EP 2, head as attended to": Case([2, 2], hosts([0, 1, 2], [3, 4, 5]), 2, head=[1, 1]),
    "pipeline, head on the last stage's host": Case(
        [1, 1, 2, 0], TWO_STAGES, 4, schedule="windowed", pipeline=stages((1, [0, 1]), (2, [2, 3])), head=[0, 0, 1, 2],
        recompute="full",
    ),
    "latent, dense layers, mixed, windows, recompute, documents, rope scaling": Case(
        [1, 1, 0, 0], MIXED, 4, schedule="windowed", recompute="all", documents="masked",
        features=LATENT | ROPE | DENSE | {"dense_layers": 2} | BIAS,
    ),
    "latent, EP, capacity": Case([2, 2], hosts([0, 1, 2], [3, 4, 5]), 2, features=LATENT | SIGMOID | CAPACITY),
}  # fmt: skip
TRAIN = TrainSpec(
    sequence_length=LENGTH, global_batch_sequences=8, steps=STEPS, warmup_steps=1, learning_rate=0.01, seed=3
)


OVER_GLOO = [
    "1+1 R=2",
    "2+1 uneven sequences",
    "2+2 mixed, replicated, recompute",
    "mixed, windows, between, recompute",
    "mixed, windows, between, full recompute",
    "mixed, windows, between, once per device",
    "EP 2 between, interleaved",
    "left out",
    "pipeline, woven, every stage its own recomputation",
    "shifts, one helps once",
    "shifts, hosts attend at times, windows, between, full recompute",
    "head in parts of sequences, windows, between, recompute",
    "pipeline, head on the last stage's host",
]


def batches() -> Batches:
    """Random bytes; one in six ends a document, so that some sequences hold several and some none."""
    tokens = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
    tokens[np.random.default_rng(1).random(4000) < 1 / 6] = END_OF_TEXT
    return Batches([tokens], LENGTH, 8, seed=1)


def starve(parts: torch.nn.Module) -> None:
    """Make the gate of layer 0 never choose expert 0: an expert that gets no token."""
    with torch.no_grad():
        for name, tensor in named_tensors(parts).items():
            if name == "layers.0.gate.weight":
                tensor[0] = 0
                tensor[1:] *= 10


def gradients(parts: torch.nn.Module) -> dict[str, np.ndarray]:
    result = {}
    for name, (parameter, index) in parameter_slices(parts).items():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        result[name] = (grad if index is None else grad[index]).cpu().numpy().copy()
    return result


@dataclass
class Step:
    """What one step leaves: clipped gradients, weights and selection biases after it, the rest before."""

    figures: list[float]  # loss, auxiliary loss, z-loss, gradient norm
    rows: np.ndarray
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    biases: dict[str, np.ndarray]


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.cpu().numpy().copy() for name, tensor in tensors.items()}


def reference(case: Case) -> list[Step]:
    torch.set_num_threads(1)
    end = END_OF_TEXT if case.documents == "masked" else None
    model = Transformer(case.model, case.router, end).double()
    initialise(model, case.model, seed=3)
    starve(model)
    optimizer, data, result = make_optimizer(model, TRAIN), batches(), []
    for step in range(STEPS):
        optimizer.zero_grad()
        outcome = model.run(*data.sequences(step, 0, 8))
        ((outcome.loss + outcome.router_losses.sum()) / (8 * LENGTH)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(TRAIN, step)
        found = gradients(model)
        optimizer.step()
        model.dense.update_biases(outcome.expert_rows)
        losses = torch.cat([outcome.loss[None], outcome.router_losses]) / (8 * LENGTH)
        figures, rows = [*losses.tolist(), norm.item()], outcome.expert_rows.numpy()
        result.append(Step(figures, rows, found, arrays(named_tensors(model)), arrays(named_state(model))))
    return result


def work(rank: int, case: Case, devices: list[str] | None = None, backend: Any = None, shares: bool = True):
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.step.trainer import Trainer

    layout = case.layout
    mesh = join(layout, devices[rank] if devices else "cpu", backend, shares=shares)
    assert bool(mesh.mail) == (shares and devices is None)
    trainer = Trainer.build(
        case.model, layout, case.train, mesh, sequence_length=LENGTH, precision="fp64", router=case.router
    )
    starve(trainer.parts)
    result = []
    for step in range(STEPS):
        found = trainer.step(batches(), step)
        figures, parts = [found.loss, *found.router_losses, found.gradient_norm], trainer.parts
        weights, biases = arrays(named_tensors(parts)), arrays(named_state(parts))
        result.append(Step(figures, found.expert_rows, gradients(parts), weights, biases))
    return result


@pytest.mark.parametrize("name", CASES)
def test_equals_single_device_reference(name: str) -> None:
    case = CASES[name]
    compare(case, run_workers(len(case.sequences), work, case))


def loads_compiler(rank: int, case: Case) -> bool:
    work(rank, case)
    return bool({"torch._dynamo", "sympy"} & sys.modules.keys())


def test_no_rank_loads_torchs_compiler() -> None:
    """A second and 55 MB of every worker; half as much for sympy."""
    assert run_workers(2, loads_compiler, CASES["1+1 R=2"]) == [False, False]


@pytest.mark.parametrize("name", OVER_GLOO)
def test_equals_it_over_gloo(name: str) -> None:
    """As between machines."""
    case = CASES[name]
    compare(case, run_workers(len(case.sequences), work, case, None, None, False))


def attending(case: Case, bias: str) -> tuple[int, ...]:
    """Processes that have the gate of a selection bias, `layers.2.gate.selection_bias`."""
    return World.of(case.layout).attending_at(int(bias.split(".")[1]))


def compare(case: Case, ranks: list[list[Step]], error: float = 1e-12) -> None:
    """Every rank's steps with the reference's; `error`: of figures and gradients."""
    for step, wanted in enumerate(reference(case)):
        seen: set[str] = set()
        for rank, found in enumerate(steps[step] for steps in ranks):
            assert found.figures == pytest.approx(wanted.figures, rel=error, abs=error)
            np.testing.assert_array_equal(found.rows, wanted.rows)
            for name, gradient in found.gradients.items():
                np.testing.assert_allclose(gradient, wanted.gradients[name], rtol=0, atol=error, err_msg=name)
                seen.add(name)
            for name, weight in found.weights.items():
                np.testing.assert_allclose(weight, wanted.weights[name], rtol=0, atol=1e-9, err_msg=name)
            assert found.biases.keys() == {name for name in wanted.biases if rank in attending(case, name)}
            for name, bias in found.biases.items():  # bit by bit, on every attending rank
                np.testing.assert_array_equal(bias, wanted.biases[name], err_msg=name)
        assert seen == wanted.gradients.keys()


def test_capacity_drops_rows_of_some_experts_in_every_step() -> None:
    for step in reference(CASES["capacity, R=1"]):
        dropped = 8 * LENGTH * MODEL.top_k - step.rows.sum(axis=1)
        assert (dropped > 0).all()
        assert step.rows.max() <= 8 * 4  # ceil(0.8 * 12 * 2 / 6) a sequence
        assert step.rows.min() < 8 * 4


@pytest.mark.parametrize("name", ["documents", "documents, mixed, windows, recompute, rope scaling"])
def test_masks_and_scaled_positions_matter(name: str) -> None:
    case = CASES[name]
    masked = reference(case)[0].figures[0]
    assert masked != pytest.approx(reference(replace(case, documents="joined"))[0].figures[0], abs=1e-4)
    if case.features:
        assert masked != pytest.approx(reference(replace(case, features=LOSSES))[0].figures[0], abs=1e-5)


def test_a_bias_moves_the_choice_within_the_tested_steps() -> None:
    case = CASES["bias, EP"]
    without = Case(case.sequences, case.placement, features=BIAS | {"router_bias_rate": 1e-9})
    moved, still = reference(case)[-1], reference(without)[-1]
    assert not np.array_equal(moved.rows, still.rows)
    assert any(bias.any() for bias in moved.biases.values())

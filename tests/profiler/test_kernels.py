"""Kernel measurements: what is timed, what is counted, and how failures read."""

import time

import pytest
import torch
from torch import Tensor, nn

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.model.kernels.grouped import run_experts
from hetermoe_cli.model.transformer import DenseModel
from hetermoe_cli.profiler.kernels import Bench, Sizes, profile_kernels
from hetermoe_cli.profiler.measure import Caches, Case, Effort, measure, saved_bytes
from hetermoe_cli.profiler.spread import relative_spread
from hetermoe_cli.runtime.modules.parts import DTYPES
from hetermoe_cli.spec.named_models import NAMED_MODELS
from hetermoe_cli.spec.profile import KernelTable, Precision

CPU = torch.device("cpu")
TINY = NAMED_MODELS["tiny"]
EFFORT = Effort(visits=2, visit_seconds=0, visit_runs=1)
SIZES = Sizes(sequence_lengths=(64, 32, 64), sequences=(2, 1), tokens=(32, 8, 8))


@pytest.fixture(scope="module")
def progress() -> list[tuple[int, int]]:
    return []


@pytest.fixture(scope="module")
def table(progress: list[tuple[int, int]]) -> KernelTable:
    """Tiny on the CPU, sizes given unsorted and doubled."""
    return profile_kernels(TINY, "fp32", CPU, SIZES, EFFORT, lambda done, total: progress.append((done, total)))


def test_every_size_is_measured_once_in_order(table: KernelTable) -> None:
    assert [(p.sequence_length, p.sequences) for p in table.attention] == [(32, 1), (32, 2), (64, 1), (64, 2)]
    assert [p.tokens for p in table.expert] == [p.tokens for p in table.head] == [8, 32]
    assert (table.shape, table.precision, table.peak_bytes) == (TINY.shape, "fp32", None)


def test_seconds_are_of_a_plausible_magnitude(table: KernelTable) -> None:
    for point in [*table.attention, *table.expert, *table.head]:
        assert 1e-6 < point.forward_seconds < 1
        assert 1e-6 < point.backward_seconds < 1
        assert point.spread is not None
    assert 1e-11 < table.optimizer_seconds_per_parameter < 1e-5


def test_more_tokens_keep_more_bytes(table: KernelTable) -> None:
    by_tokens = {p.sequence_length * p.sequences: p.saved_bytes for p in table.attention}
    assert by_tokens[32] < by_tokens[64] < by_tokens[128]
    assert table.expert[1].saved_bytes == 4 * table.expert[0].saved_bytes
    assert table.head[0].saved_bytes < table.head[1].saved_bytes


def test_progress_counts_visits_to_the_end(table: KernelTable, progress: list[tuple[int, int]]) -> None:
    cases = len(table.attention) + len(table.expert) + len(table.head)
    assert progress == [(done, 2 * cases) for done in range(1, 2 * cases + 1)]


def test_saved_bytes_equal_a_hand_count() -> None:
    """relu(linear(x)): x [4, 8] is saved and a leaf, the result [4, 5] is saved, the weight is a parameter."""
    linear = nn.Linear(8, 5)
    case = Case("a test", lambda: [torch.ones(4, 8, requires_grad=True)], lambda leaves: [linear(leaves[0]).relu()])
    assert saved_bytes(case, list(linear.parameters())) == 4 * (4 * 8 + 4 * 5)


def test_saved_bytes_count_a_storage_once_and_whole() -> None:
    """A view keeps its whole storage; a tensor saved twice is one."""

    def forward(leaves: list[Tensor]) -> list[Tensor]:
        wide = leaves[0] * 2  # saves nothing: the factor is a number
        part = wide[:3]
        return [part * part]

    case = Case("a test", lambda: [torch.ones(10, requires_grad=True)], forward)
    assert saved_bytes(case, []) == 4 * (10 + 10)


def test_an_expert_saves_rows_gate_and_up() -> None:
    table = profile_kernels(TINY, "fp64", CPU, SIZES, EFFORT)
    assert [point.saved_bytes / point.tokens for point in table.expert] == [
        8 * (TINY.hidden_size + 1 + 2 * TINY.ffn_size)
    ] * 2


def test_experts_are_measured_as_the_engine_runs_them(table: KernelTable) -> None:
    """In one grouped product in fp32."""
    grouped, alone = Bench(TINY, torch.float32, CPU), Bench(TINY, torch.float64, CPU)
    assert (grouped.experts, alone.experts) == (4, 1)
    for bench in (grouped, alone):
        case = bench.expert(16)
        rows, weights = case.leaves()
        (outputs,) = case.forward([rows, weights])
        assert case.parts == len(bench.group.ids) == len(outputs) // 16
        alike = run_experts(rows, bench.group.gate_up, bench.group.down, [16] * case.parts, grouped=False)
        torch.testing.assert_close(outputs, alike * weights[:, None])
    each = 4 * (TINY.hidden_size + 1 + 2 * TINY.ffn_size)
    for point in table.expert:
        assert point.saved_bytes == point.tokens * each


@pytest.mark.parametrize("stage", ["attention", "head"])
def test_a_stage_gives_gradients_to_all_inputs_and_parameters(stage: str) -> None:
    bench = Bench(TINY, torch.float32, CPU)
    case = bench.attention(8, 2) if stage == "attention" else bench.head(16)
    leaves = case.leaves()
    outputs = case.forward(leaves)
    torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)
    used = bench.dense.layers if stage == "attention" else nn.ModuleList([bench.dense.norm, bench.dense.head])
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in used.parameters())


DENSE = TINY.model_copy(update={"dense_layers": 2, "dense_ffn_size": 160})


def test_a_dense_layer_is_measured_at_the_sizes_of_attention() -> None:
    found = profile_kernels(DENSE, "fp32", CPU, SIZES, EFFORT)
    sizes = [(p.sequence_length, p.sequences) for p in found.dense]
    assert sizes == [(p.sequence_length, p.sequences) for p in found.attention]
    assert all(1e-6 < p.forward_seconds < 1 and 1e-6 < p.backward_seconds < 1 for p in found.dense)
    assert [p.tokens for p in found.expert] == [p.tokens for p in found.head] == [8, 32]


def test_a_dense_layer_gives_gradients_to_its_input_and_parameters() -> None:
    bench = Bench(DENSE, torch.float32, CPU)
    case = bench.dense_layer(8, 2)
    (leaf,) = leaves = case.leaves()
    torch.autograd.backward(case.forward(leaves), [torch.randn_like(leaf)])
    parameters = list(bench.dense.dense_layers.parameters())
    assert sum(p.numel() for p in parameters) == DENSE.dense_layer_parameters
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in [leaf, *parameters])


def test_what_the_first_stage_saves_is_the_sum_of_its_measured_parts() -> None:
    """Both read what the last dense layer made: a leaf where attention is measured."""
    bench, dense = Bench(DENSE, torch.float32, CPU), DenseModel(DENSE)

    def forward(leaves: list[Tensor]) -> list[Tensor]:
        hidden = leaves[0]
        for block in dense.dense_layers:
            hidden = block(hidden)
        return list(dense.stage(0, hidden)[:3])

    case = Case("a first stage", lambda: [torch.randn(2, 12, TINY.hidden_size, requires_grad=True)], forward)
    found = saved_bytes(case, list(dense.parameters()))
    parts = 2 * saved_bytes(bench.dense_layer(12, 2), bench.parameters)
    parts += saved_bytes(bench.attention(12, 2), bench.parameters)
    assert found == pytest.approx(parts, rel=0.01)


class SlowBackward(torch.autograd.Function):
    """Identity whose backward takes at least 10 ms."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        time.sleep(0.01)
        return gradient


def test_forward_and_backward_are_timed_apart_and_runs_are_bounded() -> None:
    def forward(leaves: list[Tensor]) -> list[Tensor]:
        time.sleep(0.002)
        return [SlowBackward.apply(leaves[0])]  # type: ignore[no-untyped-call]

    case = Case("a test", lambda: [torch.ones(1, requires_grad=True)], forward)
    (samples,) = measure([case], CPU, Effort(visits=3, visit_seconds=10, visit_runs=2), None)
    assert len(samples.forward) == len(samples.backward) == 6
    assert min(samples.forward) >= 0.002
    assert min(samples.backward) >= 0.01
    assert min(samples.forward) < 0.01


def test_cases_take_turns() -> None:
    order: list[str] = []

    def case(name: str) -> Case:
        def forward(leaves: list[Tensor]) -> list[Tensor]:
            order.append(name)
            return [leaves[0] * 2]

        return Case(name, lambda: [torch.ones(1, requires_grad=True)], forward)

    measure([case("a"), case("b")], CPU, Effort(visits=2, visit_seconds=0), None)
    assert order == ["a", "a", "b", "b"] * 2  # warm-up and one run a visit


def test_caches_are_emptied_before_every_pass_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(Caches, "empty", lambda self: order.append("empty"))

    def forward(leaves: list[Tensor]) -> list[Tensor]:
        order.append("forward")
        leaves[0].register_hook(lambda gradient: order.append("backward"))
        return [leaves[0] * 2]

    case = Case("a test", lambda: [torch.ones(1, requires_grad=True)], forward)
    measure([case], CPU, Effort(visits=1, visit_seconds=10, visit_runs=2), None)
    warm_up, timed = order[:2], order[2:]
    assert warm_up == ["forward", "backward"]
    assert [pass_ for pass_ in timed if pass_ != "backward"] == ["empty", "forward", "empty"] * 2


def test_emptied_caches_hold_something_else() -> None:
    caches = Caches(CPU)
    caches._other.fill_(1)
    caches.empty()
    assert len(caches._other) >= 2**26
    assert not caches._other.any()


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert relative_spread([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx(2 / 3)
    assert relative_spread([7.0]) == 0


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"])
def test_out_of_memory_names_the_size(message: str) -> None:
    def forward(leaves: list[Tensor]) -> list[Tensor]:
        raise RuntimeError(message)

    case = Case("attention of 9 x 99 tokens", lambda: [torch.ones(1)], forward)
    for action in (lambda: measure([case], CPU, EFFORT, None), lambda: saved_bytes(case, [])):
        with pytest.raises(UserError, match="attention of 9 x 99 tokens does not fit") as caught:
            action()
        assert caught.value.code == ExitCode.DOES_NOT_FIT


def test_other_errors_of_a_kernel_pass_through() -> None:
    def forward(leaves: list[Tensor]) -> list[Tensor]:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        measure([Case("a test", lambda: [torch.ones(1)], forward)], CPU, EFFORT, None)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_measured_on_the_cpu_too(precision: Precision) -> None:
    table = profile_kernels(TINY, precision, CPU, SIZES, EFFORT)
    assert table.precision == precision
    bench = Bench(TINY, DTYPES[precision], CPU)
    assert {p.dtype for p in bench.parameters} == {DTYPES[precision]}
    assert {p.grad.dtype for p in bench.parameters if p.grad is not None} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_measures_fp16_and_its_peak_memory() -> None:
    sizes = Sizes(sequence_lengths=(256, 1024), sequences=(1,), tokens=(64, 8192))
    result = profile_kernels(NAMED_MODELS["mixtral-d1"], "fp16", torch.device("cuda", 0), sizes, EFFORT)
    assert result.peak_bytes is not None
    assert result.peak_bytes > max(p.saved_bytes for p in [*result.attention, *result.head])
    assert result.expert[1].forward_seconds > result.expert[0].forward_seconds

"""The engine on CUDA against the reference on the CPU: one rank, a truly mixed pair, two ranks on one card, NCCL."""

import itertools
from typing import Any

import pytest
import torch
from test_engine_equality import CASES, LENGTH, Case, batches, compare, work
from workers import run_workers

from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.trace import LANES, Span, display_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ERROR = 1e-10  # kernels sum in other orders than the CPU's
CARD = "cuda:0"
PAIRS = [
    "1+1 R=2",
    "1+1 recompute",
    "EP 2",
    "EP 2 between, interleaved",
    "router losses, EP, R=4",
    "bias, EP",
    "capacity, R=1",
    "documents",
    "latent",
    "latent, EP, capacity",
]


def two_ranks(name: str) -> Case:
    case = CASES[name]
    return case if len(case.sequences) == 2 else pytest.skip(f"case {name} has {len(case.sequences)} ranks")


@pytest.mark.parametrize("name", ["one rank"])
def test_one_rank_on_a_card_equals_the_reference(name: str) -> None:
    compare(CASES[name], run_workers(1, work, CASES[name], [CARD]), ERROR)


@pytest.mark.parametrize("name", PAIRS)
def test_attention_on_the_card_and_experts_on_the_cpu_equal_the_reference(name: str) -> None:
    case = two_ranks(name)
    compare(case, run_workers(2, work, case, [CARD, "cpu"], "gloo"), ERROR)


def test_experts_on_the_card_and_attention_on_the_cpu_equal_the_reference() -> None:
    case = two_ranks("1+1 R=2")
    compare(case, run_workers(2, work, case, ["cpu", CARD], "gloo"), ERROR)


@pytest.mark.parametrize("name", PAIRS)
def test_two_ranks_on_one_card_through_the_host_equal_the_reference(name: str) -> None:
    case = two_ranks(name)
    compare(case, run_workers(2, work, case, [CARD, CARD], "gloo"), ERROR)


@pytest.mark.parametrize("name", PAIRS)
def test_two_ranks_with_nccl_equal_the_reference(name: str) -> None:
    case, cards = two_ranks(name), torch.cuda.device_count()
    try:
        ranks = run_workers(2, work, case, [CARD, f"cuda:{min(1, cards - 1)}"], "nccl")
    except AssertionError as error:
        if cards == 1 and any(word in str(error) for word in ("Duplicate GPU", "invalid usage", "ncclInvalidUsage")):
            pytest.skip("NCCL refuses two ranks on one card")
        raise
    compare(case, ranks, ERROR)


def step_without_waiting(rank: int, case: Case, devices: list[str]) -> tuple[list[float], list[Span], float]:
    """Losses of two steps; in the second, any call that makes a thread wait for the whole stream is an error."""
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.step.trainer import Trainer

    mesh = join(case.layout, devices[rank], "gloo")
    trainer = Trainer.build(case.model, case.layout, case.train, mesh, sequence_length=LENGTH, precision="fp32")
    losses = [trainer.step(batches(), 0).loss]
    run = trainer.engine.run

    def strictly(*arguments: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    if mesh.device.type == "cuda":
        trainer.engine.run = strictly  # type: ignore[method-assign]
    result = trainer.step(batches(), 1, record=True)
    return [*losses, result.loss], trainer.clock.spans, result.count_wait_seconds


@pytest.mark.parametrize(("name", "devices"), [("one rank", [CARD]), ("1+1 R=2", [CARD, "cpu"]), ("EP 2", [CARD] * 2)])
def test_no_thread_waits_for_a_stream_and_spans_are_of_the_device(name: str, devices: list[str]) -> None:
    case = CASES[name]
    ranks = run_workers(len(devices), step_without_waiting, case, devices)
    schedule = training_schedule(case.layout)
    for rank, (losses, spans, waited) in enumerate(ranks):
        assert losses == ranks[0][0]
        assert waited == ranks[0][2] >= 0
        tasks = [span for span in spans if span.lane == LANES[0]]
        assert sorted(span.name for span in tasks) == sorted(map(display_name, schedule.compute[rank]))
        assert sorted(span.name for span in spans if span.lane != LANES[0]) == sorted(
            map(display_name, schedule.transfers_of(rank))
        )
        tasks.sort(key=lambda span: span.start)
        for before, after in itertools.pairwise(tasks):
            assert before.start <= before.end <= after.start + 1e-3

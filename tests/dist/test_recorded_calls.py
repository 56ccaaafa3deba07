"""What the engine really calls is exactly the derived list, in its one order where lanes take turns."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_engine_equality import CASES, LENGTH, TRAIN, Case, batches
from workers import run_workers

from hetermoe_cli.runtime.calls import COMMUNICATORS, WIDEST, Call, calls_of
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.spec.layout import Layout

Recorded = tuple[str, str, int, str, int]  # communicator, operation, peer, dtype, elements
NAMES = [
    "1+1 R=2",
    "2+1 uneven sequences",
    "2+2 mixed, replicated, recompute",
    "mixed, windows, between, recompute",
    "EP 2 between, interleaved",
    "replicated on ranks that host nothing",
    "left out",
]
STATES = [(name, "replicated") for name in NAMES]
STATES += [(name, state) for name in NAMES[2:4] for state in ("optimizer", "full")]
STATES += [(name, "full") for name in ("2+1 uneven sequences", "EP 2 between, interleaved", "left out")]
DTYPES = {"torch.float64": "fp64", "torch.int64": "int64"}


def laid_out(case: Case, state: str) -> Layout:
    """The case's layout, with the dense part's states shared out or not."""
    layout = case.layout
    return layout.model_copy(update={"schedule": layout.schedule.model_copy(update={"dense_state": state})})


def work(rank: int, case: Case, layout: Layout, ordered: bool) -> tuple[list[Recorded], np.ndarray, float]:
    import torch.distributed as dist

    from hetermoe_cli.runtime import mesh as mesh_module
    from hetermoe_cli.runtime.mesh import join
    from hetermoe_cli.runtime.trainer import Trainer

    mesh = replace(join(layout, "cpu"), ordered=ordered)
    names = {id(mesh.to_experts): COMMUNICATORS[1], id(mesh.from_experts): COMMUNICATORS[2], id(None): COMMUNICATORS[0]}
    names[id(mesh.attending)] = COMMUNICATORS[3] if mesh.attending is not None else COMMUNICATORS[0]
    found: list[Recorded] = []
    batch, reduce, gather = dist.batch_isend_irecv, dist.all_reduce, mesh_module.ALL_GATHER

    def batch_isend_irecv(operations: list[Any]) -> Any:
        for one in operations:
            kind = "send" if one.op is dist.isend else "receive"
            found.append((names[id(one.group)], kind, one.peer, str(one.tensor.dtype), one.tensor.numel()))
        return batch(operations)

    def all_reduce(tensor: Any, group: Any = None) -> Any:
        found.append((names[id(group)], "all-reduce", -1, str(tensor.dtype), tensor.numel()))
        return reduce(tensor, group=group)

    def all_gather(everyone: Any, own: Any, group: Any) -> Any:
        found.append((names[id(group)], "all-gather", -1, str(own.dtype), own.numel()))
        return gather(everyone, own, group=group)

    trainer = Trainer.build(case.model, layout, TRAIN, mesh, sequence_length=LENGTH, precision="fp64")
    dist.batch_isend_irecv, dist.all_reduce = batch_isend_irecv, all_reduce  # type: ignore[assignment]
    mesh_module.ALL_GATHER = all_gather
    loss = trainer.step(batches(), 0).loss
    return found, trainer.engine.counts, loss


def expected(calls: list[Call], layout: Layout, rank: int, counts: list[np.ndarray], width: int) -> list[Call]:
    """The derived calls with the sizes of the rows really routed, less empty messages."""
    result = []
    for call in calls:
        size = call.size
        if call.payload == "rows":
            ends = (rank, call.peer) if call.operation == "send" else (call.peer, rank)
            source, host = ends if call.action.towards_experts else ends[::-1]
            experts = layout.placement[call.action.layer].experts[host]
            size = width * int(counts[source][call.action.layer, call.action.micro_batch, experts].sum())
        if size != 0:
            result.append(call._replace(size=size))
    return result


@pytest.mark.parametrize("ordered", [False, True], ids=["lanes", "ordered"])
@pytest.mark.parametrize(("name", "state"), STATES)
def test_the_engine_calls_what_was_derived(name: str, state: str, ordered: bool) -> None:
    case = CASES[name]
    layout, width = laid_out(case, state), case.model.hidden_size
    ranks = run_workers(layout.world_size, work, case, layout, ordered)
    schedule = training_schedule(layout)
    reduced: dict[object, set[int]] = {}
    for rank, (found, _, loss) in enumerate(ranks):
        assert loss == ranks[0][2]
        derived = expected(
            calls_of(schedule, layout, rank, "fp64"), layout, rank, [counts for _, counts, _ in ranks], width
        )
        if not ordered:  # lanes call when they can: each in its own order
            found = sorted(found, key=lambda call: COMMUNICATORS.index(call[0]))
            derived = sorted(derived, key=lambda call: COMMUNICATORS.index(call.communicator))
        assert len(found) == len(derived)
        for (communicator, operation, peer, dtype, size), call in zip(found, derived, strict=True):
            names = "fp64" if call.dtype in ("float64", WIDEST) else call.dtype
            wanted = "all-reduce" if call.operation == "reduce-scatter" else call.operation  # gloo's way
            assert (communicator, operation, peer, DTYPES[dtype]) == (call.communicator, wanted, call.peer, names), call
            if call.peer >= 0:
                assert size == call.size, call
            elif operation == "all-reduce":
                reduced.setdefault((call.batch, call.operation), set()).add(size)
    assert all(len(sizes) == 1 for sizes in reduced.values())

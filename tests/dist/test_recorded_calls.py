"""What the engine really calls is exactly the derived list, in its one order where lanes take turns."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_engine_equality import CASES, LENGTH, TRAIN, Case, batches
from test_groups_equality import CASES as GROUPS
from test_groups_equality import SHARDED
from test_sharded_states import GROUPS as FULL
from test_sharded_states import in_state
from workers import run_workers

from hetermoe_cli.runtime.transfers.calls import COMMUNICATORS, PARITY, WIDEST, Call, calls_of, lane_name, share_name
from hetermoe_cli.runtime.transfers.slots import tail_size
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.schedule.lower import training_schedules
from hetermoe_cli.spec.layout import Layout, in_both
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.world import World
from hetermoe_cli.turns import in_turns

Recorded = tuple[str, str, int, str, int]  # communicator, operation, peer, dtype, elements
NAMES = [
    "1+1 R=2",
    "2+1 uneven sequences",
    "2+2 mixed, replicated, recompute",
    "mixed, windows, between, recompute",
    "EP 2 between, interleaved",
    "1+1 once per device",
    "1+1 full recompute",
    "replicated on ranks that host nothing",
    "left out",
    "pipeline, EP and zebra, uneven, windows",
    "pipeline of 3 stages",
    "pipeline, full recompute, documents",
    "pipeline, woven, every stage its own recomputation",
    "head in parts of sequences, windows, between, recompute",
    "pipeline, head on the last stage's host",
    "mixed, windows, woven",
    "shifts, hosts attend at times, windows, between, full recompute",
]
STATES = [(name, "replicated") for name in NAMES]
STATES += [(name, "optimizer") for name in ("pipeline, last ranks first, recompute", "shifts, one helps once")]
STATES += [(name, state) for name in NAMES[2:4] for state in ("optimizer", "full")]
STATES += [(name, "full") for name in ("2+1 uneven sequences", "EP 2 between, interleaved", "left out")]
ORDERED = [pytest.param(False, marks=pytest.mark.long), True]  # both ways over groups in any case
DTYPES = {"torch.float64": "fp64", "torch.int64": "int64"}


def work(rank: int, case: Case, layout: Layout | World, ordered: bool) -> tuple[list[Recorded], np.ndarray, float]:
    import torch.distributed as dist

    from hetermoe_cli.runtime.machine import mesh as mesh_module
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.step.trainer import Trainer

    mesh, world = replace(join(layout, "cpu", shares=False), ordered=ordered), World.of(layout)
    lanes = [lane_name(world, world.seat(rank)[0], lane) for lane in (1, 2)]
    names = {id(mesh.to_experts): lanes[0], id(mesh.from_experts): lanes[1], id(None): COMMUNICATORS[0]}
    for number, group in enumerate(mesh.stages):
        names[id(group)] = f"{lane_name(world, world.seat(rank)[0], 4 + number % 2)}, {PARITY[number // 2]}"
    names |= {id(group): share_name(world, holders) for holders, group in mesh.shared.items()}
    found: list[Recorded] = []
    batch, reduce, gather = dist.batch_isend_irecv, dist.all_reduce, mesh_module.ALL_GATHER
    exchange = dist.all_to_all_single

    def batch_isend_irecv(operations: list[Any]) -> Any:
        for one in operations:
            kind = "send" if one.op is dist.isend else "receive"
            found.append((names[id(one.group)], kind, one.peer, str(one.tensor.dtype), one.tensor.numel()))
        return batch(operations)

    def all_reduce(tensor: Any, group: Any = None) -> Any:
        found.append((names[id(group)], "all-reduce", -1, str(tensor.dtype), tensor.numel()))
        return reduce(tensor, group=group)

    def scatter(received: Any, tensor: Any, *sizes: Any, group: Any) -> Any:
        found.append((names[id(group)], "reduce-scatter", -1, str(tensor.dtype), tensor.numel()))
        return exchange(received, tensor, *sizes, group=group)

    def all_gather(everyone: Any, own: Any, group: Any) -> Any:
        found.append((names[id(group)], "all-gather", -1, str(own.dtype), own.numel()))
        return gather(everyone, own, group=group)

    trainer = Trainer.build(case.model, layout, TRAIN, mesh, sequence_length=LENGTH, precision="fp64")
    dist.batch_isend_irecv, dist.all_reduce = batch_isend_irecv, all_reduce  # type: ignore[assignment]
    dist.all_to_all_single = scatter  # gloo's way
    mesh_module.ALL_GATHER = all_gather
    loss = trainer.step(batches(), 0).loss
    return found, trainer.engine.counts, loss


def width(action: Action, layout: Layout, model: ModelConfig) -> int:
    """Elements of a row: its tail is there in dispatches, and where rows are sent again with gradients."""
    tail = tail_size(torch.float64, 2 * model.top_k if layout.schedule.dispatch == "per_device" else 1)
    if action.kind is Kind.DISPATCH:
        return model.hidden_size + tail
    again = action.direction is Pass.BACKWARD and layout.span_at(action.layer).schedule.sends_again
    return model.hidden_size + again * (model.hidden_size + tail)


def expected(calls: list[Call], world: World, rank: int, counts: list[np.ndarray], model: ModelConfig) -> list[Call]:
    """The derived calls with the sizes of the rows really routed, less empty messages. Where they go once per device,
    one hosts all experts."""
    result, replica = [], world.replica_of(rank)
    for call in calls:
        size = call.size
        if call.action.kind is Kind.CROSS:
            sends = (call.operation == "send") == (call.action.direction is Pass.FORWARD)
            ends = (rank, call.peer) if sends else (call.peer, rank)
            one, other = (replica.processes.index(process) for process in ends)
            tokens = LENGTH * replica.layout.sequences_per_micro_batch
            before, after = replica.layout.crossing(call.action.layer, tokens)
            size = in_both(before[one], after[other]) * model.hidden_size
        elif call.payload == "rows":
            ends = (rank, call.peer) if call.operation == "send" else (call.peer, rank)
            source, host = ends if call.action.towards_experts else ends[::-1]
            experts = replica.layout.placement[call.action.layer].experts[replica.processes.index(host)]
            rows = int(counts[source][call.action.layer, call.action.micro_batch, experts].sum())
            if replica.layout.schedule.dispatch == "per_device":
                rows //= model.top_k
            size = width(call.action, replica.layout, model) * rows
        if size != 0:
            result.append(call._replace(size=size))
    return result


@pytest.mark.parametrize(("name", "state"), STATES)
@pytest.mark.parametrize("ordered", ORDERED, ids=["lanes", "ordered"])
def test_the_engine_calls_what_was_derived(name: str, state: str, ordered: bool) -> None:
    check_calls(CASES[name], in_state(CASES[name].layout, state), ordered)


@pytest.mark.parametrize("ordered", [False, True], ids=["lanes", "ordered"])
@pytest.mark.parametrize("name", ["experts elsewhere in each group", "four and one", "other orders in each group", ""])
@pytest.mark.parametrize("state", ["replicated", "optimizer"])
def test_groups_call_what_was_derived(name: str, state: str, ordered: bool) -> None:
    """NCCL's one order over all communicators, those that groups share among them."""
    case = replace(GROUPS[name] if name else SHARDED, dense_state=state)
    check_calls(case, case.layout, ordered)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("ordered", ORDERED, ids=["lanes", "ordered"])
def test_groups_gather_among_their_own(name: str, ordered: bool) -> None:
    check_calls(FULL[name], in_state(FULL[name].layout, "full"), ordered)


def check_calls(case: Case, layout: Layout | World, ordered: bool) -> None:
    """One step of all workers, each against its derived list."""
    world = World.of(layout)
    ranks = run_workers(world.size, work, case, layout, ordered)
    schedules = [in_turns(s, world.layers) if ordered else s for s in training_schedules(world)]
    reduced: dict[object, set[int]] = {}  # of every collective, which a batch may have two of
    for rank, (found, _, loss) in enumerate(ranks):
        assert loss == ranks[0][2]
        derived = expected(
            calls_of(schedules[world.seat(rank)[0]], world, rank, "fp64"),
            world,
            rank,
            [counts for _, counts, _ in ranks],
            case.model,
        )
        if not ordered:  # lanes call when they can: each in its own order
            found = sorted(found, key=lambda call: call[0])
            derived = sorted(derived, key=lambda call: call.communicator)
        assert len(found) == len(derived)
        met: Counter[object] = Counter()
        for (communicator, operation, peer, dtype, size), call in zip(found, derived, strict=True):
            names = "fp64" if call.dtype in ("float64", WIDEST) else call.dtype
            wanted = call.communicator, call.operation, call.peer, names
            assert (communicator, operation, peer, DTYPES[dtype]) == wanted, call
            if call.peer >= 0:
                assert size == call.size, call
            elif operation in ("all-reduce", "reduce-scatter"):
                met[call.batch] += 1
                reduced.setdefault((call.batch, met[call.batch]), set()).add(size)
    assert all(len(sizes) == 1 for sizes in reduced.values())

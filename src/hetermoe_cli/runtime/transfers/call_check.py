"""Whether the calls of all ranks fit together, before anything runs: NCCL hangs where they do not. No torch."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NoReturn

from hetermoe_cli.errors import UserError
from hetermoe_cli.runtime.transfers.calls import Batch, Calls, calls_of
from hetermoe_cli.schedule.lower import training_schedules, validation_schedules
from hetermoe_cli.simulator import check_deadlock
from hetermoe_cli.spec.world import World
from hetermoe_cli.turns import in_turns


def check(world: World, exchange: str) -> None:
    """UserError unless training and validation of all copies can run, and their calls fit together, by turns too."""
    for found in (training_schedules(world), validation_schedules(world)):
        for schedule in found:
            check_deadlock(schedule, world.layers)
        schedules = [in_turns(schedule, world.layers) for schedule in found]
        by_process = [schedules[world.seat(process)[0]] for process in range(world.size)]
        verify([calls_of(schedule, world, process, exchange) for process, schedule in enumerate(by_process)])


def verify(calls: Sequence[Calls]) -> None:
    """UserError, one line, unless all ranks' calls (`calls[rank]`) fit together.

    The k-th message from r to p on a communicator is the k-th that p receives from r on it; members of a communicator
    enter the same collectives in one order; and one order over all communicators exists that every rank keeps, so
    that no lane waits for another in a circle.
    """
    _check_messages(calls)
    _check_collectives(calls)
    _check_order([[batch for batch, _ in groupby(mine, key=lambda call: call.batch)] for mine in calls])


def _check_messages(calls: Sequence[Calls]) -> None:
    sent: dict[tuple[str, int, int], Calls] = defaultdict(list)
    received: dict[tuple[str, int, int], Calls] = defaultdict(list)
    for rank, mine in enumerate(calls):
        for call in mine:
            if call.operation == "send":
                sent[call.communicator, rank, call.peer].append(call)
            elif call.operation == "receive":
                received[call.communicator, call.peer, rank].append(call)
    for key in sorted({*sent, *received}):
        communicator, source, target = key
        out, back = sent[key], received[key]
        for place in range(max(len(out), len(back))):
            left, right = (_at(found, place) for found in (out, back))
            if left != right:
                _refuse(
                    f"message {place + 1} ({communicator}) from rank {source} to rank {target} is "
                    f"{_told(out, place)} there and {_told(back, place)} here"
                )


def _at(found: Calls, place: int) -> object:
    return found[place].content if place < len(found) else None


def _told(found: Calls, place: int) -> str:
    if place >= len(found):
        return "none"
    action, payload, dtype, size = found[place].content
    return f"{action} {payload} ({'' if size is None else f'{size} x '}{dtype})"


def _check_collectives(calls: Sequence[Calls]) -> None:
    entered: dict[str, dict[int, Calls]] = defaultdict(dict)
    members: dict[str, set[int]] = defaultdict(set)
    for rank, mine in enumerate(calls):
        for call in mine:
            if call.peer < 0:
                entered[call.communicator].setdefault(rank, []).append(call)
                members[call.communicator] |= {rank, *call.members}
    for communicator, found in sorted(entered.items()):
        by_rank = {rank: found.get(rank, []) for rank in sorted(members[communicator])}
        first = min(by_rank)
        for rank, mine in by_rank.items():
            for place in range(max(len(mine), len(by_rank[first]))):
                if _at(mine, place) != _at(by_rank[first], place):
                    _refuse(
                        f"collective {place + 1} ({communicator}) is {_told(by_rank[first], place)} on rank {first} "
                        f"and {_told(mine, place)} on rank {rank}"
                    )


def _check_order(batches: Sequence[Sequence[Batch]]) -> None:
    """Merge the ranks' orders into one; where that is impossible, name two ranks' places in the circle."""
    following: dict[Batch, list[Batch]] = defaultdict(list)
    waiting: dict[Batch, int] = {}
    for rank, mine in enumerate(batches):
        if len(set(mine)) < len(mine):
            twice = next(batch for place, batch in enumerate(mine) if batch in mine[:place])
            _refuse(f"rank {rank} calls {twice} twice")
        for before, after in pairwise(mine):
            following[before].append(after)
            waiting[after] = waiting.get(after, 0) + 1
    ready = [batch for batch in {batch: None for mine in batches for batch in mine} if batch not in waiting]
    for batch in ready:  # grows while it is read
        for after in following[batch]:
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)
    stuck = {batch for batch, count in waiting.items() if count}
    if stuck:
        firsts = {rank: next((b for b in mine if b in stuck), None) for rank, mine in enumerate(batches)}
        told = [f"rank {rank} calls {batch}" for rank, batch in firsts.items() if batch]
        _refuse(f"ranks wait for each other in a circle: next, {', '.join(told)}")


def _refuse(problem: str) -> NoReturn:
    raise UserError(f"schedule: {problem}: ranks would hang: plan again, and start all workers from one run.yaml")

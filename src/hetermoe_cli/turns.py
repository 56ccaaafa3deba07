"""Turns: the one order over all lanes in which ranks call transfers where calls must not pass each other (NCCL).

A call waits for what it sends, so calls behind it wait as well. In the schedule's own order, which is made for ports
that transfers share, an answer comes behind a layer's last message; by turns it goes when it would if nothing but its
lanes were shared. Collectives, which are large, stay behind what they follow in the schedule. All ranks must find the
same order: times are small whole numbers, which every machine adds alike. Between pipeline stages, whose layers take
unlike times, the schedule's own order is better.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from hetermoe_cli.dataflow import dataflow
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.schedule.schedule import Schedule
from hetermoe_cli.simulator import replay

_TASK, _TRANSFER = {Pass.FORWARD: 4.0, Pass.BACKWARD: 8.0}, 1.0
_PORTS = 8


@lru_cache(maxsize=8)
def in_turns(schedule: Schedule, layers: int) -> Schedule:
    """The schedule with its transfers by when they would begin if tasks took four times as long as transfers, and in
    backward eight; those of a lane stay in order. No rank that keeps to it waits for what comes later. With pipeline
    stages it is the schedule itself."""
    if any(transfer.kind is Kind.CROSS for transfer in schedule.transfers):
        return schedule
    flow = dataflow(schedule, layers, _ports(schedule.transfers))
    seconds = [np.full(len(task.ranks), _seconds(task.action)) for task in flow.compute]
    times = replay(flow, seconds, [_TRANSFER] * len(flow.transfers))
    numbers = sorted(range(len(flow.transfers)), key=lambda number: times.transfer_starts[number])
    return replace(schedule, transfers=tuple([schedule.transfers[number] for number in numbers]))


def _ports(transfers: Sequence[Action]) -> list[tuple[int, ...]]:
    """One for every collective, which it shares with the last other transfer before it. A few serve all: kinds of
    transfers that differ in ports are compared with each other."""
    ports: list[tuple[int, ...]] = [() for _ in transfers]
    previous: int | None = None
    for number, transfer in enumerate(transfers):
        if not transfer.is_collective:
            previous = number
        elif previous is not None:
            port = transfer.layer % _PORTS
            ports[number] = (port,)
            ports[previous] = tuple(sorted({*ports[previous], port}))
    return ports


def _seconds(action: Action) -> float:
    return 0.0 if action.kind in (Kind.SYNCHRONISE, Kind.OPTIMIZER) else _TASK[action.direction]

"""Remedies: the smallest changes after which a model fits.

A change is looked for with a relaxation (memory leaves a choice open; placements are not tried), so that less than
that never fits, and then confirmed by a layout that fits, of it or of a slightly larger one.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from math import ceil, inf
from typing import NamedTuple

from hetermoe_cli.cost.device import STATE_BYTES, find_table
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.replay import size_text
from hetermoe_cli.planner.search.candidates import Listing
from hetermoe_cli.planner.search.outer import search
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.change import Change, changed_cluster
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.train import TrainSpec

MOST_ADDED = 64  # devices
OPTIONS = ("recompute", "dense_state")  # of the training spec; auto allows all
SECONDS = 16.0  # for all confirmations; changes after that are told unconfirmed
_LENGTHS = 32  # a sequence is shortened in steps of its 32nd part
_TRIES = 4  # sizes of one change that are looked at in vain
_ANY_LAYOUT = SolverOptions(time_limit=4.0, relative_gap=0.99)  # the first one ends the search


class Remedy(NamedTuple):
    """A change in words, and what is planned after it."""

    text: str
    inputs: Inputs
    limit: int


def smallest_change(inputs: Inputs, limit: int) -> str:
    """In words: options of the training spec if they are enough, else (with recomputation) devices to add, shorter
    sequences, a smaller batch or a larger R. `limit`: the largest R that may be tried.
    """
    for options in _options(inputs.train):
        if fits(inputs.with_train(**options), limit):
            return f"with {_named(options)} it would fit"
    leaner = inputs.with_train(recompute="auto")
    words = "" if inputs.train.recompute == "auto" else "with recompute: auto "
    end = time.monotonic() + SECONDS
    ways = [list(islice(way(leaner, limit), _TRIES)) for way in (_devices, _lengths, _batches, _micro_batches)]
    sure = [text for way in ways if (text := _confirmed(way, end))]
    if sure:
        return f"{words}it would fit with {', or '.join(sure)}"
    if any(ways):
        least = ", or ".join(way[0].text for way in ways if way)
        return f"{words}it would take at least one of these, perhaps more of it: {least}"
    return (
        f"no one change is enough, not {MOST_ADDED} more devices of one type, shorter sequences or a smaller batch: "
        "take devices with more memory, or a smaller model"
    )


def _options(train: TrainSpec) -> Iterator[dict[str, str]]:
    """What the training spec could leave to the planner, one at a time, then together."""
    free = [{name: "auto"} for name in OPTIONS if getattr(train, name) != "auto"]
    yield from free
    if len(free) > 1:
        yield {name: value for option in free for name, value in option.items()}


def _named(options: dict[str, str]) -> str:
    return " and ".join(f"{name}: {value}" for name, value in options.items())


def lacking_states(cost: CostModel) -> str | None:
    """Why all devices together cannot hold one copy of weights, gradients and optimizer states, and how many more of
    one type could; None if they can.
    """
    needed = cost.model.parameters * sum(STATE_BYTES[cost.train.precision])
    usable = {name: d.memory_bytes * cost.train.memory_headroom - d.framework_bytes for name, d in cost.types.items()}
    lacking = needed - sum(usable[device.type] for device in cost.devices)
    if lacking <= 0:
        return None
    largest = max(usable, key=lambda name: usable[name])
    more = f"at least {ceil(lacking / usable[largest])} more {largest}" if usable[largest] > 0 else "larger devices"
    return (
        f"weights, gradients and optimizer states take {size_text(needed)}, all devices together have "
        f"{size_text(needed - lacking)} usable: it would take {more}"
    )


def possible(inputs: Inputs, limit: int) -> bool:
    """Whether memory leaves any choice open."""
    return bool(Listing(CostModel(inputs), limit, inf).space(inf).candidates)


def fits(inputs: Inputs, limit: int) -> bool:
    """Whether a layout that fits is found in a short search."""
    return search(CostModel(inputs), _ANY_LAYOUT, limit, ()).layout is not None


def _confirmed(remedies: Iterable[Remedy], end: float) -> str | None:
    for remedy in remedies:
        if time.monotonic() < end and fits(remedy.inputs, remedy.limit):
            return remedy.text
    return None


def _devices(inputs: Inputs, limit: int) -> Iterator[Remedy]:
    """The fewest devices of one type, and then more of it."""

    def with_more(count: int, name: str) -> Inputs:
        cluster = changed_cluster(inputs.cluster, Change(((count, name),)))
        return inputs.model_copy(update={"cluster": cluster})

    best: tuple[int, str] | None = None
    for name in inputs.cluster.device_types:

        def enough(count: int, name: str = name) -> bool:
            return possible(with_more(count, name), limit)

        most = best[0] - 1 if best else MOST_ADDED
        if most >= 1 and enough(most):
            best = (_least(enough, most), name)
    if best:
        for count in range(best[0], MOST_ADDED + 1):
            yield Remedy(f"{count} more {best[1]}", with_more(count, best[1]), limit)


def _lengths(inputs: Inputs, limit: int) -> Iterator[Remedy]:
    """The longest sequences within the profiled lengths, and then shorter ones."""
    longest, tables = inputs.train.sequence_length, []
    for name in inputs.cluster.device_types:
        tables.append(find_table(inputs.profiles[name], inputs.model, inputs.train.precision_of(name)))
    shortest = max(min(point.sequence_length for point in table.attention) for table in tables)
    step = max(1, longest // _LENGTHS)

    def shortened(steps: int) -> Inputs:
        return inputs.with_train(sequence_length=longest - steps * step)

    most = (longest - shortest) // step
    if most >= 1 and possible(shortened(most), limit):
        for steps in range(_least(lambda steps: possible(shortened(steps), limit), most), most + 1):
            yield Remedy(f"sequences of {longest - steps * step} tokens", shortened(steps), limit)


def _batches(inputs: Inputs, limit: int) -> Iterator[Remedy]:
    """The batch halved until it fits."""
    batch = inputs.train.global_batch_sequences // 2
    while batch:
        if possible(smaller := inputs.with_train(global_batch_sequences=batch), limit):
            yield Remedy(f"a batch of {batch} sequence{'s' * (batch > 1)}", smaller, limit)
        batch //= 2


def _micro_batches(inputs: Inputs, limit: int) -> Iterator[Remedy]:
    """R beyond the limit."""
    batch = inputs.train.global_batch_sequences
    for count in range(limit + 1, batch + 1):
        if batch % count == 0 and possible(inputs, count):
            yield Remedy(f"--max-micro-batches {count}", inputs, count)


def _least(enough: Callable[[int], bool], most: int) -> int:
    """The smallest number that is enough; `most` is, 0 is not."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high

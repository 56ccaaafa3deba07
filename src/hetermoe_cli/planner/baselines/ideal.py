"""EP (Ideal): expert parallelism on each device type alone, throughputs added. No real system reaches it.

A type's throughput is its best one over the batches of equal shares, up to the global batch: every number of sequences
per device and micro-batch, with as many micro-batches as the limit and the global batch allow, in windows where memory
needs them, with every recompute. The iteration is the global batch over the sum of throughputs, as if the batch could
be split by any real number. A type that cannot hold the model alone adds nothing.
"""

from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import pairwise
from math import inf

import numpy as np

from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.baselines.even import even_placement
from hetermoe_cli.planner.baselines.rival import Overlap, Rival, best, schedules, with_schedule
from hetermoe_cli.planner.instance.deal import rotate
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.schedule_choice import ScheduleChoice


def ep_ideal(cost: CostModel, limit: int, *, overlap: Overlap = "micro_batches") -> Rival:
    """As the paper defines it: nothing is exchanged between the types. `overlap`: as that of ep."""
    alone = {name: type_alone(cost, name, limit, overlap) for name in cost.types}
    return _added(cost, alone, 0.0)


def ep_ideal_charged(cost: CostModel, limit: int) -> Rival:
    """With the all-reduce of all gradients between the types, since each holds a full model.

    It follows the backward, as that between several groups of a plan does.
    """
    alone = {name: type_alone(cost, name, limit, "micro_batches") for name in cost.types}
    fitting = [name for name, rival in alone.items() if rival.layout]
    return _added(cost, alone, exchange_seconds(cost, fitting))


def _added(cost: CostModel, alone: dict[str, Rival], charge: float) -> Rival:
    rates = {name: _sequences(rival.layout) / rival.seconds for name, rival in alone.items() if rival.layout}
    missing = [f"{name} alone {alone[name].reason}" for name in alone if name not in rates]
    if not rates:
        return Rival(None, inf, "; ".join(missing))
    parts = [f"{name} {rate / sum(rates.values()):.0%}" for name, rate in rates.items()]
    reason = "; ".join([f"shares of the batch: {', '.join(parts)}", *missing])
    return Rival(None, cost.train.global_batch_sequences / sum(rates.values()) + charge, reason)


@lru_cache(maxsize=8)  # both kinds of EP (Ideal) ask for the same
def type_alone(cost: CostModel, name: str, limit: int, overlap: Overlap = "micro_batches") -> Rival:
    """The EP layout of most sequences per second on the devices of one type."""
    alone = CostModel(_only(cost.inputs, name))
    placement, world = even_placement(alone), len(alone.devices)

    @cache
    def layout(sequences: int) -> Layout:
        shares = rotate([sequences], world)[0]
        return Layout(schedule=ScheduleChoice.zebra(1), sequences_per_rank=shares, placement=placement)

    batches = _batches(alone, limit, overlap == "micro_batches")
    layouts = ([with_schedule(layout(n), s) for s in rungs] for n, rungs in batches)
    return best(alone, layouts, _sequences, parts=overlap == "parts")


def _batches(cost: CostModel, limit: int, across: bool) -> Iterator[tuple[int, list[ScheduleChoice]]]:
    """Sequences of a micro-batch, smallest first, with a ladder of schedules."""
    world, batch = len(cost.devices), cost.train.global_batch_sequences
    for sequences in range(world, batch + 1, world) if world <= batch else [batch]:
        most = min(limit, batch // sequences)
        for sizes in _ladders(most) if across else [[(most, 1)]]:
            yield from ((sequences, rungs) for rungs in schedules(cost, sizes))


def _ladders(most: int) -> list[list[tuple[int, int]]]:
    """(R, window): as many micro-batches as allowed in the widest window that fits; and the widest window of all, as
    often as it goes into them."""
    every = [(most // width * width, width) for width in range(most, 0, -1)]
    dividing = [(count, width) for count, width in every if count == most]
    return [dividing] if len(dividing) == len(every) else [dividing, every]


def _sequences(layout: Layout) -> float:
    """Sequences of an iteration."""
    return float(layout.sequences_per_micro_batch * layout.micro_batches)


def _only(inputs: Inputs, name: str) -> Inputs:
    """The same inputs with the devices of one type."""
    nodes = [node for node in inputs.cluster.nodes if node.device == name]
    cluster = inputs.cluster.model_copy(update={"nodes": nodes})
    return inputs.model_copy(update={"cluster": cluster, "profiles": {name: inputs.profiles[name]}})


def exchange_seconds(cost: CostModel, types: list[str]) -> float:
    """Ring all-reduce of all gradients over `types`: a device holds an equal part of its type's copy.

    Each type sends 2 (t - 1) / t of the gradients to the next one; all pairs of devices share that evenly.
    """
    t, world = len(types), len(cost.devices)
    if t < 2:
        return 0.0
    ranks = [[device.rank for device in cost.devices if device.type == name] for name in types]
    gradients = cost.model.parameters * STATE_BYTES[cost.train.precision][1]
    sent = np.zeros((world, world))
    for sources, targets in pairwise([*ranks, ranks[0]]):
        sent[np.ix_(sources, targets)] = 2 * (t - 1) / t * gradients / (len(sources) * len(targets))
    return cost.network.seconds(sent, np.arange(world))

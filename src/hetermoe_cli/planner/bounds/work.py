"""The free-role work bound: an iteration's compute and optimizer step, perfectly divisible over all devices.

Nothing waits, and nothing travels but the all-reduce of the dense gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hetermoe_cli.cost.device import DeviceCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.allowed import micro_batch_counts

STEPS = 60  # bisection steps
TINY = 1e-300  # seconds


@dataclass(frozen=True)
class Speed:
    """Devices of one type at their best sizes: seconds a sequence (all layers, head) and seconds a row (one layer).

    With their shares of one optimizer step: a sequence's of the dense part's, a row's of the experts'; without where
    states are shared out, as holders then step equal parts whatever they attend to or compute.
    """

    count: int
    sequence: float
    row: float


def type_speeds(cost: CostModel, micro_batch_limit: int) -> dict[str, Speed]:
    """Every device type at its best sizes."""
    return {name: _speed(cost, name, micro_batch_limit) for name in cost.types}


def work_bound(cost: CostModel, micro_batch_limit: int) -> float:
    """Seconds below which no assignment of the batch's attention and expert work to the devices can finish.

    The linear program has a sequence and a row share per type; for a given time the devices that are best at attention
    compared with experts attend (comparative advantage), the rest of all time goes to experts. If m devices attend,
    the fastest at it would take a m-th of all sequences each; of the dense gradients, those of embedding and layer 0
    can go round a ring of m only when all is computed.
    """
    speeds = list(type_speeds(cost, micro_batch_limit).values())
    batch = cost.train.global_batch_sequences
    rows = rows_of(cost)
    low, high = 0.0, max(s.sequence * batch + s.row * rows for s in speeds)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _enough(speeds, middle, batch, rows) else (middle, high)
    least = batch * min(s.sequence for s in speeds)
    ring = _ring_seconds(cost)
    return min(max(low, least / m) + ring * (m - 1) / m for m in range(1, len(cost.devices) + 1))


def _ring_seconds(cost: CostModel) -> float:
    """All-reduce of the gradients of embedding and layer 0 in an endless ring over the fastest links, no latencies."""
    links = [link for device in cost.devices for link in (device.network, device.interconnect)]
    size = cost.segment_parameters(0) * cost.gradient_bytes
    share = 0.5 if cost.train.dense_state in ("full", "auto") else 1.0
    return 2 * share * size / max(link.ring_bandwidth for link in links)


def _enough(speeds: list[Speed], seconds: float, sequences: float, rows: float) -> bool:
    for speed in sorted(speeds, key=lambda s: s.sequence / s.row):
        time = speed.count * seconds
        attended = min(sequences, time / speed.sequence)
        sequences -= attended
        rows -= (time - attended * speed.sequence) / speed.row
    return sequences <= 0 and rows <= 0


def _speed(cost: CostModel, name: str, micro_batch_limit: int) -> Speed:
    device, batch = cost.types[name], cost.train.global_batch_sequences
    count = sum(d.type == name for d in cost.devices)
    counts = micro_batch_counts(batch, micro_batch_limit)
    sequence = min(cost.attending_seconds(device, n) / n for n in range(1, batch + 1))
    totals = {batch // r for r in counts} | set(range(1, batch + 1))
    row = min(sum(device.expert(rows)[:2]) / rows for total in totals if (rows := cost.rows_per_expert(total)) > 0)
    if cost.shares is not None:  # rows and parameters are not in proportion: the experts' step is left out
        return Speed(count, sequence, _loaded_row_seconds(cost, device, max(totals)))
    if cost.train.dense_state != "replicated":
        return Speed(count, sequence, row)
    model = cost.model
    dense = cost.optimizer_seconds(device, model.dense_parameters) / batch
    experts = cost.optimizer_seconds(device, model.parameters - model.dense_parameters) / rows_of(cost)
    return Speed(count, sequence + dense, row + experts)


def rows_of(cost: CostModel) -> float:
    """Rows of all layers in an iteration."""
    train, model = cost.train, cost.model
    return model.layers * train.tokens * model.top_k


def _loaded_row_seconds(cost: CostModel, device: DeviceCost, sequences: int) -> float:
    """Least seconds a row over all sizes between the coldest expert's rows of one sequence and the hottest's of all.

    Seconds a row are monotone between two points of a curve; forward and backward may have theirs at different sizes.
    Of a load with samples these are what runs.
    """
    shares = np.array([step.shares for step in cost.steps])
    rows = cost.rows_per_expert(1) * cost.model.experts
    low, high = float(shares[shares > 0].min()) * rows, float(shares.max()) * rows * sequences
    sizes = [low, high, *(size for size in device.expert.sizes if low < size < high)]
    forward = min(device.expert(size).forward / size for size in sizes)
    backward = min(device.expert(size).backward / size for size in sizes)
    return max(forward + backward, TINY)  # zero where a curve, extended downwards, ends before the coldest expert


def work_by_kind(cost: CostModel, limit: int) -> dict[str, dict[str, float]]:
    """By device type and kind of work: seconds of all of it on one device, at its best sizes."""
    return {name: _by_kind(cost, name, speed.row) for name, speed in type_speeds(cost, limit).items()}


def _by_kind(cost: CostModel, name: str, row: float) -> dict[str, float]:
    """`row`: seconds of one row in one layer."""
    device, model, batch = cost.types[name], cost.model, cost.train.global_batch_sequences
    sizes = range(1, batch + 1)
    return {
        "attention": model.layers * batch * min(sum(device.attention(n)[:2]) / n for n in sizes),
        "dense": batch * min(sum(cost.dense_cost(device, n)[:2]) / n for n in sizes),
        "head": batch * min(sum(cost.head_cost(device, n)[:2]) / n for n in sizes),
        "step": cost.optimizer_seconds(device, model.dense_parameters),
        "experts": row * rows_of(cost),
    }


def work_dollars(
    cost: CostModel, micro_batch_limit: int, dollars_per_second: Mapping[str, float], *, stages: bool = False
) -> float:
    """Dollars below which no devices can do an iteration's work: each kind of it on the type that is cheapest at it.
    `stages`: with pipeline stages, so that the head need not be where attention is."""
    if stages:
        work = work_by_kind(cost, micro_batch_limit)
        kinds = next(iter(work.values()))
        return sum(min(dollars_per_second[name] * own[kind] for name, own in work.items()) for kind in kinds)
    speeds = type_speeds(cost, micro_batch_limit)
    batch = cost.train.global_batch_sequences
    rows = rows_of(cost)
    return batch * min(dollars_per_second[name] * speed.sequence for name, speed in speeds.items()) + rows * min(
        dollars_per_second[name] * speed.row for name, speed in speeds.items()
    )

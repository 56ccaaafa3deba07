"""The free-role work bound: an iteration's compute, perfectly divisible over all devices, nothing waits or travels."""

from dataclasses import dataclass

from hetermoe_cli.cost.model import CostModel, DeviceCost
from hetermoe_cli.planner.baselines import micro_batch_counts

STEPS = 60  # bisection steps


@dataclass(frozen=True)
class _Speed:
    """Devices of one type at their best sizes: seconds a sequence (all layers, head) and seconds a row (one layer)."""

    count: int
    sequence: float
    row: float


def work_bound(cost: CostModel, micro_batch_limit: int) -> float:
    """Seconds below which no assignment of the batch's attention and expert work to the devices can finish.

    The linear program has a sequence and a row share per type; for a given time the devices that are best at attention
    compared with experts attend (comparative advantage), the rest of all time goes to experts.
    """
    speeds = [_speed(cost, name, micro_batch_limit) for name in cost.types]
    batch = cost.train.global_batch_sequences
    rows = cost.model.layers * batch * cost.train.sequence_length * cost.model.top_k
    low, high = 0.0, max(s.sequence * batch + s.row * rows for s in speeds)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _enough(speeds, middle, batch, rows) else (middle, high)
    return low


def _enough(speeds: list[_Speed], seconds: float, sequences: float, rows: float) -> bool:
    for speed in sorted(speeds, key=lambda s: s.sequence / s.row):
        time = speed.count * seconds
        attended = min(sequences, time / speed.sequence)
        sequences -= attended
        rows -= (time - attended * speed.sequence) / speed.row
    return sequences <= 0 and rows <= 0


def _speed(cost: CostModel, name: str, micro_batch_limit: int) -> _Speed:
    device, batch = cost.types[name], cost.train.global_batch_sequences
    count = sum(d.type == name for d in cost.devices)
    counts = micro_batch_counts(batch, micro_batch_limit)
    sequence = min(_sequence_seconds(cost, device, n) for n in range(1, batch + 1))
    row = min(
        sum(device.expert(rows)[:2]) / rows
        for total in {batch // r for r in counts} | set(range(1, batch + 1))
        if (rows := cost.rows_per_expert(total)) > 0
    )
    return _Speed(count, sequence, row)


def _sequence_seconds(cost: CostModel, device: DeviceCost, sequences: int) -> float:
    """Attention of all layers and head, forward and backward, per sequence."""
    attention, head = device.attention(sequences), cost.head_cost(device, sequences)
    return (cost.model.layers * sum(attention[:2]) + sum(head[:2])) / sequences

"""Rates of one device: seconds and bytes of its tasks in one choice, from the costs that simulator and engine use."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.instance.choice import Choice
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.spec.schedule_choice import ScheduleChoice


@dataclass(frozen=True)
class ClassRates:
    """Seconds and bytes of one device of a class. Pairs are (forward, backward with its recomputation)."""

    attention: tuple[float, float]
    dense: tuple[float, float]  # what dense layers add to the first attention stage, less what it need not run again
    second: float  # what of dense layers the second layer's backward runs again
    head: float
    hosted: tuple[float, float]  # one hosted expert on the rows of a whole micro-batch
    replicated: tuple[float, float]  # one replicated expert on the device's own rows
    optimizer_base: float
    optimizer_per_expert: float
    optimizer_per_copy: float  # replicated expert
    memory_base: float  # everything that does not depend on the placement
    memory_per_hosted: float
    memory_per_replicated: float
    memory_if_any: float  # what one expert at a time needs, where any is held
    memory_per_share: float  # receive buffers and working set, per expert of the layer with most hosted ones
    memory_per_copy: float  # working set, per expert of the layer with most replicated ones
    memory_limit: float

    def stage(self, layer: int, way: int) -> float:
        """Attention stage of `layer`, forward (0) or backward (1)."""
        more = self.dense[way] if layer == 0 else self.second if (layer, way) == (1, 1) else 0.0
        return self.attention[way] + more

    def attending(self, layers: int) -> float:
        """All attention stages of a micro-batch, both ways, and its head."""
        return layers * sum(self.attention) + sum(self.dense) + (layers > 1) * self.second + self.head

    @property
    def fits(self) -> bool:
        """Whether memory holds everything but experts."""
        return self.memory_base <= self.memory_limit

    def room(self, layers: int, wider: int = 0) -> float:
        """Hosted experts of all layers that memory has room for, where one layer has `wider` more than the mean;
        negative where there is none for any."""
        left = self.memory_limit - self.memory_base - self.memory_if_any - wider * self.memory_per_share
        return left / (self.memory_per_hosted + self.memory_per_share / layers)

    def scaled(self, unit: float) -> "ClassRates":
        """The same with all times in units of `unit` seconds."""
        return replace(
            self,
            attention=(self.attention[0] / unit, self.attention[1] / unit),
            dense=(self.dense[0] / unit, self.dense[1] / unit),
            second=self.second / unit,
            head=self.head / unit,
            hosted=(self.hosted[0] / unit, self.hosted[1] / unit),
            replicated=(self.replicated[0] / unit, self.replicated[1] / unit),
            optimizer_base=self.optimizer_base / unit,
            optimizer_per_expert=self.optimizer_per_expert / unit,
            optimizer_per_copy=self.optimizer_per_copy / unit,
        )


class Times(NamedTuple):
    """Seconds of a device's tasks, named as in ClassRates."""

    attention: tuple[float, float]
    dense: tuple[float, float]
    second: float
    head: float
    hosted: tuple[float, float]
    replicated: tuple[float, float]


def device_times(cost: CostModel, rank: int, sequences: int, schedule: ScheduleChoice, total: int) -> Times:
    """Times of `rank` attending to `sequences` of a micro-batch of `total` sequences; of the schedule only what is
    recomputed matters."""
    counts = [0] * len(cost.devices)
    counts[rank] = sequences
    counts[rank - 1] += total - sequences  # somebody attends to the others
    probe = LayoutCost(cost, Choice(schedule, tuple(counts)).full_layout(1))

    def pair(kind: Kind, rows: float | None = None, layer: int = 0) -> tuple[float, float]:
        forward, backward = Action(kind, Pass.FORWARD, layer), Action(kind, Pass.BACKWARD, layer)
        if rows is None:
            return probe.seconds(rank, forward), probe.seconds(rank, backward)
        return probe.expert_seconds(rank, forward, [rows]), probe.expert_seconds(rank, backward, [rows])

    attention, dense, second = (0.0, 0.0), (0.0, 0.0), 0.0
    if sequences:
        first = attention = pair(Kind.ATTENTION)
        if cost.model.dense_layers or schedule.sends_again:
            # the probe has no such layers, but attention asks their number only
            attention, second = pair(Kind.ATTENTION, layer=2), pair(Kind.ATTENTION, layer=1)[1]
            second -= attention[1]
        dense = first[0] - attention[0], first[1] - attention[1]
    return Times(
        attention=attention,
        dense=dense,
        second=second,
        head=pair(Kind.HEAD)[1] if sequences else 0.0,
        hosted=pair(Kind.EXPERT, cost.rows_per_expert(total)),
        replicated=pair(Kind.EXPERT, cost.rows_per_expert(sequences)) if sequences else (0.0, 0.0),
    )


def device_rates(
    cost: CostModel,
    rank: int,
    sequences: int,
    schedule: ScheduleChoice,
    total: int,
    attending: int | None = None,
    times: Times | None = None,
) -> ClassRates:
    """Rates of `rank` attending to `sequences` of a micro-batch of `total` sequences; `times`: its device_times.

    What is sharded is shared by `attending` ranks; without it by as many as there can be, which bounds them all.
    """
    attending = attending or min(len(cost.devices), total)
    times = times or device_times(cost, rank, sequences, schedule, total)
    model, device, own = cost.model, cost.of(rank), cost.rows_per_expert(sequences)
    rows, alive = cost.rows_per_expert(total), schedule.window
    weights, gradients, optimizer = (size * model.expert_parameters for size in STATE_BYTES[cost.train.precision])
    own_share, share = cost.state_share(schedule, 1), cost.state_share(schedule, attending)
    step = cost.optimizer_seconds(device, model.expert_parameters)
    stepped = cost.dense_share(schedule, attending) * model.dense_parameters if sequences else 0.0
    buffers = cost.buffer_bytes(total, sequences, 0.0, schedule)
    kept = cost.attention_kept_bytes(device, sequences, schedule.recompute_attention) if sequences else 0.0
    per_share = (cost.buffer_bytes(total, sequences, 1.0, schedule) - buffers) / model.experts
    return ClassRates(
        **times._asdict(),
        optimizer_base=cost.optimizer_seconds(device, stepped),
        optimizer_per_expert=own_share * step,
        optimizer_per_copy=share * step if sequences else 0.0,
        memory_base=(sum(cost.dense_state_bytes(schedule, attending)) if sequences else 0)
        + alive * kept
        + cost.transient_bytes(device, sequences, schedule)
        + buffers
        + device.framework_bytes,
        memory_per_hosted=weights
        + gradients
        + own_share * optimizer
        + alive * cost.expert_activation_bytes(device, rows, schedule),
        memory_per_replicated=weights
        + gradients
        + share * optimizer
        + alive * cost.expert_activation_bytes(device, own, schedule),
        memory_if_any=cost.expert_task_bytes(device, rows),
        memory_per_share=per_share + cost.expert_transient_bytes(device, rows, schedule),
        memory_per_copy=cost.expert_transient_bytes(device, own, schedule) if sequences else 0.0,
        memory_limit=device.memory_bytes * cost.train.memory_headroom,
    )

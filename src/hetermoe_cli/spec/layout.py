"""Layout: all that the schedule, the simulator and the engine need to know of a plan."""

from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

from pydantic import ConfigDict, Field, model_validator

from hetermoe_cli.spec.base import ExtendedSpec, NonNegativeInt, PositiveInt, Spec
from hetermoe_cli.spec.layout_checks import check
from hetermoe_cli.spec.schedule_choice import ScheduleChoice, windows_alive
from hetermoe_cli.spec.train import Recompute


class LayerPlacement(Spec):
    """Where one layer's experts live: `experts[rank]` are hosted there, `replicated` on every attending rank."""

    experts: list[list[NonNegativeInt]]
    replicated: list[NonNegativeInt] = Field(default_factory=list)


class PipelineStage(ExtendedSpec):
    """Some consecutive layers, and the ranks that attend in them and host their experts. `recompute`: its own, where
    it is not the schedule's."""

    later: ClassVar[frozenset[str]] = frozenset({"recompute"})

    layers: PositiveInt
    ranks: list[NonNegativeInt] = Field(min_length=1)
    recompute: Recompute | None = None


class Span(NamedTuple):
    """A pipeline stage in its place: layers from `first` to before `end`; `ahead`: stages after it. `schedule`: the
    layout's, with the stage's own recomputation. `has_head`: its attending ranks compute the head, each of its own
    sequences."""

    number: int
    first: int
    end: int
    ranks: tuple[int, ...]
    attending: tuple[int, ...]
    ahead: int
    schedule: ScheduleChoice
    has_head: bool

    @property
    def layers(self) -> range:
        """Its layers."""
        return range(self.first, self.end)

    @property
    def neighbours(self) -> int:
        """Stages that it exchanges hidden states with."""
        return (self.first > 0) + (self.ahead > 0)


def in_both(one: range, other: range) -> int:
    """How many numbers two ranges have in common."""
    return max(0, min(one.stop, other.stop) - max(one.start, other.start))


class Layout(ExtendedSpec):
    """All that the schedule, the simulator and the engine need to know of a plan.

    `sequences_per_rank[r]` is what rank r attends to per micro-batch; 0 makes it a pure expert rank. `pipeline`: stages
    of consecutive layers, each a zebra group of its own; none: all ranks work on all layers. `shifts[r]`: the
    micro-batches of an iteration in which rank r attends to them; none: attending ranks do so in all of them.
    `head[r]`: rank r's share of every micro-batch's tokens in norm, head and loss, by the sum of all; none: attending
    ranks (of the last pipeline stage) have their own sequences there too.
    """

    later: ClassVar[frozenset[str]] = frozenset({"pipeline", "shifts", "head"})
    model_config = ConfigDict(ignored_types=(cached_property,))

    schedule: ScheduleChoice
    sequences_per_rank: list[NonNegativeInt] = Field(min_length=1)
    placement: list[LayerPlacement] = Field(min_length=1)
    pipeline: list[PipelineStage] = Field(default_factory=list)
    shifts: list[list[NonNegativeInt]] = Field(default_factory=list)
    head: list[NonNegativeInt] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> "Layout":
        check(self)
        return self

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.sequences_per_rank)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.placement)

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return len(self.placement[0].replicated) + sum(map(len, self.placement[0].experts))

    @property
    def micro_batches(self) -> int:
        """R."""
        return self.schedule.micro_batches

    @property
    def spans(self) -> tuple[Span, ...]:
        """The pipeline stages, from the first layers to the last; one where there is no pipeline."""
        return self._spans

    @cached_property  # its underscore keeps it out of dict(layout)
    def _spans(self) -> tuple[Span, ...]:
        stages = self.pipeline or [PipelineStage(layers=self.layers, ranks=list(range(self.world_size)))]
        ends, last = accumulate(stage.layers for stage in stages), len(stages) - 1
        return tuple(
            [
                Span(
                    number,
                    end - stage.layers,
                    end,
                    tuple(sorted(stage.ranks)),
                    self._attending(stage),
                    last - number,
                    self._schedule_of(stage),
                    number == last and not self.head,
                )
                for number, (stage, end) in enumerate(zip(stages, ends, strict=True))
            ]
        )

    def _schedule_of(self, stage: PipelineStage) -> ScheduleChoice:
        own = stage.recompute
        return self.schedule if own is None else self.schedule.model_copy(update={"recompute": own})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> "Layout":
        """Without what was derived from other fields."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("_spans", None)
        copy.__dict__.pop("_crews", None)
        return copy

    @cached_property
    def _crews(self) -> tuple[tuple[int, ...], ...]:
        """With shifts, who attends in each micro-batch."""
        numbers = range(self.micro_batches)
        return tuple([tuple([rank for rank, shift in enumerate(self.shifts) if j in shift]) for j in numbers])

    def crew(self, layer: int, micro_batch: int) -> tuple[int, ...]:
        """Ranks that attend in a layer (attending_at) to this micro-batch."""
        return self._crews[micro_batch] if self.shifts else self.attending_at(layer)

    def allows(self, schedule: ScheduleChoice) -> bool:
        """Whether its ranks' shifts and heads, if there are any, go with a schedule of as many micro-batches."""
        plain = not self.shifts and not self.head
        return plain or (schedule.dense_state != "full" and schedule.passes != "woven")

    @property
    def beyond_bounds(self) -> bool:
        """Whether no lower bound of the planner covers it."""
        return bool(self.shifts) or bool(self.head)

    @property
    def allows_head(self) -> bool:
        """Whether ranks may have other tokens in the head than they attend to."""
        return self.schedule.dense_state != "full" and self.schedule.passes != "woven"

    @property
    def replicates_in_shifts(self) -> bool:
        """What no rank can run: a copy of an expert would have to skip micro-batches with its rank."""
        return bool(self.shifts) and any(placement.replicated for placement in self.placement)

    def on_shift(self, rank: int) -> int:
        """Micro-batches of an iteration in which `rank` attends, if it does."""
        return len(self.shifts[rank]) if self.shifts else self.micro_batches

    def on_shift_at_once(self, rank: int) -> int:
        """Of those of a window, at most."""
        width = self.schedule.window
        if not self.shifts:
            return width
        windows = [j // width for j in self.shifts[rank]]
        return max(map(windows.count, windows), default=0)

    def _attending(self, stage: PipelineStage) -> tuple[int, ...]:
        return tuple([rank for rank in sorted(stage.ranks) if self.sequences_per_rank[rank]])

    def span_of(self, rank: int) -> Span:
        """The pipeline stage of a rank."""
        return next(span for span in self.spans if not self.pipeline or rank in span.ranks)

    def span_at(self, layer: int) -> Span:
        """The pipeline stage of a layer; of the number after the last one (norm and head), the last stage."""
        return next((span for span in self.spans if layer < span.end), self.spans[-1])

    def attending_at(self, layer: int) -> tuple[int, ...]:
        """Ranks that attend in a layer; of the number after the last one, that compute the head."""
        return self.head_ranks if layer >= self.layers else self.span_at(layer).attending

    @property
    def head_ranks(self) -> tuple[int, ...]:
        """Ranks that compute norm, head and loss."""
        if not self.head:
            return self.spans[-1].attending
        return tuple([rank for rank, share in enumerate(self.head) if share])

    def has_dense(self, rank: int) -> bool:
        """Whether a rank holds some of the dense part: it attends or computes the head."""
        return self.sequences_per_rank[rank] > 0 or (bool(self.head) and self.head[rank] > 0)

    def head_sequences(self, rank: int) -> float:
        """Of how many of a micro-batch's sequences `rank` computes the head, perhaps of parts of some."""
        if self.head:
            return self.head[rank] * self.sequences_per_micro_batch / sum(self.head)
        return self.sequences_per_rank[rank] if rank in self.spans[-1].attending else 0

    def head_share(self, rank: int) -> float:
        """The same as a share of the micro-batch."""
        return self.head_sequences(rank) / self.sequences_per_micro_batch

    def attends(self, rank: int, layer: int) -> bool:
        """Whether `rank` attends in a layer."""
        return self.sequences_per_rank[rank] > 0 and (not self.pipeline or rank in self.attending_at(layer))

    @property
    def sequences_per_micro_batch(self) -> int:
        """Sequences of one micro-batch, over all ranks of a pipeline stage."""
        if not self.pipeline:
            return sum([self.sequences_per_rank[rank] for rank in self.crew(0, 0)])
        return sum([self.sequences_per_rank[rank] for rank in self.pipeline[0].ranks])

    def sequences_of(self, span: Span, micro_batch: int = 0) -> dict[int, range]:
        """Which of a micro-batch's sequences every rank that attends to it has in a stage: they go to these in turn."""
        crew = self.crew(span.first, micro_batch)
        counts = [self.sequences_per_rank[rank] for rank in crew]
        ends = accumulate(counts)
        return {rank: range(end - n, end) for rank, n, end in zip(crew, counts, ends, strict=True)}

    def tokens_at(self, layer: int, tokens: int, micro_batch: int = 0) -> dict[int, range]:
        """Which of a micro-batch's `tokens` every rank has that attends in a layer, or computes the head: those of its
        sequences, or its share."""
        if layer == self.layers and self.head:
            total, ends = sum(self.head), list(accumulate(self.head, initial=0))
            cuts = [tokens * end // total for end in ends]
            return {rank: range(cuts[rank], cuts[rank + 1]) for rank in self.head_ranks}
        each = tokens // self.sequences_per_micro_batch
        found = self.sequences_of(self.span_at(layer), micro_batch)
        return {rank: range(own.start * each, own.stop * each) for rank, own in found.items()}

    def crossing(self, layer: int, tokens: int, micro_batch: int = 0) -> tuple[dict[int, range], dict[int, range]]:
        """Of what goes from one pipeline stage into the one that begins with `layer`, or into the head: which of a
        micro-batch's tokens ranks have before and after it."""
        return self.tokens_at(layer - 1, tokens, micro_batch), self.tokens_at(layer, tokens, micro_batch)

    def cross(self, layer: int, before: int, after: int, micro_batch: int = 0) -> bool:
        """Whether rank `before` has tokens that rank `after` has behind it, however long sequences are."""
        one, other = self.crossing(layer, self.sequences_per_micro_batch * max(1, sum(self.head)), micro_batch)
        return in_both(one.get(before, range(0)), other.get(after, range(0))) > 0

    def recomputation_of(self, span: Span) -> str:
        """` with recomputation of attention`; nothing where all pipeline stages do as the schedule says."""
        same = {each.schedule.recompute for each in self.spans} == {self.schedule.recompute}
        return "" if same else f" with {span.schedule.recomputation}"

    def border(self, layer: int) -> int:
        """Of the border between two pipeline stages, or before the head, before `layer`: its number."""
        return self.span_at(layer).number - (layer < self.layers)

    @property
    def borders(self) -> int:
        """How many there are."""
        return len(self.spans) - 1 + bool(self.head)

    def windows_in_flight(self, rank: int) -> float:
        """Windows of micro-batches whose activations `rank` keeps at once."""
        span, most = self.span_of(rank), self.schedule.micro_batches // self.schedule.window
        return min(windows_alive(self.schedule.passes, span.ahead, len(span.layers)), most)

    @property
    def attending(self) -> list[int]:
        """Ranks that attend to at least one sequence, in some layer."""
        return [rank for rank, count in enumerate(self.sequences_per_rank) if count]

    @property
    def gathers(self) -> bool:
        """Whether ranks hold shares of the dense part only and gather it layer by layer; one rank has all of it."""
        return self.schedule.dense_state == "full" and len(self.attending) > 1

    @property
    def renews(self) -> bool:
        """Whether weights stay whole while states are shared out: new ones are gathered in the next iteration."""
        return self.schedule.shares_states and not self.gathers

    def hosting(self, layer: int) -> list[int]:
        """Ranks that host at least one expert of `layer` (replicated ones not counted)."""
        return [rank for rank, experts in enumerate(self.placement[layer].experts) if experts]

    def numbers_ahead(self, layer: int, rank: int) -> int:
        """Numbers that go ahead of a dispatch to `rank`: rows for each expert that it hosts; where a row may be for
        several of them, how many rows these are."""
        return len(self.placement[layer].experts[rank]) + (self.schedule.dispatch == "per_device")

    def local_experts(self, layer: int, rank: int) -> list[int]:
        """Experts of `layer` that `rank` computes: hosted, then (if it attends) replicated."""
        placement = self.placement[layer]
        copies = placement.replicated and self.attends(rank, layer)
        return placement.experts[rank] + (placement.replicated if copies else [])

"""Layout: all that the schedule, the simulator and the engine need to know of a plan."""

from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field, model_validator

from hetermoe_cli.spec.base import ExtendedSpec, NonNegativeInt, PositiveInt, Spec
from hetermoe_cli.spec.train import DenseState, Dispatch, Recompute

ScheduleName = Literal["zebra", "windowed", "sequential"]
ExpertOrder = Literal["after", "between"]
TransferOrder = Literal["layered", "interleaved"]
PassOrder = Literal["in_turn", "woven"]


def windows_ahead(passes: PassOrder, stages: int) -> int:
    """Windows that go forward before the first backward, where so many pipeline stages follow: as many (1F1B). Woven,
    two for each, as a step needs what the stage before made in the last step and what the one behind made in this, and
    one for the stage itself."""
    return stages if passes == "in_turn" else 2 * stages + 1


class ScheduleChoice(ExtendedSpec):
    """Which order to run: R micro-batches in windows that go forward and backward one after another.

    `window` micro-batches are in flight together: all of them is zebra, one is sequential. `experts`: attending ranks
    run their experts after the layer's attention of all micro-batches in the window, or between them. `transfers`: on
    a link that both use, a layer's first message goes after all answers of the layer before, or after two of them.
    `recompute`: which stages run again in backward instead of keeping their activations; with `full` nothing is kept
    but what attention stages read: rows are sent to the experts once more, with the gradients. `dense_state`: what
    attending ranks share of the dense part's state; if anything, holders of an expert share its masters and moments.
    `dispatch`: whether a token's row goes once to every expert that it chose, or to every rank that hosts some of them.
    `passes`: one window after another, or a window's backward woven into the forward of a later one, so that what one
    waits for travels while the other computes; which keeps twice as many windows alive.
    """

    later: ClassVar[frozenset[str]] = frozenset({"dispatch", "passes"})

    micro_batches: PositiveInt
    window: PositiveInt
    experts: ExpertOrder = "after"
    transfers: TransferOrder = "layered"
    recompute: Recompute = "none"
    dense_state: DenseState = "replicated"
    dispatch: Dispatch = "per_expert"
    passes: PassOrder = "in_turn"

    @model_validator(mode="after")
    def _check(self) -> "ScheduleChoice":
        if self.micro_batches % self.window:
            raise ValueError(f"window {self.window} does not divide micro_batches {self.micro_batches}")
        if self.sends_again and self.dense_state == "full":
            raise ValueError("recompute full needs the weights of two layers at once: not with dense_state full")
        if self.passes == "woven" and not self._weaves:
            raise ValueError("passes woven: not with dense_state full, experts between or transfers interleaved")
        return self

    @property
    def _weaves(self) -> bool:
        return self.dense_state != "full" and (self.experts, self.transfers) == ("after", "layered")

    @classmethod
    def zebra(cls, micro_batches: int, *, recompute: Recompute = "none") -> "ScheduleChoice":
        """All micro-batches in flight together."""
        return cls(micro_batches=micro_batches, window=micro_batches, recompute=recompute)

    @classmethod
    def sequential(cls, micro_batches: int, *, recompute: Recompute = "none") -> "ScheduleChoice":
        """One micro-batch after another, nothing overlapped."""
        return cls(micro_batches=micro_batches, window=1, recompute=recompute)

    @property
    def name(self) -> ScheduleName:
        """zebra, windowed or sequential."""
        if self.window == self.micro_batches:
            return "zebra"
        return "sequential" if self.window == 1 else "windowed"

    @property
    def in_default_order(self) -> bool:
        """Whether the planner's bounds are of this order."""
        return (self.experts, self.transfers, self.passes) == ("after", "layered", "in_turn")

    @property
    def shares_states(self) -> bool:
        """Whether masters and moments of what several ranks hold are shared out among them."""
        return self.dense_state != "replicated"

    @property
    def recompute_attention(self) -> bool:
        """Whether attention stages run again in backward."""
        return self.recompute in ("attention", "all", "full")

    @property
    def recompute_experts(self) -> bool:
        """Whether expert stages run again in backward."""
        return self.recompute in ("experts", "all", "full")

    @property
    def sends_again(self) -> bool:
        """Whether experts get their rows again in backward. Whoever sends a layer's gradients runs its attention again
        before: an attention stage's backward that of the layer before, the head the last one's."""
        return self.recompute == "full"

    @property
    def recomputation(self) -> str:
        """In words."""
        words = {"none": "no recomputation", "all": "recomputation", "full": "full recomputation"}
        return words.get(self.recompute, f"recomputation of {self.recompute}")

    def __str__(self) -> str:
        parts = [self.name, f"R = {self.micro_batches}"]
        parts += [f"windows of {self.window}"] * (self.name == "windowed")
        parts += ["passes woven"] * (self.passes == "woven")
        parts += ["experts between micro-batches"] * (self.experts == "between")
        parts += ["transfers interleaved"] * (self.transfers == "interleaved")
        parts += [self.recomputation] * (self.recompute != "none")
        shared = {"optimizer": ["optimizer states sharded"], "full": ["dense part fully sharded"]}
        parts += shared.get(self.dense_state, [])
        parts += ["rows once per device"] * (self.dispatch == "per_device")
        return ", ".join(parts)


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
    layout's, with the stage's own recomputation."""

    number: int
    first: int
    end: int
    ranks: tuple[int, ...]
    attending: tuple[int, ...]
    ahead: int
    schedule: ScheduleChoice

    @property
    def layers(self) -> range:
        """Its layers."""
        return range(self.first, self.end)


def in_both(one: range, other: range) -> int:
    """How many numbers two ranges have in common."""
    return max(0, min(one.stop, other.stop) - max(one.start, other.start))


class Layout(ExtendedSpec):
    """All that the schedule, the simulator and the engine need to know of a plan.

    `sequences_per_rank[r]` is what rank r attends to per micro-batch; 0 makes it a pure expert rank. `pipeline`: stages
    of consecutive layers, each a zebra group of its own; none: all ranks work on all layers.
    """

    later: ClassVar[frozenset[str]] = frozenset({"pipeline"})
    model_config = ConfigDict(ignored_types=(cached_property,))

    schedule: ScheduleChoice
    sequences_per_rank: list[NonNegativeInt] = Field(min_length=1)
    placement: list[LayerPlacement] = Field(min_length=1)
    pipeline: list[PipelineStage] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> "Layout":
        if not any(self.sequences_per_rank):
            raise ValueError("sequences_per_rank: at least one rank must attend to a sequence")
        counts = {len(p.replicated) + sum(map(len, p.experts)) for p in self.placement}
        for layer, placement in enumerate(self.placement):
            if len(placement.experts) != self.world_size:
                raise ValueError(
                    f"placement.{layer}.experts: {len(placement.experts)} ranks listed, "
                    f"sequences_per_rank has {self.world_size}"
                )
            everyone = sorted([e for host in placement.experts for e in host] + placement.replicated)
            if everyone != list(range(len(everyone))) or len(counts) != 1:
                raise ValueError(f"placement.{layer}: every expert must be placed exactly once")
        if self.pipeline:
            self._check_pipeline()
        return self

    def _check_pipeline(self) -> None:
        if sorted(rank for stage in self.pipeline for rank in stage.ranks) != list(range(self.world_size)):
            raise ValueError("pipeline: every rank must be in one stage")
        if sum(stage.layers for stage in self.pipeline) != self.layers:
            raise ValueError(f"pipeline: its stages must have {self.layers} layers together")
        if self.schedule.dense_state == "full":
            raise ValueError("pipeline: not with dense_state full: stages share out optimizer states only")
        for span in self.spans:
            found = sum(self.sequences_per_rank[rank] for rank in span.ranks)
            if not found:
                raise ValueError(f"pipeline.{span.number}: none of its ranks attends to a sequence")
            if found != self.sequences_per_micro_batch:
                raise ValueError(
                    f"pipeline.{span.number}: {found} sequences a micro-batch, the first stage has "
                    f"{self.sequences_per_micro_batch}"
                )
            for layer in span.layers:
                if not {*self.hosting(layer)} <= {*span.ranks}:
                    raise ValueError(f"placement.{layer}: experts on a rank outside pipeline stage {span.number}")

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
        return copy

    def _attending(self, stage: PipelineStage) -> tuple[int, ...]:
        return tuple([rank for rank in sorted(stage.ranks) if self.sequences_per_rank[rank]])

    def span_of(self, rank: int) -> Span:
        """The pipeline stage of a rank."""
        return next(span for span in self.spans if not self.pipeline or rank in span.ranks)

    def span_at(self, layer: int) -> Span:
        """The pipeline stage of a layer; of the number after the last one (norm and head), the last stage."""
        return next((span for span in self.spans if layer < span.end), self.spans[-1])

    def attending_at(self, layer: int) -> tuple[int, ...]:
        """Ranks that attend in a layer, or compute the head (span_at)."""
        return self.span_at(layer).attending

    def attends(self, rank: int, layer: int) -> bool:
        """Whether `rank` attends in a layer."""
        return self.sequences_per_rank[rank] > 0 and (not self.pipeline or rank in self.attending_at(layer))

    @property
    def sequences_per_micro_batch(self) -> int:
        """Sequences of one micro-batch, over all ranks of a pipeline stage."""
        if not self.pipeline:
            return sum(self.sequences_per_rank)
        return sum([self.sequences_per_rank[rank] for rank in self.pipeline[0].ranks])

    def sequences_of(self, span: Span) -> dict[int, range]:
        """Which of a micro-batch's sequences every attending rank of a stage has: they go to its ranks in turn."""
        counts = [self.sequences_per_rank[rank] for rank in span.attending]
        ends = accumulate(counts)
        return {rank: range(end - n, end) for rank, n, end in zip(span.attending, counts, ends, strict=True)}

    def common(self, rank: int, other: int) -> int:
        """Sequences of a micro-batch that `rank` and `other`, of another pipeline stage, both attend to."""
        own, others = (self.sequences_of(self.span_of(each))[each] for each in (rank, other))
        return in_both(own, others)

    def recomputation_of(self, span: Span) -> str:
        """` with recomputation of attention`; nothing where all pipeline stages do the same."""
        same = len({each.schedule.recompute for each in self.spans}) == 1
        return "" if same else f" with {span.schedule.recomputation}"

    def border(self, layer: int) -> int:
        """Of the border between two pipeline stages, before `layer`: its number."""
        return self.span_at(layer).number - 1

    def windows_in_flight(self, rank: int) -> int:
        """Windows of micro-batches whose activations `rank` keeps at once: one more than go forward ahead of its first
        backward."""
        most = self.schedule.micro_batches // self.schedule.window
        return min(windows_ahead(self.schedule.passes, self.span_of(rank).ahead) + 1, most)

    @property
    def attending(self) -> list[int]:
        """Ranks that attend to at least one sequence, in some layer."""
        return [rank for rank, count in enumerate(self.sequences_per_rank) if count]

    @property
    def gathers(self) -> bool:
        """Whether ranks hold shares of the dense part only and gather it layer by layer; one rank has all of it."""
        return self.schedule.dense_state == "full" and len(self.attending) > 1

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

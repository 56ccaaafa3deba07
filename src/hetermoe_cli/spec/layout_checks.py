"""What makes a layout one that can run. Errors name the field."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hetermoe_cli.spec.layout import Layout


def check(layout: "Layout") -> None:
    """ValueError where it is none."""
    if not any(layout.sequences_per_rank):
        raise ValueError("sequences_per_rank: at least one rank must attend to a sequence")
    counts = {len(p.replicated) + sum(map(len, p.experts)) for p in layout.placement}
    for layer, placement in enumerate(layout.placement):
        if len(placement.experts) != layout.world_size:
            raise ValueError(
                f"placement.{layer}.experts: {len(placement.experts)} ranks listed, "
                f"sequences_per_rank has {layout.world_size}"
            )
        everyone = sorted([e for host in placement.experts for e in host] + placement.replicated)
        if everyone != list(range(len(everyone))) or len(counts) != 1:
            raise ValueError(f"placement.{layer}: every expert must be placed exactly once")
    for given, checked in (
        (layout.pipeline, _check_pipeline),
        (layout.shifts, _check_shifts),
        (layout.head, _check_head),
    ):
        if given:
            checked(layout)


def _check_pipeline(layout: "Layout") -> None:
    if sorted(rank for stage in layout.pipeline for rank in stage.ranks) != list(range(layout.world_size)):
        raise ValueError("pipeline: every rank must be in one stage")
    if sum(stage.layers for stage in layout.pipeline) != layout.layers:
        raise ValueError(f"pipeline: its stages must have {layout.layers} layers together")
    if layout.schedule.dense_state == "full":
        raise ValueError("pipeline: not with dense_state full: stages share out optimizer states only")
    for span in layout.spans:
        found = sum(layout.sequences_per_rank[rank] for rank in span.ranks)
        if not found:
            raise ValueError(f"pipeline.{span.number}: none of its ranks attends to a sequence")
        if found != layout.sequences_per_micro_batch:
            raise ValueError(
                f"pipeline.{span.number}: {found} sequences a micro-batch, the first stage has "
                f"{layout.sequences_per_micro_batch}"
            )
        for layer in span.layers:
            if not {*layout.hosting(layer)} <= {*span.ranks}:
                raise ValueError(f"placement.{layer}: experts on a rank outside pipeline stage {span.number}")


def _check_shifts(layout: "Layout") -> None:
    if layout.pipeline or not layout.allows(layout.schedule):
        raise ValueError("shifts: not with pipeline stages, dense_state full or woven passes")
    if layout.replicates_in_shifts:
        raise ValueError("shifts: not with replicated experts")
    if len(layout.shifts) != layout.world_size:
        raise ValueError(f"shifts: {len(layout.shifts)} ranks listed, sequences_per_rank has {layout.world_size}")
    for rank, (shift, sequences) in enumerate(zip(layout.shifts, layout.sequences_per_rank, strict=True)):
        if sorted({*shift}) != shift or shift[-1:] >= [layout.micro_batches]:
            raise ValueError(
                f"shifts.{rank}: must be numbers of micro-batches, below {layout.micro_batches}, ascending"
            )
        if bool(shift) != bool(sequences):
            raise ValueError(f"shifts.{rank}: must name micro-batches where, and only where, the rank attends")
    crews = [layout.crew(0, j) for j in range(layout.micro_batches)]
    sizes = [sum(layout.sequences_per_rank[rank] for rank in crew) for crew in crews]
    if len({*sizes}) > 1:
        raise ValueError(f"shifts: micro-batches have from {min(sizes)} to {max(sizes)} sequences, must be equal")


def _check_head(layout: "Layout") -> None:
    if not layout.allows_head:
        raise ValueError("head: not with dense_state full or woven passes")
    if len(layout.head) != layout.world_size:
        raise ValueError(f"head: {len(layout.head)} ranks listed, sequences_per_rank has {layout.world_size}")
    if not any(layout.head):
        raise ValueError("head: at least one rank must compute it")
    if not {*layout.head_ranks} <= {*layout.spans[-1].ranks}:
        raise ValueError("head: only ranks of the last pipeline stage can compute it")

"""What a plan says in words: notes on its assumptions, and why nothing fits."""

from collections.abc import Iterator
from math import inf

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.baselines import Rival
from hetermoe_cli.planner.candidates import ExactOver, candidates
from hetermoe_cli.spec.plan import Inputs, Layout

MOST_ADDED = 64  # devices


def notes(
    cost: CostModel, layout: Layout, rivals: dict[str, Rival], seconds: float, exact_over: ExactOver
) -> list[str]:
    """Modelled figures, extended curves, devices left out, where nothing can be gained, and a search cut short."""
    result = [*_sources(cost), *_extended(cost, layout), *_left_out(cost, layout), *_no_gain(cost, rivals, seconds)]
    if exact_over == "not solved":
        result.append("the search did not close the gap: a longer --time-limit may find a better plan")
    return result


def _sources(cost: CostModel) -> Iterator[str]:
    modelled = [name for name in cost.types if cost.inputs.profiles[name].source == "modelled"]
    if modelled:
        yield f"the profiles of {', '.join(modelled)} are modelled from data sheets, not measured"


def _extended(cost: CostModel, layout: Layout) -> Iterator[str]:
    """Sizes outside the profiled range: the curve's end segment was extended."""
    rows = cost.rows_per_expert(layout.sequences_per_micro_batch)
    for name, device in cost.types.items():
        ranks = [d.rank for d in cost.devices if d.type == name]
        for sequences in sorted({layout.sequences_per_rank[rank] for rank in ranks} - {0}):
            if not device.attention.covers(sequences):
                yield f"profile {name}: attention at {sequences} sequences lies outside the profiled sizes: extended"
            if not device.head.covers(sequences * cost.train.sequence_length):
                yield f"profile {name}: head at {sequences} sequences lies outside the profiled sizes: extended"
        hosts = any(placement.experts[rank] for placement in layout.placement for rank in ranks)
        if hosts and not device.expert.covers(rows):
            yield f"profile {name}: an expert at {rows:.0f} rows lies outside the profiled sizes: extended"


def _left_out(cost: CostModel, layout: Layout) -> Iterator[str]:
    idle = [
        rank
        for rank in range(layout.world_size)
        if not any(layout.local_experts(layer, rank) for layer in range(layout.layers))
        and not layout.sequences_per_rank[rank]
    ]
    if idle:
        names = ", ".join(f"{rank} ({cost.devices[rank].type})" for rank in idle)
        yield f"left out on purpose, they would slow the others down: ranks {names}"


def _no_gain(cost: CostModel, rivals: dict[str, Rival], seconds: float) -> Iterator[str]:
    if rivals["ep"].seconds <= seconds * 1.001:
        why = "all devices are equal, so" if len(cost.types) == 1 else "here"
        yield f"{why} plain expert parallelism is as fast: nothing is gained by other roles"


def does_not_fit(cost: CostModel, rivals: dict[str, Rival], micro_batch_limit: int) -> UserError:
    """Names the rank and kind of memory that bind in the leanest expert-parallel layout, and what would fit."""
    change = _smallest_change(cost.inputs, micro_batch_limit)
    return UserError(
        f"model {cost.model.name} on cluster {cost.inputs.cluster.name}: does not fit: spread evenly, "
        f"{rivals['ep'].reason.removeprefix('does not fit: ')}; {change}",
        ExitCode.DOES_NOT_FIT,
    )


def _smallest_change(inputs: Inputs, limit: int) -> str:
    """The fewest devices of one type to add so that memory no longer rules everything out."""
    if inputs.train.recompute != "auto":
        train = inputs.train.model_copy(update={"recompute": "auto"})
        if _possible(inputs.model_copy(update={"train": train}), limit):
            return "with recompute: auto it would take no more devices"
    best: tuple[int, str] | None = None
    for name in inputs.cluster.device_types:
        most = best[0] - 1 if best else MOST_ADDED
        if most < 1 or not _possible(_with_more(inputs, name, most), limit):
            continue
        low, high = 0, most  # low does not fit, high does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _possible(_with_more(inputs, name, middle), limit) else (middle, high)
        best = (high, name)
    if best:
        return f"at least {best[0]} more {best[1]} would be needed"
    return f"not even {MOST_ADDED} more devices of one type would do: shorten the sequences or shrink the batch"


def _with_more(inputs: Inputs, device: str, count: int) -> Inputs:
    group = next(node for node in inputs.cluster.nodes if node.device == device)
    added = group.model_copy(update={"name": "added", "count": count, "devices": 1, "nics": 1})
    cluster = inputs.cluster.model_copy(update={"nodes": [*inputs.cluster.nodes, added]})
    return inputs.model_copy(update={"cluster": cluster})


def _possible(inputs: Inputs, limit: int) -> bool:
    """Whether memory leaves any choice open (a relaxation: placements are not tried)."""
    return bool(candidates(CostModel(inputs), limit, inf)[0])

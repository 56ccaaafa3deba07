"""What a plan says in words: notes on its assumptions, and why nothing fits."""

from collections.abc import Collection, Iterator

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.baselines.rival import Rival
from hetermoe_cli.planner.reasons.remedies import smallest_change
from hetermoe_cli.planner.search.outer import Found
from hetermoe_cli.spec.layout import Layout


def notes(cost: CostModel, layout: Layout, rivals: dict[str, Rival], found: Found) -> list[str]:
    """Modelled figures, assumptions, extended curves, devices left out, no gain, and a search cut short.

    `layout` is what was `found`, or a rival's: what the search says then is not said of it.
    """
    result = [*sources(cost), *_extended(cost, layout), *_left_out(cost, layout), *_no_gain(cost, rivals, found)]
    if layout.beyond_bounds:
        result.append(f"no bound covers layouts with {beyond(layout)}")
    if found.exact_over == "not solved" and layout == found.layout:
        result.append("the search did not close the gap: a longer --time-limit may find a better plan")
    return result


def beyond(layout: Layout) -> str:
    """What of a layout no bound covers."""
    return " and ".join(["shifts"] * bool(layout.shifts) + ["the head apart"] * bool(layout.head))


def sources(cost: CostModel) -> Iterator[str]:
    """What is modelled, who computes in another precision than the exchange's, how long documents are."""
    modelled = [name for name in cost.types if cost.inputs.profiles[name].source == "modelled"]
    if modelled:
        yield f"the profiles of {', '.join(modelled)} are modelled from data sheets, not measured"
    if links := cost.inputs.modelled_links:
        yield f"the links {', '.join(links)} are modelled from data sheets, not measured"
    train = cost.train
    if other := [
        f"{name} computes in {train.precision_of(name)}" for name in cost.types if name in train.device_precision
    ]:
        rest = [f"the others in {train.precision}"] if len(other) < len(cost.types) else []
        yield f"{', '.join(other + rest)}; rows and shared gradients travel in {train.precision}"
    if train.documents == "masked":
        told = (
            "" if train.document_tokens else ": one a sequence, as neither --data nor train.document_tokens says more"
        )
        yield f"attention is timed for documents of {train.attention_tokens} tokens{told}"
    if unknown := sorted(train.device_precision.keys() - cost.types.keys()):
        yield f"train.device_precision names {', '.join(unknown)}, which the cluster does not have"


def _extended(cost: CostModel, layout: Layout) -> Iterator[str]:
    """Sizes outside the profiled range: the curve's end segment was extended."""
    layout_cost = LayoutCost(cost, layout)
    for name, device in cost.types.items():
        ranks = [d.rank for d in cost.devices if d.type == name]
        for sequences in sorted({layout.sequences_per_rank[rank] for rank in ranks} - {0}):
            if not device.attention.covers(sequences):
                yield f"profile {name}: attention at {sequences} sequences lies outside the profiled sizes: extended"
        for headed in sorted({layout.head_sequences(rank) for rank in ranks} - {0}):
            if not device.head.covers(headed * cost.train.sequence_length):
                yield f"profile {name}: head at {headed:.3g} sequences lies outside the profiled sizes: extended"
        rows = {count for rank in ranks for layer in layout_cost.hosted_rows(rank) for count in layer if count > 0}
        if outside := sorted(count for count in rows if not device.expert.covers(count)):
            sizes = " to ".join(dict.fromkeys(f"{count:.0f}" for count in (outside[0], outside[-1])))
            yield f"profile {name}: an expert at {sizes} rows lies outside the profiled sizes: extended"


def _left_out(cost: CostModel, layout: Layout) -> Iterator[str]:
    idle = [
        rank
        for rank in range(layout.world_size)
        if not any(layout.local_experts(layer, rank) for layer in range(layout.layers)) and not layout.has_dense(rank)
    ]
    if idle:
        names = ", ".join(f"{rank} ({cost.devices[rank].type})" for rank in idle)
        yield f"left out on purpose, they would slow the others down: ranks {names}"


def not_used(cost: CostModel, used: Collection[int], why: str) -> Iterator[str]:
    """How many devices of every type are in no group."""
    if left_out := set(range(len(cost.devices))) - set(used):
        counts = {name: sum(cost.devices[rank].type == name for rank in left_out) for name in cost.types}
        names = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        yield f"left out on purpose, {why}: {names}"


def _no_gain(cost: CostModel, rivals: dict[str, Rival], found: Found) -> Iterator[str]:
    if rivals["ep"].seconds <= found.seconds * 1.001:
        why = "all devices are equal, so" if len(cost.types) == 1 else "here"
        yield f"{why} plain expert parallelism is as fast: nothing is gained by other roles"


def does_not_fit(cost: CostModel, rivals: dict[str, Rival], micro_batch_limit: int) -> UserError:
    """Names the rank and kind of memory that bind in the leanest expert-parallel layout, and what would fit."""
    change = smallest_change(cost.inputs, micro_batch_limit)
    return UserError(
        f"model {cost.model.name} on cluster {cost.inputs.cluster.name}: does not fit: spread evenly, "
        f"{rivals['ep'].reason.removeprefix('does not fit: ')}; {change}",
        ExitCode.DOES_NOT_FIT,
    )

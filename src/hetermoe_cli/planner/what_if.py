"""What-if: the same training planned on the cluster with devices added or taken away."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import UserError
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.spec.change import Change, changed_cluster
from hetermoe_cli.spec.cluster import ClusterSpec
from hetermoe_cli.spec.explanation import Variant
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.library import load_profiles
from hetermoe_cli.spec.plan import Plan


def changed_inputs(inputs: Inputs, change: Change, folders: Sequence[Path]) -> Inputs:
    """The inputs after `change`; profiles of new types come from `folders`. UserError if none of them fits."""
    cluster = changed_cluster(inputs.cluster, change)
    new = [group for group in cluster.nodes if group.device not in inputs.profiles]
    more = load_profiles(cluster.model_copy(update={"nodes": new}), folders) if new else {}
    profiles = {name: (inputs.profiles | more)[name] for name in cluster.device_types}
    changed = inputs.model_copy(update={"cluster": cluster, "profiles": profiles})
    CostModel(changed)  # the profiles hold the model's shape, precision and sequence length
    return changed


def what_if(
    plan: Plan,
    variants: Sequence[tuple[Change, Inputs]],
    options: PlanOptions,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Variant]:
    """Every variant planned like `plan` and compared with it; one that cannot be planned carries the reason."""
    result = []
    for number, (change, inputs) in enumerate(variants, 1):
        progress(f"what-if {number} of {len(variants)}: {change}")
        result.append(_variant(plan, change, inputs, replace(options, explain=False)))
    return result


def _variant(plan: Plan, change: Change, inputs: Inputs, options: PlanOptions) -> Variant:
    devices = dict(Counter(device.type for device in inputs.devices()))
    try:
        found = make_plan(inputs, options)
    except UserError as error:
        return Variant(change=str(change), devices=devices, reason=str(error))
    return _figures(str(change), devices, found, plan)


def unchanged(plan: Plan) -> Variant:
    """The plan itself, to compare variants with."""
    return _figures("", dict(Counter(device.type for device in plan.inputs.devices())), plan, plan)


def _figures(change: str, devices: dict[str, int], found: Plan, base: Plan) -> Variant:
    speed, price = found.predicted.tokens_per_second, _price_per_hour(found.inputs.cluster)
    return Variant(
        change=change,
        devices=devices,
        iteration_seconds=found.predicted.iteration_seconds,
        tokens_per_second=speed,
        tokens_per_second_per_device=speed / sum(devices.values()),
        gained=speed / base.predicted.tokens_per_second - 1,
        gap=found.gap,
        binding=found.explanation.binding if found.explanation else "",
        price_per_hour=price,
        tokens_per_dollar=3600 * speed / price if price else None,
    )


def _price_per_hour(cluster: ClusterSpec) -> float | None:
    """All devices together; None if a node group has no price."""
    prices = [(group.price_per_hour, group.count * group.devices) for group in cluster.nodes]
    if any(price is None for price, _ in prices):
        return None
    return sum(price * count for price, count in prices if price is not None)

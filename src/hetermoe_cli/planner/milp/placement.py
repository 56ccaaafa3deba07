"""Constraint families of the placement: coverage, hosting, unevenness, memory, symmetry."""

from itertools import permutations
from typing import Any

import pulp

from hetermoe_cli.planner.bounds.patterns import caps_within
from hetermoe_cli.planner.milp.model import Model


def variables(model: Model) -> None:
    """Counts of experts per layer and class, and the binaries that follow from them."""
    add, least, most = model.problem.add_variable, model.limits.least, model.limits.most
    caps = caps_within(model.rates, 1.0)[0]
    for layer in model.layers:
        model.replicated.append(add(f"replicated_{layer}", least[-1], most[-1], pulp.LpInteger))
        for c, device_class in model.classes:
            key, name, count = (layer, c), f"{layer}_{c}", device_class.count
            low, high = -(-least[c] // count), -(-most[c] // count)
            if model.mode == "mean":
                high = max(high, min(caps[c], -(-model.limits.partial[c] // max(1, count - 1))))
            model.hosted[key] = add(f"hosted_{name}", low, high, pulp.LpInteger)
            model.hosts[key] = add(f"hosts_{name}", min(1, low), min(1, high), pulp.LpInteger)
            model.all_host[key] = model.hosts[key]
            if count > 1:
                _uneven_variables(model, key, name)
    model.total = [add(f"total_{c}", 0, None, pulp.LpInteger) for c, _ in model.classes]


def _uneven_variables(model: Model, key: tuple[int, int], name: str) -> None:
    add, others = model.problem.add_variable, model.rates.classes[key[1]].count - 1
    if model.mode == "mean":
        model.spare[key] = add(f"spare_{name}", 0, others * (model.hosted[key].upBound or 0), pulp.LpInteger)
        everyone = model.limits.least[key[1]] > model.limits.partial[key[1]]
        model.all_host[key] = add(f"all_host_{name}", int(everyone), 1, pulp.LpInteger)
    else:
        model.spare[key] = add(f"spare_{name}", 0, others, pulp.LpInteger)
        model.uneven[key] = add(f"uneven_{name}", 0, 1, pulp.LpInteger)


def coverage(model: Model) -> None:
    """Every expert of every layer is hosted once or replicated."""
    for layer in model.layers:
        terms = [(model.replicated[layer], 1.0)]
        for c, device_class in model.classes:
            terms.append((model.hosted[layer, c], float(device_class.count)))
            if device_class.count > 1:
                terms.append((model.spare[layer, c], -1.0))
        model.problem += pulp.LpAffineExpression(terms) == model.rates.experts, f"coverage_{layer}"


def hosting(model: Model) -> None:
    """hosts = 1 exactly where some device of the class hosts an expert."""
    for (layer, c), hosted in model.hosted.items():
        hosts = model.hosts[layer, c]
        model.problem += hosted <= (hosted.upBound or 0) * hosts, f"hosts_{layer}_{c}"
        model.problem += hosted >= hosts, f"hosts_none_{layer}_{c}"


def unevenness(model: Model) -> None:
    """How far a class's devices together stay below as many times the largest one.

    In the largest model by less than one each. The mean model does not know how a class deals out its experts: it
    charges the best way, which is that one, or with an idle device the same over the others.
    """
    for (layer, c), spare in model.spare.items():
        others = model.rates.classes[c].count - 1
        hosted, name = model.hosted[layer, c], f"{layer}_{c}"
        if model.mode == "mean":
            everyone, most = model.all_host[layer, c], hosted.upBound or 0
            model.problem += spare <= others * hosted, f"spare_{name}"
            model.problem += spare <= others + most * (1 - everyone), f"spare_all_{name}"
            model.problem += hosted - spare <= most * everyone, f"all_host_{name}"
            total = (others + 1) * hosted - spare
            more = max(0, model.limits.most[c] - model.limits.partial[c])
            model.problem += total <= model.limits.partial[c] + more * everyone, f"partial_{name}"
        else:
            model.problem += spare <= others * model.uneven[layer, c], f"uneven_{name}"
            model.problem += model.uneven[layer, c] <= model.hosts[layer, c], f"uneven_hosts_{name}"


def totals(model: Model) -> None:
    """What the fullest device of a class holds over all layers, when remainders rotate."""
    for c, device_class in model.classes:
        terms = [(model.hosted[layer, c], -float(device_class.count)) for layer in model.layers]
        terms += [(model.spare[layer, c], 1.0) for layer in model.layers if device_class.count > 1]
        terms.append((model.total[c], float(device_class.count)))
        model.problem += pulp.LpAffineExpression(terms) >= 0, f"total_{c}"


def memory(model: Model) -> None:
    """Weights, gradients, states, activations, buffers and framework fit (CostModel.memory, linear here).

    In the mean model the device that holds most over all layers need not hold most in any one layer.
    """
    rates, add = model.rates, model.problem.add_variable
    copies = pulp.lpSum(model.replicated)
    any_copy, most_copies = add("any_replicated", 0, 1, pulp.LpInteger), add("most_replicated", 0, rates.experts)
    model.problem += copies <= rates.layers * rates.experts * any_copy, "any_replicated"
    for layer in model.layers:
        model.problem += most_copies >= model.replicated[layer], f"most_replicated_{layer}"
    for c, device_class in model.classes:
        r, mean = rates.of[c], model.mode == "mean" and device_class.count > 1
        most, holds = add(f"most_{c}", 0, rates.experts), add(f"holds_{c}", 0, 1, pulp.LpInteger)
        for layer in model.layers:
            widest = model.mean(layer, c) if mean else model.hosted[layer, c]
            model.problem += most >= widest, f"most_{c}_{layer}"
            model.problem += holds >= model.hosts[layer, c], f"holds_{c}_{layer}"
        # in units of the limit, so that the solver's absolute tolerance means little
        each, share = r.memory_per_hosted / r.memory_limit, r.memory_per_share / r.memory_limit
        limit: Any = 1 - r.memory_base / r.memory_limit
        if device_class.attends:
            model.problem += holds >= any_copy, f"holds_copy_{c}"
            limit = limit - copies * (r.memory_per_replicated / r.memory_limit)
            limit = limit - most_copies * (r.memory_per_copy / r.memory_limit)
        working = holds * (r.memory_if_any / r.memory_limit)
        if mean:
            together = pulp.lpSum(model.mean(layer, c) for layer in model.layers)
            model.problem += together * each + most * share <= limit, f"memory_mean_{c}"
            model.problem += model.total[c] * (each + share / rates.layers) + working <= limit, f"memory_{c}"
        else:
            model.problem += model.total[c] * each + most * share + working <= limit, f"memory_{c}"


def symmetry(model: Model) -> None:
    """Of equal devices that are classes of their own, the first hosts most, and no less than the rest on average."""
    for first, other in permutations(range(len(model.rates.classes)), 2):
        if model.rates.leads(first, other):
            most = pulp.lpSum(model.hosted[layer, first] for layer in model.layers)
            mean = pulp.lpSum(model.mean(layer, other) for layer in model.layers)
            model.problem += most >= mean, f"symmetry_{first}_{other}"

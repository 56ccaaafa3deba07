"""Constraint families of the placement: coverage, hosting, unevenness, memory, symmetry."""

import pulp

from hetermoe_cli.planner.ilp import Model


def variables(model: Model) -> None:
    """Counts of experts per layer and class, and the binaries that follow from them."""
    add, least, most = model.problem.add_variable, model.limits.least, model.limits.most
    for layer in model.layers:
        model.replicated.append(add(f"replicated_{layer}", least[-1], most[-1], pulp.LpInteger))
        for c, device_class in model.classes:
            key, name, count = (layer, c), f"{layer}_{c}", device_class.count
            low, high = -(-least[c] // count), -(-most[c] // count)
            model.hosted[key] = add(f"hosted_{name}", low, high, pulp.LpInteger)
            model.hosts[key] = add(f"hosts_{name}", min(1, low), min(1, high), pulp.LpInteger)
            model.all_host[key] = model.hosts[key]
            if count > 1:
                model.spare[key] = add(f"spare_{name}", 0, count - 1, pulp.LpInteger)
                model.uneven[key] = add(f"uneven_{name}", 0, 1, pulp.LpInteger)
                if model.mode == "mean":
                    model.all_host[key] = add(f"all_host_{name}", int(least[c] > count - 1), 1, pulp.LpInteger)
    model.total = [add(f"total_{c}", 0, None, pulp.LpInteger) for c, _ in model.classes]


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
    """A device may have one less than the largest of its class, only where there is a larger one."""
    for (layer, c), spare in model.spare.items():
        count = model.rates.classes[c].count
        uneven, hosts = model.uneven[layer, c], model.hosts[layer, c]
        model.problem += spare <= (count - 1) * uneven, f"uneven_{layer}_{c}"
        model.problem += uneven <= hosts, f"uneven_hosts_{layer}_{c}"
        if model.mode == "mean":
            _all_host(model, layer, c)


def _all_host(model: Model, layer: int, c: int) -> None:
    """Every device of the class hosts: it is even, or the largest has two or more."""
    everyone, hosted = model.all_host[layer, c], model.hosted[layer, c]
    most = hosted.upBound or 0
    model.problem += everyone >= model.hosts[layer, c] - model.uneven[layer, c], f"all_host_even_{layer}_{c}"
    if most > 1:
        model.problem += everyone * (most - 1) >= hosted - 1, f"all_host_two_{layer}_{c}"


def totals(model: Model) -> None:
    """What the fullest device of a class holds over all layers, when remainders rotate."""
    for c, device_class in model.classes:
        terms = [(model.hosted[layer, c], -float(device_class.count)) for layer in model.layers]
        terms += [(model.spare[layer, c], 1.0) for layer in model.layers if device_class.count > 1]
        terms.append((model.total[c], float(device_class.count)))
        model.problem += pulp.LpAffineExpression(terms) >= 0, f"total_{c}"


def memory(model: Model) -> None:
    """Weights, gradients, states, activations, buffers and framework fit (CostModel.memory, linear here)."""
    rates, add = model.rates, model.problem.add_variable
    copies = pulp.lpSum(model.replicated)
    any_copy = add("any_replicated", 0, 1, pulp.LpInteger)
    model.problem += copies <= rates.layers * rates.experts * any_copy, "any_replicated"
    for c, device_class in model.classes:
        r = rates.of[c]
        most, holds = add(f"most_{c}", 0, rates.experts), add(f"holds_{c}", 0, 1, pulp.LpInteger)
        for layer in model.layers:
            model.problem += most >= model.hosted[layer, c], f"most_{c}_{layer}"
            model.problem += holds >= model.hosts[layer, c], f"holds_{c}_{layer}"
        # in units of the limit, so that the solver's absolute tolerance means little
        used = model.total[c] * (r.memory_per_hosted / r.memory_limit) + most * (r.memory_per_share / r.memory_limit)
        used += holds * (r.memory_if_any / r.memory_limit)
        if device_class.attends:
            model.problem += holds >= any_copy, f"holds_copy_{c}"
            used += copies * (r.memory_per_replicated / r.memory_limit)
        model.problem += used <= 1 - r.memory_base / r.memory_limit, f"memory_{c}"


def symmetry(model: Model) -> None:
    """Of classes with one equal device each (device level), the first hosts most."""
    alike: dict[object, int] = {}
    for c, device_class in model.classes:
        key = model.rates.symmetry(c)
        if device_class.count == 1 and key in alike:
            model.problem += model.total[alike[key]] >= model.total[c], f"symmetry_{c}"
        alike[key] = c

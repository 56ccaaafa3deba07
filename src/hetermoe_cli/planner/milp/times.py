"""Constraint families of time: transfer lengths, shared ports, precedence, and the objective."""

from typing import Any

import pulp

from hetermoe_cli.planner.instance.graph import Edge, Hosts, Ring, Shares, Task
from hetermoe_cli.planner.instance.ports import Port
from hetermoe_cli.planner.milp.model import Model
from hetermoe_cli.schedule.action import Kind, Pass, trips


def variables(model: Model) -> None:
    """Start of every task, length of every layer's transfers, and where transfers share a port."""
    add = model.problem.add_variable
    model.start = [add(f"start_{t.device_class + 1}_{t.action}", 0) for t in model.graph.tasks]
    model.transfer = [add(f"transfer_{layer}", 0) for layer in model.layers]
    used = {e.condition for e in model.graph.edges if isinstance(e.condition, Shares)} if model.rates.conflicts else ()
    for shares in sorted(used, key=lambda s: (s.first, s.second)):
        model.shares[shares.first, shares.second] = add(f"shares_{shares.first}_{shares.second}", 0, 1)
    if model.graph.reduced is not None and model.rates.ring:
        model.ring = {layer: add(f"ring_{layer}", 0, 1) for layer in model.layers}
    model.finish, model.optimizer = add("finish", 0), add("optimizer", 0)


def transfer_lengths(model: Model) -> None:
    """A transfer lasts as long as its slowest port: bytes over bandwidth plus latency, where it is used at all."""
    ports = model.rates.least_ports if model.mode == "largest" else model.rates.mean_ports
    for layer in model.layers:
        for number, port in enumerate(ports):
            load = _load(model, layer, port)
            flags = [model.flag(layer, c) for c in port.users] if port.latency else []
            if not flags:
                model.problem += model.transfer[layer] >= load, f"transfer_{layer}_{number}"
            for c, flag in zip(port.users, flags, strict=False):
                model.problem += model.transfer[layer] >= load + port.latency * flag, f"transfer_{layer}_{number}_{c}"


def _load(model: Model, layer: int, port: Port) -> Any:
    """Seconds of the port's bytes."""
    terms: list[Any] = [port.source_bytes * port.byte_seconds * (model.rates.experts - model.replicated[layer])]
    for c, weight in enumerate(port.bytes_per_expert):
        if not weight:
            continue
        single = model.mode == "largest" or port.devices == 1
        amount = model.least(layer, c) if weight < 0 else model.hosted[layer, c] if single else model.mean(layer, c)
        terms.append(amount * (weight * port.byte_seconds))
    return pulp.lpSum(terms)


def port_sharing(model: Model) -> None:
    """shares = 1 where hosts of the one layer send, and hosts of the other receive, through one link direction."""
    for (first, second), shares in model.shares.items():
        pairs = {(c, d) for c, d in model.rates.conflicts}
        pairs |= {(d, c) for c, d in pairs}
        for c, d in sorted(pairs):
            sure = model.mode == "largest" or model.rates.sure_conflict(c, d)
            flags = model.hosts if sure else model.all_host
            one, other = flags[first, c], flags[second, d]
            both = one if one is other else one + other - 1
            model.problem += shares >= both, f"shares_{first}_{second}_{c}_{d}"


def ring_sharing(model: Model) -> None:
    """ring = 1 where hosts of a layer send or receive through a link direction of the attending ranks' ring."""
    for layer, ring in model.ring.items():
        for c, sure in model.rates.ring.items():
            flags = model.hosts if sure or model.mode == "largest" else model.all_host
            model.problem += ring >= flags[layer, c], f"ring_{layer}_{c}"


def precedence(model: Model) -> None:
    """Streams, lanes and data: a task starts when those before it have ended, where the condition holds."""
    earliest, remaining = windows(model)
    for number, edge in enumerate(model.graph.edges):
        end = model.start[edge.before] + length(model, model.graph.tasks[edge.before])
        for task in edge.between:
            end = end + length(model, task)
        if edge.condition is None:
            model.problem += model.start[edge.after] >= end, f"after_{number}"
            continue
        indicator = _indicator(model, edge)
        slack = 1.0 - (0.0 if edge.between else remaining[edge.before]) - earliest[edge.after]
        if indicator is not None and slack > 0:
            model.problem += model.start[edge.after] >= end - slack * (1 - indicator), f"after_{number}"


def _indicator(model: Model, edge: Edge) -> Any:
    if isinstance(edge.condition, Hosts):
        return model.flag(edge.condition.layer, edge.condition.device_class)
    if isinstance(edge.condition, Shares):
        return model.shares.get((edge.condition.first, edge.condition.second))
    if isinstance(edge.condition, Ring):
        return model.ring.get(edge.condition.layer)
    return None


def length(model: Model, task: Task) -> Any:
    """Seconds of a task, as an expression."""
    number, action = task
    if action.is_collective:
        base, each = model.rates.collective(action)
        return base + each * model.replicated[action.layer] if each else base
    if action.is_transfer:
        return trips(action, model.rates.choice.schedule) * model.transfer[action.layer]
    if action.kind is not Kind.EXPERT:
        return fixed_length(model, task)
    r, way = model.rates.of[number], int(action.direction is Pass.BACKWARD)
    hosted = model.hosted[action.layer, number] if model.mode == "largest" else model.mean(action.layer, number)
    seconds = hosted * r.hosted[way]
    if model.rates.classes[number].attends:
        seconds = seconds + model.replicated[action.layer] * r.replicated[way]
    return seconds


def fixed_length(model: Model, task: Task) -> float:
    """Seconds that a task takes under any placement."""
    number, action = task
    if action.is_collective:
        return model.rates.collective(action)[0]
    if action.kind is Kind.HEAD:
        return model.rates.of[number].head
    if action.kind is Kind.ATTENTION:
        return model.rates.of[number].stage(action.layer, int(action.direction is Pass.BACKWARD))
    return 0.0


def windows(model: Model) -> tuple[list[float], list[float]]:
    """Per task its earliest start, and the least time from its end to the end of the iteration."""
    tasks, edges = model.graph.tasks, [e for e in model.graph.edges if e.condition is None]
    lengths = [fixed_length(model, task) for task in tasks]
    earliest = [0.0] * len(tasks)
    last = max(r.optimizer_base for r in model.rates.of)
    after = last + model.rates.reduces[0][0]
    remaining = [last if task.action.kind is Kind.REDUCE else after for task in tasks]
    for before, after, _, between in edges:
        passed = sum(fixed_length(model, task) for task in between)
        earliest[after] = max(earliest[after], earliest[before] + lengths[before] + passed)
    for before, after, _, between in reversed(edges):
        passed = sum(fixed_length(model, task) for task in between)
        remaining[before] = max(remaining[before], remaining[after] + lengths[after] + passed)
    return earliest, remaining


def single_tasks(model: Model) -> None:
    """In the mean model: one combine still waits for the fullest device of a class."""
    if model.mode == "largest":
        return
    earliest, remaining = windows(model)
    place = {task: node for node, task in enumerate(model.graph.tasks)}
    for before, after, condition, _ in model.graph.edges:
        number, action = model.graph.tasks[before]
        if not isinstance(condition, Hosts) or action.is_transfer or model.rates.classes[number].count == 1:
            continue
        partner = Kind.DISPATCH if action.direction is Pass.FORWARD else Kind.COMBINE
        sent = Task(-1, action._replace(kind=partner))
        seconds = (
            model.hosted[action.layer, number] * model.rates.of[number].hosted[int(action.direction is Pass.BACKWARD)]
        )
        slack = 1.0 - remaining[before] - earliest[after]
        bound = model.start[place[sent]] + length(model, sent) + seconds
        model.problem += model.start[after] >= bound - slack * (1 - model.hosts[action.layer, number])


def optimizer_steps(model: Model) -> None:
    """The step takes as long as on the device that holds most."""
    copies = pulp.lpSum(model.replicated)
    for c, _ in model.classes:
        r = model.rates.of[c]
        step = r.optimizer_per_expert * model.total[c] + r.optimizer_per_copy * copies
        model.problem += model.optimizer >= r.optimizer_base + step, f"optimizer_{c}"


def objective(model: Model) -> None:
    """Makespan: compute, all-reduces of dense and replicated gradients, optimizer step."""
    for node in model.graph.last:
        if node is not None:
            model.problem += (
                model.finish >= model.start[node] + length(model, model.graph.tasks[node]),
                f"finish_{node}",
            )
    makespan = model.problem.add_variable("makespan", 0, 1.0)  # no constant in the objective: bounds omit it
    base, each = model.rates.reduces[0]
    reduced = base + each * model.replicated[0]
    model.problem += makespan >= model.finish + reduced + model.optimizer, "makespan_end"
    if model.graph.reduced is not None:
        end = model.start[model.graph.reduced] + length(model, model.graph.tasks[model.graph.reduced])
        model.problem += makespan >= end + model.optimizer, "makespan_reduced"
    model.problem.setObjective(makespan + 0)

"""Random small instances and placements for the planner's tests: mixed types, shared NICs, latencies, tight memory."""

import random

from builders import make_inputs, make_model, make_profile, make_schedule
from hetermoe_cli.planner.instance.choice import Choice
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.train import Dispatch


def random_inputs(
    rng: random.Random, *, devices: int, layers: int, experts: int, batch: int, flat: bool = False, tight: bool = False,
    dense_layers: int = 0, top_k: int = 1, dispatch: Dispatch = "per_expert",
) -> Inputs:  # fmt: skip
    """Up to three device types on nodes of up to three devices (one each if `flat`); `tight` memory may bind."""
    dense = {"dense_layers": dense_layers, "dense_ffn_size": 96} if dense_layers else {}
    model = make_model(layers=layers, experts=experts, top_k=top_k, **dense)
    types = rng.sample(["new", "old", "older"], rng.choice([1, 2, 3]))
    nodes: list[tuple[str, int]] = []
    while (left := devices - sum(count for _, count in nodes)) > 0:
        nodes.append((rng.choice(types), 1 if flat else rng.randint(1, min(3, left))))
    memory = [10**10, 10**7, 6 * 10**6, 4 * 10**6] if tight else [10**10]
    profiles = {
        name: make_profile(
            name,
            model=model,
            attention_seconds=rng.choice([0.05, 0.3, 1.0, 3.0]),
            dense_seconds=rng.choice([0.1, 0.5, 2.0]) if dense_layers else 0.0,
            expert_seconds=rng.choice([0.002, 0.01, 0.03]),
            head_seconds=rng.choice([0.0005, 0.005, 0.05]),
            optimizer_seconds_per_parameter=rng.choice([1e-9, 1e-8, 1e-6]),
            memory_bytes=rng.choice(memory),
        )
        for name in sorted({name for name, _ in nodes})
    }

    def link() -> Link:
        bandwidth, latency = rng.choice([1e-5, 1e-4, 1e-3, 1.0]), rng.choice([0.0, 1e3, 1e5, 1e6])
        return Link(bandwidth_gigabytes_per_second=bandwidth, latency_microseconds=latency)

    return make_inputs(
        nodes,
        model=model,
        profiles=profiles,
        global_batch_sequences=batch,
        network=link(),
        interconnect=link(),
        nics=rng.choice([1, 2]),
        dispatch=dispatch,
    )


def random_choice(rng: random.Random, devices: int) -> Choice:
    """Any schedule and sequences per device."""
    sequences = [rng.choice([0, 0, 1, 1, 2]) for _ in range(devices)]
    if not any(sequences):
        sequences[rng.randrange(devices)] = 1
    name = rng.choice(["zebra", "zebra", "windowed", "sequential"])
    recompute = rng.choice(["none", "none", "none", "attention", "experts", "all", "full"])
    states = ["replicated", "replicated", "optimizer", "full", "full"]
    state = rng.choice(states[: 3 if recompute == "full" else 5])
    schedule = make_schedule(name, rng.randint(1, 4), recompute=recompute, dense_state=state)
    return Choice(schedule, tuple(sequences))


def random_counts(rng: random.Random, devices: int, layers: int, experts: int) -> list[list[int]]:
    """[layers][devices + 1] hosted experts of each device, then replicated ones; layers often alike."""
    result: list[list[int]] = []
    for _ in range(layers):
        if result and rng.random() < 0.5:
            result.append(list(result[-1]))
            continue
        if rng.random() < 0.2:
            result.append([0] * devices + [experts])
            continue
        places = rng.sample(range(devices + 1), rng.randint(1, devices + 1))
        counts = [0] * (devices + 1)
        for _ in range(experts):
            counts[rng.choice(places)] += 1
        result.append(counts)
    return result

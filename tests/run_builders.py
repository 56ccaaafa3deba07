"""Run folders as `hetermoe train` leaves them, with traces that the simulator makes from profiles known to the test.

plan = measured_plan()
write_run(folder, plan, truth=scaled_inputs(plan.inputs, {"new": {"head": 2.0}}))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from builders import make_inputs, make_layout, make_model, make_plan, make_profile
from hetermoe_cli.cost.load import RecordedLoad
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.runtime.run.recorder import load_path, trace_path
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.files import dump
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.spec.profile import KernelTable, Profile
from hetermoe_cli.spec.run import Emulation, RunSpec
from hetermoe_cli.trace import Trace

FIRST_STEP = 2  # of the traced ones; the engine traces none before it
WARM_UP = 3.0  # times as slow is the first traced step


def measured_plan(
    layout: Layout | None = None, nodes: Sequence[tuple[str, int]] = (("new", 2),), **inputs: Any
) -> Plan:
    """A plan with measured profiles in fp32; every rank attends and hosts unless a layout is given."""
    layout = layout or make_layout((1, 1), (2, 2))
    model = make_model(layers=layout.layers, experts=layout.experts)
    rates = {"new": 1.0, "old": 3.0}
    profiles = {
        name: make_profile(
            name, model=model, precision="fp32", source="measured", attention_seconds=slow, expert_seconds=0.01 * slow
        )
        for name, slow in rates.items()
        if name in dict(nodes)
    }
    batch = layout.sequences_per_micro_batch * layout.micro_batches
    given = {"model": model, "profiles": profiles, "precision": "fp32", "global_batch_sequences": batch, **inputs}
    return make_plan(make_inputs(nodes, **given), layout)


def scaled_profile(profile: Profile, ratios: Mapping[str, float]) -> Profile:
    """`profile` with the seconds of every kind of task multiplied."""

    def points(table: KernelTable, field: str, forward: str, backward: str) -> list[Any]:
        return [
            point.model_copy(
                update={
                    "forward_seconds": point.forward_seconds * ratios.get(forward, 1.0),
                    "backward_seconds": point.backward_seconds * ratios.get(backward, 1.0),
                }
            )
            for point in getattr(table, field)
        ]

    tables = [
        table.model_copy(
            update={
                "attention": points(table, "attention", "attention forward", "attention backward"),
                "expert": points(table, "expert", "expert forward", "expert backward"),
                "head": points(table, "head", "head", "head"),
                "optimizer_seconds_per_parameter": table.optimizer_seconds_per_parameter * ratios.get("optimizer", 1.0),
            }
        )
        for table in profile.tables
    ]
    return profile.model_copy(update={"tables": tables})


def scaled_inputs(inputs: Inputs, ratios: Mapping[str, Mapping[str, float]]) -> Inputs:
    """`inputs` whose devices are really slower, by device type and kind of task."""
    profiles = {name: scaled_profile(profile, ratios.get(name, {})) for name, profile in inputs.profiles.items()}
    return inputs.model_copy(update={"profiles": profiles})


def write_run(
    folder: Path,
    plan: Plan,
    truth: Inputs | None = None,
    *,
    steps: int = 4,
    emulated_scale: float | None = None,
    loads: bool = True,
    router: Literal["learned", "balanced"] = "learned",
) -> Path:
    """A finished run of `plan` whose devices are those of `truth` and whose router is skewed by a fixed seed.

    With `emulated_scale` an emulated one, all of whose seconds are multiplied by it.
    """
    executed: dict[str, Any] = {"executed": plan.inputs.model, "sequence_length": plan.inputs.train.sequence_length}
    run = RunSpec(
        plan=plan,
        folder=str(folder),
        corpus_sha256="0",
        precision="fp32",
        steps=FIRST_STEP + steps,
        router=router,
        emulation=Emulation(**executed, time_scale=emulated_scale) if emulated_scale else None,
    )
    dump(run, folder / "run.yaml")
    counts = _counts(plan, run.steps)
    if loads:
        for rank in plan.world.attending:
            path = load_path(folder, rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, counts[rank])
    replayed, scale = replay_groups(truth or plan.inputs, plan.groups), emulated_scale or 1.0
    origin: Any = "emulated" if emulated_scale else "measured"
    traces = [Trace(origin) for _ in range(plan.world.size)]
    for step in range(FIRST_STEP, run.steps):
        slow = scale * (WARM_UP if step == FIRST_STEP and steps > 1 else 1.0)
        loads = [RecordedLoad(np.array([counts[r][step] for r in c.processes]), 1.0) for c in plan.world.replicas]
        ready = [replayed.ready(number, load) for number, load in zip(replayed.copies, loads, strict=True)]
        for number, load, copy, own in zip(replayed.copies, loads, plan.world.replicas, ready, strict=True):
            wait = max(ready) - own  # in S, for the other copies
            for span in simulate(replayed.cost_of(number, load, waits=False)).spans:
                late = [wait * span.name.startswith("optimizer"), wait * span.name.startswith(("sync", "optimizer"))]
                start, end = slow * (span.start + late[0]), slow * (span.end + late[1])
                there = span._replace(rank=copy.processes[span.rank], start=start, end=end, step=step)
                traces[there.rank].spans.append(there)
    for rank, trace in enumerate(traces):
        trace.write(trace_path(folder, rank))
    return folder


def _counts(plan: Plan, steps: int) -> dict[int, np.ndarray[Any, np.dtype[np.int32]]]:
    """By rank, [steps, layers, micro-batches, experts] rows that a skewed router sends."""
    train, model, result = plan.inputs.train, plan.inputs.model, {}
    random = np.random.default_rng(0)
    for copy in plan.world.replicas:
        layout = copy.layout
        rows = [count * train.sequence_length * model.top_k for count in layout.sequences_per_rank]
        shares = random.dirichlet(np.ones(layout.experts), size=(steps, layout.layers, layout.micro_batches))
        shares = (shares + 1) / (1 + layout.experts)  # a token visits an expert once at most
        sent = [random.multinomial(count, shares).astype(np.int32) for count in rows]
        for counts, shift in zip(sent, layout.shifts, strict=False):  # none but those where there are any
            counts[:, :, [j for j in range(layout.micro_batches) if j not in shift]] = 0
        result |= zip(copy.processes, sent, strict=True)
    return result

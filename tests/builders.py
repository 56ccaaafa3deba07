"""Synthetic specs for tests: every kernel is linear through the origin, so that timelines can be computed by hand.

inputs = make_inputs(nodes=(("new", 1), ("old", 1)))
layout = make_layout(sequences=(1, 0), hosted=(0, 4))
plan = make_plan(inputs, layout)
"""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, Literal, get_args

from hypothesis import strategies as st

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import UserError
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.schedule.action import Action, parse_action
from hetermoe_cli.schedule.schedule import Schedule
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import ClusterSpec, Link, NodeGroup
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import LayerPlacement, Layout, PipelineStage
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.plan import Bound, Group, Plan, Prediction, SolverReport
from hetermoe_cli.spec.profile import (
    AttentionPoint,
    DensePoint,
    DeviceFacts,
    ExpertPoint,
    HeadPoint,
    KernelTable,
    Precision,
    Profile,
)
from hetermoe_cli.spec.schedule_choice import ExpertOrder, PassOrder, ScheduleChoice, ScheduleName, TransferOrder
from hetermoe_cli.spec.train import DenseState, Dispatch, Recompute, TrainSpec

DAY = date(2026, 11, 24)
BACKWARD = 2.0  # every backward takes this many forwards
GIGABYTE = 1e9


def make_model(*, layers: int = 2, experts: int = 4, top_k: int = 2, **other: Any) -> ModelConfig:
    """A model of 64 hidden units; `other` replaces any field."""
    fields = {
        "name": "synthetic",
        "hidden_size": 64,
        "ffn_size": 224,
        "attention_heads": 4,
        "kv_heads": 2,
        "head_size": 16,
        "vocab_size": 256,
        **other,
    }
    return ModelConfig(layers=layers, experts=experts, top_k=top_k, **fields)


def make_profile(
    device: str = "new",
    *,
    model: ModelConfig | None = None,
    sequence_lengths: Sequence[int] = (64,),
    attention_seconds: float = 1.0,
    dense_seconds: float = 1.5,
    expert_seconds: float = 0.01,
    head_seconds: float = 0.005,
    optimizer_seconds_per_parameter: float = 1e-6,
    saved_bytes: int = 100,
    head_saved_bytes: int = 100,
    precision: Precision = "fp16",
    memory_bytes: int = 10**10,
    source: Literal["measured", "modelled"] = "modelled",
    accelerator: Literal["cpu", "cuda"] = "cpu",
) -> Profile:
    """Forward seconds per sequence (attention; a dense layer, if the model has any), per row (expert) and per token
    (head); backward is twice as long.

    `saved_bytes` is kept per token by attention or a dense layer and per row by an expert, `head_saved_bytes` per
    token by the head.
    """

    def timing(seconds: float, kept: int) -> dict[str, Any]:
        return {"forward_seconds": seconds, "backward_seconds": BACKWARD * seconds, "saved_bytes": kept}

    shape = (model or make_model()).shape
    sizes = [{"sequence_length": length, "sequences": n} for length in sequence_lengths for n in (1, 2, 4)]

    def by_size(size: Mapping[str, int], seconds: float) -> dict[str, Any]:
        n, length = size["sequences"], size["sequence_length"]
        return {**size, **timing(n * seconds, saved_bytes * n * length)}

    table = KernelTable(
        shape=shape,
        precision=precision,
        attention=[AttentionPoint(**by_size(size, attention_seconds)) for size in sizes],
        dense=[DensePoint(**by_size(size, dense_seconds)) for size in sizes if shape.dense_ffn_size],
        expert=[ExpertPoint(tokens=n, **timing(n * expert_seconds, saved_bytes * n)) for n in (16, 64, 256)],
        head=[HeadPoint(tokens=n, **timing(n * head_seconds, head_saved_bytes * n)) for n in (64, 256)],
        optimizer_seconds_per_parameter=optimizer_seconds_per_parameter,
    )
    return Profile(
        device=device,
        accelerator=accelerator,
        source=source,
        date=DAY,
        facts=DeviceFacts(),
        memory_bytes=memory_bytes,
        framework_bytes=10**6,
        tables=[table],
    )


def make_inputs(
    nodes: Sequence[tuple[str, int]] = (("new", 1), ("old", 1)),
    *,
    model: ModelConfig | None = None,
    profiles: Mapping[str, Profile] | None = None,
    sequence_length: int = 64,
    global_batch_sequences: int = 2,
    precision: Precision = "fp16",
    network: Link | None = None,
    interconnect: Link | None = None,
    nics: int = 1,
    dispatch: Dispatch = "per_expert",
) -> Inputs:
    """Inputs of a cluster of `nodes` (device type, devices). Links are 1 GB/s without latency unless given.

    Without `profiles`, every type but "old" is twice as fast at experts and four times at attention as "old".
    """
    model = model or make_model()
    link = Link(bandwidth_gigabytes_per_second=1.0, latency_microseconds=0.0)
    cluster = ClusterSpec(
        name="synthetic",
        nodes=[
            NodeGroup(
                name=f"node{index}",
                device=device,
                devices=count,
                nics=min(nics, count),
                network=network or link,
                interconnect=interconnect or link,
            )
            for index, (device, count) in enumerate(nodes)
        ],
    )
    slow = {"attention_seconds": 4.0, "expert_seconds": 0.02, "head_seconds": 0.02}
    if profiles is None:
        profiles = {
            name: make_profile(
                name,
                model=model,
                sequence_lengths=(sequence_length,),
                precision=precision,
                **(slow if name == "old" else {}),  # type: ignore[arg-type]
            )
            for name in cluster.device_types
        }
    train = TrainSpec(
        sequence_length=sequence_length,
        global_batch_sequences=global_batch_sequences,
        precision=precision,
        dispatch=dispatch,
    )
    return Inputs(model=model, cluster=cluster, links={}, profiles=dict(profiles), train=train)


def make_schedule(
    name: ScheduleName,
    micro_batches: int,
    *,
    experts: ExpertOrder = "after",
    transfers: TransferOrder = "layered",
    recompute: Recompute = "none",
    dense_state: DenseState = "replicated",
    dispatch: Dispatch = "per_expert",
    passes: PassOrder = "in_turn",
) -> ScheduleChoice:
    """A schedule by name; windows of the largest size that leaves several."""
    widths = {"zebra": micro_batches, "sequential": 1}
    widths["windowed"] = max([w for w in range(1, micro_batches) if not micro_batches % w], default=1)
    return ScheduleChoice(
        micro_batches=micro_batches,
        window=widths[name],
        experts=experts,
        transfers=transfers,
        recompute=recompute,
        dense_state=dense_state,
        dispatch=dispatch,
        passes=passes,
    )


def make_layout(
    sequences: Sequence[int] = (1, 0),
    hosted: Sequence[int] = (0, 4),
    *,
    replicated: int = 0,
    layers: int = 2,
    micro_batches: int = 2,
    schedule: ScheduleName = "zebra",
    expert_order: ExpertOrder = "after",
    recompute: Recompute = "none",
    dense_state: DenseState = "replicated",
) -> Layout:
    """Sequences and hosted experts per rank, equal in all layers; expert numbers follow the ranks, replicated last."""
    experts: list[list[int]] = []
    for count in hosted:
        first = sum(map(len, experts))
        experts.append(list(range(first, first + count)))
    total = sum(hosted)
    placement = LayerPlacement(experts=experts, replicated=list(range(total, total + replicated)))
    return Layout(
        schedule=make_schedule(
            schedule, micro_batches, experts=expert_order, recompute=recompute, dense_state=dense_state
        ),
        sequences_per_rank=list(sequences),
        placement=[placement] * layers,
    )


def make_cost(layout: Layout, nodes: Sequence[tuple[str, int]] | None = None, **inputs: Any) -> LayoutCost:
    """LayoutCost of `layout` on `nodes` (one "new" device a node unless given); `inputs` go to make_inputs."""
    nodes = nodes or [("new", 1)] * layout.world_size
    inputs.setdefault("model", make_model(layers=layout.layers, experts=layout.experts, top_k=1))
    inputs.setdefault("global_batch_sequences", layout.sequences_per_micro_batch * layout.micro_batches)
    return LayoutCost(CostModel(make_inputs(nodes, **inputs)), layout)


def make_plan(inputs: Inputs | None = None, layout: Layout | None = None) -> Plan:
    """A plan of `layout` with the simulator's prediction; bounds, gap and solver are stand-ins."""
    inputs, layout = inputs or make_inputs(), layout or make_layout()
    cost = LayoutCost(CostModel(inputs), layout)
    trace = simulate(cost)
    return Plan(
        date=DAY,
        assignment="manual",
        groups=[Group.of(layout, [list(range(layout.world_size))])],
        predicted=Prediction.of(inputs.train, trace.seconds, trace.busy_share(layout.world_size), trace.seconds),
        bound=Bound(iteration_seconds=0.0, work_iteration_seconds=0.0, exact_over="not solved"),
        gap=0.0,
        memory=[cost.memory(rank) for rank in range(layout.world_size)],
        baselines={},
        solver=SolverReport(name="none", status="manual", seconds=0.0),
        inputs=inputs,
        inputs_sha256=inputs.hashes(),
    )


def make_groups_plan(inputs: Inputs, *groups: tuple[Layout, Sequence[list[int]]]) -> Plan:
    """A plan of several layouts with the ranks of each copy, predicted by their replay."""
    size, model = inputs.cluster.world_size, inputs.model
    alone = [[count, *[0] * (size - 1)] for count in (inputs.train.global_batch_sequences, model.experts)]
    whole = make_plan(inputs, make_layout(*alone, layers=model.layers, micro_batches=1))
    found = [Group.of(layout, list(replicas)) for layout, replicas in groups]
    replayed = replay_groups(inputs, found)
    predicted = whole.predicted.model_copy(
        update={"iteration_seconds": replayed.seconds, "busy_share_per_rank": replayed.busy_share(size)}
    )
    memory = replayed.memory(CostModel(inputs))
    changes = {"groups": found, "predicted": predicted, "memory": memory, "max_groups": None}
    return Plan.model_validate(whole.model_copy(update=changes).model_dump())


def _schedule(
    draw: st.DrawFn,
    schedules: Sequence[ScheduleName],
    orders: Sequence[ExpertOrder],
    most: int,
    recompute: Recompute,
    states: Sequence[DenseState],
) -> ScheduleChoice:
    """Any legal one of up to `most` micro-batches."""
    experts, transfers = draw(st.sampled_from(orders)), draw(st.sampled_from(get_args(TransferOrder)))
    state = draw(st.sampled_from(states))
    weaves = (experts, transfers) == ("after", "layered") and state != "full"
    return make_schedule(
        draw(st.sampled_from(schedules)),
        draw(st.integers(1, most)),
        experts=experts,
        transfers=transfers,
        recompute=recompute,
        dense_state=state,
        passes=draw(st.sampled_from(get_args(PassOrder) if weaves else ["in_turn"])),
    )


@st.composite
def layouts(
    draw: st.DrawFn,
    schedules: Sequence[ScheduleName] = ("zebra", "windowed", "sequential"),
    orders: Sequence[ExpertOrder] = ("after", "between"),
) -> Layout:
    """Any legal layout of up to 5 ranks, 4 layers, 4 micro-batches and 5 experts."""
    world = draw(st.integers(1, 5))
    experts = draw(st.integers(1, 5))
    replicated = -1
    host = st.integers(replicated, world - 1)
    placement = []
    for hosts in draw(st.lists(st.lists(host, min_size=experts, max_size=experts), min_size=1, max_size=4)):
        by_rank = [[e for e, rank in enumerate(hosts) if rank == r] for r in range(world)]
        everywhere = [e for e, rank in enumerate(hosts) if rank == replicated]
        placement.append(LayerPlacement(experts=by_rank, replicated=everywhere))
    recompute: Recompute = draw(st.sampled_from(get_args(Recompute)))
    states = [state for state in get_args(DenseState) if (recompute, state) != ("full", "full")]
    return Layout(
        schedule=_schedule(draw, schedules, orders, 4, recompute, states),
        sequences_per_rank=draw(st.lists(st.integers(0, 2), min_size=world, max_size=world).filter(any)),
        placement=placement,
    )


@st.composite
def pipelines(draw: st.DrawFn) -> Layout:
    """Any legal layout of 2 or 3 pipeline stages of up to 2 layers and 3 ranks each; stages have ranks in any order."""
    count, experts, sequences = draw(st.integers(2, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    order = draw(st.permutations(range(sum(sizes))))
    shares, stages, placement = [0] * sum(sizes), [], []
    for size in sizes:
        ranks, order = order[:size], order[size:]
        own = draw(st.sampled_from([None, *get_args(Recompute)]))
        stages.append(PipelineStage(layers=draw(st.integers(1, 2)), ranks=ranks, recompute=own))
        for _ in range(sequences):
            shares[draw(st.sampled_from(ranks))] += 1
        for _ in range(stages[-1].layers):
            hosts = draw(st.lists(st.sampled_from([-1, *ranks]), min_size=experts, max_size=experts))
            by_rank = [[e for e, host in enumerate(hosts) if host == rank] for rank in range(sum(sizes))]
            everywhere = [e for e, host in enumerate(hosts) if host == -1]
            placement.append(LayerPlacement(experts=by_rank, replicated=everywhere))
    recompute = draw(st.sampled_from(get_args(Recompute)))
    schedule = _schedule(draw, get_args(ScheduleName), get_args(ExpertOrder), 6, recompute, ["replicated", "optimizer"])
    return Layout(schedule=schedule, sequences_per_rank=shares, placement=placement, pipeline=stages)


@st.composite
def in_shifts(draw: st.DrawFn) -> Layout:
    """Any legal layout whose ranks attend in turn: up to 3 posts of 1 or 2 sequences, each of which one of its ranks
    takes in every micro-batch. A rank that never does attends to nothing."""
    world, experts = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    states: list[DenseState] = ["replicated", "optimizer"]
    schedule = _schedule(
        draw, get_args(ScheduleName), get_args(ExpertOrder), 4, draw(st.sampled_from(get_args(Recompute))), states
    )
    posts = draw(st.lists(st.integers(0, 3), min_size=world, max_size=world).filter(any))  # 0: none
    sizes = [0, *draw(st.lists(st.integers(1, 2), min_size=3, max_size=3))]
    shifts: list[list[int]] = [[] for _ in range(world)]
    for post in {*posts} - {0}:
        ranks = [rank for rank, own in enumerate(posts) if own == post]
        for micro_batch in range(schedule.micro_batches):
            shifts[draw(st.sampled_from(ranks))].append(micro_batch)
    placement = []
    for _ in range(draw(st.integers(1, 3))):
        hosts = draw(st.lists(st.integers(0, world - 1), min_size=experts, max_size=experts))
        by_rank = [[e for e, host in enumerate(hosts) if host == rank] for rank in range(world)]
        placement.append(LayerPlacement(experts=by_rank))
    return Layout(
        schedule=schedule.model_copy(update={"passes": "in_turn"}),
        sequences_per_rank=[sizes[post] if shift else 0 for post, shift in zip(posts, shifts, strict=True)],
        placement=placement,
        shifts=shifts,
    )


@st.composite
def with_heads(draw: st.DrawFn) -> Layout:
    """Any legal layout, with pipeline stages, with shifts or without, of which some ranks compute the head."""
    found = draw(st.one_of(layouts(), pipelines(), in_shifts()))
    schedule, ranks = found.schedule, found.spans[-1].ranks
    shares = draw(st.lists(st.integers(0, 3), min_size=len(ranks), max_size=len(ranks)).filter(any))
    state = "replicated" if schedule.dense_state == "full" else schedule.dense_state
    head = [0] * found.world_size
    for rank, share in zip(ranks, shares, strict=True):
        head[rank] = share
    schedule = schedule.model_copy(update={"dense_state": state, "passes": "in_turn"})
    return Layout.model_validate(found.model_dump() | {"schedule": schedule.model_dump(), "head": head})


def any_layouts() -> st.SearchStrategy[Layout]:
    """With pipeline stages, with shifts, with heads apart, or without."""
    return st.one_of(layouts(), pipelines(), in_shifts(), with_heads())


def parse_schedule(text: str) -> Schedule:
    """Inverse of str(schedule); UserError names the line that does not parse."""
    compute: list[tuple[Action, ...]] = []
    transfers: list[Action] = []
    senders: dict[Action, tuple[int, ...]] = {}
    receivers: dict[Action, tuple[int, ...]] = {}
    after: dict[Action, Action] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            head, body = line.split(":", 1)
            word, name = head.split()
            if word == "rank" and int(name) == len(compute):
                compute.append(tuple(map(parse_action, body.split())))
            elif word == "transfer":
                action = parse_action(name)
                body, *first = body.split(" after ")
                left, right = body.split(">")
                transfers.append(action)
                if first:
                    after[action] = parse_action(first[0].strip())
                senders[action] = tuple(int(rank) for rank in left.split(","))
                receivers[action] = tuple(int(rank) for rank in right.split(","))
            else:
                raise ValueError(line)
        except ValueError as error:
            raise UserError(f"schedule: line {number} does not parse: {line!r}") from error
    return Schedule(tuple(compute), tuple(transfers), senders, receivers, after)


def sequential(micro_batches: int, *, recompute: Recompute = "none") -> ScheduleChoice:
    """One micro-batch after another, nothing overlapped."""
    return ScheduleChoice(micro_batches=micro_batches, window=1, recompute=recompute)

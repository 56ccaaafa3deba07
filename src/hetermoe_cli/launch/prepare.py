"""From a plan and options to a RunSpec: everything is checked here, before a single worker starts."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from hetermoe_cli.errors import UserError
from hetermoe_cli.launch.local import RUN_FILE
from hetermoe_cli.launch.preflight import check_devices, check_measured, check_nodes
from hetermoe_cli.launch.started import started_plan
from hetermoe_cli.model.data.corpus import VOCAB_SIZE, Batches, Corpus, corpus_of
from hetermoe_cli.planner.cluster.replayed import group_cost
from hetermoe_cli.runtime.run.recorder import CHECKPOINTS, METRICS
from hetermoe_cli.runtime.transfers.call_check import check
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.model import ROUTER_FIELDS, ModelConfig
from hetermoe_cli.spec.plan import Group, Plan
from hetermoe_cli.spec.profile import Precision
from hetermoe_cli.spec.run import Emulation, RunSpec

SHORTEST_EMULATED_SECONDS = 0.013  # of common tasks: four processes share few cores, and what overruns adds up
LEAST_EMULATED_SECONDS = 0.004  # of rare ones: below about 2 ms real work overruns its target
SHORT_SHARE = 0.04  # of a rank's compute that rare short tasks may take
SHORTEST_EMULATED_STEP = 1.5  # of a rank's compute in the mean: norm, figures and optimizer overrun by 10 ms together
PASSES = 1.3  # times as long; 1.03 % of an emulated iteration overran without it (make demo, an EPYC)


@dataclass(frozen=True)
class EmulateOptions:
    """What an emulated run really trains. None: a small model of the plan's layers, experts and top-k."""

    executed: ModelConfig | None = None
    sequence_length: int = 64
    time_scale: float | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True)
class TrainOptions:
    """Options of `hetermoe train` after parsing."""

    folder: Path
    sources: list[Path] = field(default_factory=list)
    steps: int | None = None
    router: str = "learned"
    checkpoint_every: int = 0
    validate_every: int = 0
    validation_batches: int = 4
    trace_steps: int = 5
    resume: bool = False
    weights: Path | None = None
    drift_every: int = 20
    rebalance: bool = False
    emulate: EmulateOptions | None = None


def load_plan(path: Path) -> Plan:
    """The plan in a file, on the devices that it uses; UserError if it is not as it was written."""
    plan = load(Plan, path)
    plan.verify(str(path))
    return started_plan(plan)


def prepare(plan: Plan, source: Path, options: TrainOptions, node: int | None = 0, *, leads: bool = True) -> RunSpec:
    """Check everything that can be checked without workers; UserError names the first problem. Writes nothing.

    `plan`: of `load_plan(source)`. `node`: which one this machine is; None: none of them, so that its devices do not
    matter. Only the leader reads through the checkpoint of a resumed run.
    """
    _check_groups(plan, source)
    check(plan.world, plan.inputs.train.precision)
    emulation = _emulation(plan, options.emulate) if options.emulate else None
    precision = options.emulate.precision if options.emulate else plan.inputs.train.precision
    if not emulation:
        check_measured(plan)
        check_nodes(plan)
        if node is not None:
            check_devices(plan, node)
    corpus = corpus_of(options.sources, plan.inputs.train)
    resume_from = _resume_point(options)
    weights = None if resume_from else options.weights or (_earlier_weights(options.folder) if options.resume else None)
    run = RunSpec(
        plan=plan,
        folder=str(options.folder.resolve()),
        sources=[str(source.resolve()) for source in options.sources],
        corpus_sha256=corpus.digest,
        precision=precision,
        router="balanced" if options.router == "balanced" else "learned",
        steps=options.steps or plan.inputs.train.steps,
        weights_from=str(weights.resolve()) if weights else None,
        resume_from=resume_from,
        checkpoint_every=options.checkpoint_every,
        validate_every=options.validate_every,
        validation_batches=options.validation_batches,
        trace_steps=options.trace_steps,
        drift_every=options.drift_every,
        rebalance=options.rebalance,
        emulation=emulation,
    )
    _check_text(run, corpus)
    if weights:
        _check_weights(run, weights)
    if run.resume_from and leads:
        from hetermoe_cli.runtime.run.saving import check_resumable, resumed_placement  # loads torch

        run = run.model_copy(update={"start_step": check_resumable(run), "rebalanced": resumed_placement(run)})
    return run


def _check_groups(plan: Plan, source: Path) -> None:
    if plan.group_count == 1:
        return
    states = {group.schedule.dense_state for group in plan.groups}
    if len(states) > 1 and "optimizer" in states:
        raise UserError(
            f"{source}: field groups: dense_state {', '.join(sorted(states))}: optimizer states are shared out over "
            "all groups or none: plan with one train.dense_state (not auto), or with --max-groups 1"
        )


def _check_text(run: RunSpec, corpus: Corpus) -> None:
    model, train = run.model, run.plan.inputs.train
    if corpus.is_text and model.vocab_size < VOCAB_SIZE:
        raise UserError(f"model {model.name}: field vocab_size: bytes need {VOCAB_SIZE}, found {model.vocab_size}")
    if train.documents == "masked" and train.document_end >= model.vocab_size:
        raise UserError(
            f"training spec: field document_end: {train.document_end} is no token of model {model.name}, whose "
            f"vocab_size is {model.vocab_size}"
        )
    for part in (corpus.train, corpus.validation):
        size = (run.sequence_length, train.global_batch_sequences, train.seed, corpus.source, model.vocab_size)
        Batches(part, *size).check(0)


def _check_weights(run: RunSpec, folder: Path) -> None:
    from hetermoe_cli.model.weights.hugging_face import Weights  # loads torch

    Weights(folder, run.model)


def _resume_point(options: TrainOptions) -> str | None:
    """The newest checkpoint; None: the run begins, also where one has ended before its first checkpoint."""
    folder = options.folder
    if options.resume:
        from hetermoe_cli.model.weights.checkpoint import find_latest  # loads torch

        latest = find_latest(folder / CHECKPOINTS)
        return str(latest.resolve()) if latest else None
    if (folder / METRICS).exists():
        raise UserError(f"{folder}: holds a run already: continue it with --resume, or name another --run-folder")
    return None


def _earlier_weights(folder: Path) -> Path | None:
    """What the run in `folder` began with, of which nothing was saved: it begins again with the same."""
    path = folder / RUN_FILE
    found = load(RunSpec, path).weights_from if path.exists() else None
    return Path(found) if found else None


def _emulation(plan: Plan, options: EmulateOptions) -> Emulation:
    executed = options.executed or small_model(plan.inputs.model)
    scale = options.time_scale or automatic_time_scale(plan)
    emulation = Emulation(executed=executed, sequence_length=options.sequence_length, time_scale=scale)
    if problem := emulation.mismatch(plan.inputs.model):
        raise UserError(f"model {executed.name}: field {problem}: name one like it with --executed, or none")
    return emulation


def small_model(nominal: ModelConfig) -> ModelConfig:
    """A model of the same numbers of layers and experts, and the same router, that a few CPU cores train quickly."""
    return ModelConfig(
        name=f"{nominal.name}-executed",
        layers=nominal.layers,
        dense_layers=nominal.dense_layers,
        dense_ffn_size=224 if nominal.dense_layers else 0,
        hidden_size=64,
        ffn_size=224,
        attention_heads=4,
        kv_heads=2,
        head_size=16,
        experts=nominal.experts,
        top_k=nominal.top_k,
        vocab_size=VOCAB_SIZE,
        **{name: getattr(nominal, name) for name in ROUTER_FIELDS},
    )


def automatic_time_scale(plan: Plan) -> float:
    """Seconds of an emulated run per nominal second, such that real work ends before its targets.

    SHORTEST_EMULATED_SECONDS for all attention and expert tasks but the shortest ones, which together take at most
    SHORT_SHARE of any rank's; those get LEAST_EMULATED_SECONDS. And SHORTEST_EMULATED_STEP for all of a rank's, else
    what a step does besides, which nothing stretches, would be too large a share. All of it PASSES times as long where
    the head is apart: last combines are tasks of their own there, and no profile has seconds for them.
    """
    return max(_group_time_scale(plan.inputs, group) for group in plan.groups)


def _group_time_scale(inputs: Inputs, group: Group) -> float:
    from hetermoe_cli.cost.layout import LayoutCost
    from hetermoe_cli.cost.load import balanced_load
    from hetermoe_cli.schedule.action import Kind

    model, layout, scale = group_cost(inputs, group), group.layout, 0.0
    cost = LayoutCost(model, layout, balanced_load(model, layout))  # an expert may be assumed to get no row
    everything = 0.0
    for rank, order in enumerate(training_schedule(layout).compute):
        tasks = sorted(cost.seconds(rank, a) for a in order if a.kind in (Kind.ATTENTION, Kind.EXPERT))
        sums = itertools.accumulate(tasks)
        everything += sum(tasks)
        common = next((task for task, taken in zip(tasks, sums, strict=True) if taken > SHORT_SHARE * sum(tasks)), None)
        if common is not None:
            scale = max(scale, SHORTEST_EMULATED_SECONDS / common, LEAST_EMULATED_SECONDS / tasks[0])
    scale = max(scale, SHORTEST_EMULATED_STEP * layout.world_size / everything)
    return scale * PASSES if layout.head else scale

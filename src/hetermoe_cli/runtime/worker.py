"""A worker: `python -m hetermoe_cli.runtime.worker RUN.yaml`, started by a torch.distributed launcher.

It reads run.yaml and the launcher's environment, and nothing else. It never profiles or guesses, and plans nothing but
new places for experts, on rank 0 and only where the run asks for it (`rebalance`).
"""

import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Until there is a step to finish (_handle_signals), Ctrl-C ends a worker at once. Python's KeyboardInterrupt gets
    # lost while torch is imported, and comes ten minutes late where torch waits for others to join that have ended.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.distributed as dist

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.model.data.corpus import Batches, corpus_of
from hetermoe_cli.model.warm_up import warm_up
from hetermoe_cli.runtime.clocks.moment import common_moment
from hetermoe_cli.runtime.machine.cores import bind
from hetermoe_cli.runtime.machine.leaving import follow_parent, leave, leave_after
from hetermoe_cli.runtime.machine.mesh import Mesh, join
from hetermoe_cli.runtime.machine.peers import PeerLost, peer_errors
from hetermoe_cli.runtime.modules.parts import DTYPES
from hetermoe_cli.runtime.run.memory import MemoryMeter
from hetermoe_cli.runtime.run.recorder import Recorder
from hetermoe_cli.runtime.run.saving import restore, save, take_weights
from hetermoe_cli.runtime.step.trainer import StepResult, Trainer
from hetermoe_cli.runtime.transfers.calls import check_agreement, digest
from hetermoe_cli.schedule.lower import training_schedules
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.run import RunSpec
from hetermoe_cli.trace import Trace

if TYPE_CHECKING:
    from hetermoe_cli.runtime.run.balancer import Balancer

WARM_UP_STEPS = 2  # not traced
SHARED_MEMORY = "HETERMOE_SHARED_MEMORY"  # 0: messages between CPUs of one machine go over gloo, as between machines


def main() -> None:
    """Run, and leave with a documented exit code; a lane may be blocked in a message, so failures exit hard."""
    try:
        follow_parent()
        train(load(RunSpec, Path(sys.argv[1])))
    except UserError as error:
        leave(f"hetermoe: error: {error}", error.code)
    except PeerLost as error:
        leave_after(error)
    except BaseException:
        leave(traceback.format_exc(), 1)
    sys.stderr.flush()
    os._exit(int(ExitCode.DONE))  # everything is written; the interpreter's own end may abort in a thread of torch


def train(run: RunSpec) -> None:
    """The whole run of one rank."""
    torch.set_num_threads(run.threads_per_rank)
    mesh, world = _join(run), run.world
    check_agreement(mesh.agree(digest(training_schedules(world), world, run.precision)))
    spec = run.plan.inputs.train.model_copy(update={"steps": run.steps})
    reads = world.replica_of(mesh.process).layout.has_dense(mesh.rank)
    batches = _batches(run) if reads else (None, None)
    warm_up(mesh.device, DTYPES[run.rank_precisions[mesh.process]])
    meter = MemoryMeter(mesh.device)
    trainer = Trainer.build(
        run.model,
        world,
        spec,
        mesh,
        sequence_length=run.sequence_length,
        precision=run.precision,
        rank_precisions=run.rank_precisions,
        router=run.router,
    )
    if run.resume_from:
        restore(run, trainer)
    elif run.weights_from:
        take_weights(run, trainer)
    recorder = Recorder(run, mesh.process)
    if run.emulation:
        from hetermoe_cli.runtime.clocks.emulator import EmulatedClock  # loads the planner

        copy, _ = world.seat(mesh.process)
        trainer.clock = EmulatedClock(run, training_schedules(world)[copy], mesh.process)
    _handle_signals(trainer)
    trainer.clock.set_zero(common_moment(mesh.wire, run.nodes))
    _loop(run, trainer, recorder, batches, meter)
    recorder.memory(meter.values())
    dist.destroy_process_group()


def _join(run: RunSpec) -> Mesh:
    """On the device that the plan gives this rank: NCCL where all are CUDA, gloo through the hosts where some are."""
    kinds = ["cpu"] if run.emulation else run.plan.inputs.accelerators()
    rank = min(int(os.environ.get("RANK", "0")), len(kinds) - 1)  # join refuses a rank too many
    if "cuda" not in kinds:
        bind(run.threads_per_rank)  # before there are threads that wait for messages
    device = f"cuda:{run.plan.inputs.device_index(rank)}" if kinds[rank] == "cuda" else "cpu"
    shares = os.environ.get(SHARED_MEMORY, "1") != "0"
    return join(run.world, device, "gloo" if "cpu" in kinds else "nccl", shares=shares)


def _batches(run: RunSpec) -> tuple[Batches, Batches]:
    train = run.plan.inputs.train
    corpus = corpus_of([Path(source) for source in run.sources], train, run.validation_share)
    if corpus.digest != run.corpus_sha256:
        raise UserError(
            f"{corpus.source}: field corpus_sha256: the text differs from the one this run was prepared for"
        )
    size = (run.sequence_length, train.global_batch_sequences, train.seed, corpus.source, run.model.vocab_size)
    return Batches(corpus.train, *size), Batches(corpus.validation, *size)


def _handle_signals(trainer: Trainer) -> None:
    """Ctrl-C or a termination asks for a stop; all ranks agree on the step in the next synchronisation."""

    def request(number: int, frame: FrameType | None) -> None:
        trainer.stop_requested = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, request)


def _loop(
    run: RunSpec,
    trainer: Trainer,
    recorder: Recorder,
    batches: tuple[Batches | None, Batches | None],
    meter: MemoryMeter,
) -> None:
    (training, validation), start = batches, run.start_step
    traced = range(start + WARM_UP_STEPS, start + WARM_UP_STEPS + run.trace_steps)
    saved, step, stop, now = start, start, False, run  # now: with experts where they are
    balancer = _balancer(run, trainer, recorder)
    while step < run.steps and not stop:
        began = time.monotonic()
        with meter.step():
            result = trainer.step(training, step, record=step in traced and now is run)
        recorder.load(step, trainer.engine.counts)
        _report(now, recorder, step, result, time.monotonic() - began)
        step += 1
        stop = result.stop and step < run.steps  # nothing is left to go on with after the last one
        if balancer and step < run.steps and not stop:
            balancer.after(step, result)
            now = balancer.run
        if run.validate_every and step % run.validate_every == 0 and step < run.steps and not stop:
            recorder.event("validation", step - 1, loss=_finite(trainer.validate(validation, run.validation_batches)))
        if stop or step == run.steps or (run.checkpoint_every and step % run.checkpoint_every == 0):
            folder = save(now, trainer, step)
            recorder.event("checkpoint", step - 1, folder=str(folder))
            saved = step
    recorder.trace(Trace("emulated" if run.emulation else "measured", trainer.clock.spans, trainer.clock.starts))
    values = _summary(run, trainer) | {"saved_step": saved}
    if not stop:
        values["validation_loss"] = _finite(trainer.validate(validation, run.validation_batches))
        recorder.event("validation", step - 1, loss=values["validation_loss"])
    recorder.status("interrupted" if stop else "finished", step, **values)


def _balancer(run: RunSpec, trainer: Trainer, recorder: Recorder) -> "Balancer | None":
    """None where the run ends before a comparison: then the planner need not be loaded."""
    every = run.drift_every
    if not every or (run.steps - 1) // every == run.start_step // every:
        return None
    from hetermoe_cli.runtime.run.balancer import Balancer

    return Balancer(run, trainer, recorder)


def _report(run: RunSpec, recorder: Recorder, step: int, result: StepResult, seconds: float) -> None:
    shares = result.expert_rows / result.expert_rows.mean(axis=1, keepdims=True)
    highest, lowest = shares.max(axis=1), shares.min(axis=1)
    recorder.event(
        "step",
        step,
        loss=_finite(result.loss),
        auxiliary_loss=_finite(result.router_losses[0]),
        z_loss=_finite(result.router_losses[1]),
        learning_rate=result.learning_rate,
        gradient_norm=_finite(result.gradient_norm),
        iteration_seconds=seconds,
        predicted_iteration_seconds=run.predicted_seconds,
        tokens_per_second=run.tokens_per_second(seconds),
        expert_imbalance=float(highest.mean()),
        expert_load_highest=highest.round(4).tolist(),
        expert_load_lowest=lowest.round(4).tolist(),
        **_dropped(run, result),
        **({"count_wait_seconds": result.count_wait_seconds} if result.count_wait_seconds else {}),
        **({} if result.loss_scale is None else {"loss_scale": result.loss_scale, "skipped": result.skipped}),
    )


def _dropped(run: RunSpec, result: StepResult) -> dict[str, object]:
    """Rows that no expert had room for, by layer; nothing of models without a capacity."""
    if run.model.router_capacity is None:
        return {}
    asked = run.plan.inputs.train.global_batch_sequences * run.sequence_length * run.model.top_k
    return {"dropped_rows": [asked - int(rows) for rows in result.expert_rows.sum(axis=1)]}


def _finite(value: float) -> float | None:
    """JSON has no infinity: of a step that overflowed and was skipped, or of a validation in fp16."""
    return value if math.isfinite(value) else None


def _summary(run: RunSpec, trainer: Trainer) -> dict[str, object]:
    """Overruns of all ranks: an emulated run whose real work does not keep up with its targets is invalid."""
    if not run.emulation:
        return {}
    from hetermoe_cli.runtime.clocks.emulator import EmulatedClock

    clock = trainer.clock
    assert isinstance(clock, EmulatedClock)
    figures = torch.tensor(
        [clock.tasks, clock.overruns, clock.overrun_seconds, clock.stretched_seconds], dtype=torch.float64
    )
    with peer_errors():
        dist.all_reduce(figures)
    tasks, overruns, late, total = figures.tolist()
    return {
        "emulated_tasks": int(tasks),
        "overruns": int(overruns),
        "overrun_share": late / total,
        "emulation_valid": late / total <= 0.01,
    }


if __name__ == "__main__":
    main()

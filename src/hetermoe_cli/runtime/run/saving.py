"""Checkpoints of a distributed run: who saves what, the phases with barriers between, and the way back."""

import json
from pathlib import Path

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.transformer import named_state, parameter_slices
from hetermoe_cli.model.weights.checkpoint import (
    MANIFEST,
    CheckpointState,
    load_tensors,
    read_manifest,
    step_folder,
    verify,
)
from hetermoe_cli.model.weights.checkpoint_saving import finish, write_shard
from hetermoe_cli.model.weights.hugging_face import Weights
from hetermoe_cli.model.weights.training_state import begin_with, restore_training, training_names, training_tensors
from hetermoe_cli.runtime.run.recorder import CHECKPOINTS, STATUS
from hetermoe_cli.runtime.step.trainer import Trainer
from hetermoe_cli.spec.files import parse
from hetermoe_cli.spec.rebalance import Rebalance
from hetermoe_cli.spec.run import RunSpec

_LATER_FIELDS = {"documents": "joined", "document_end": 0}  # of checkpoints that were made before these fields existed


def save(run: RunSpec, trainer: Trainer, step: int) -> Path:
    """Collective: write the state after `step` steps; every tensor once. Returns the checkpoint's folder."""
    folder = step_folder(Path(run.folder) / CHECKPOINTS, step)
    copies = _saved_by_others(trainer)
    tensors = training_tensors(trainer.parts, trainer.optimizer)
    tensors = {name: tensor for name, tensor in tensors.items() if name.split("@")[0] not in copies}
    if trainer.shards:
        tensors |= trainer.shards.tensors(trainer.optimizer)
    write_shard(folder, trainer.mesh.process, tensors)
    trainer.mesh.wait_for_disks()
    if trainer.mesh.process == 0:
        state = CheckpointState(
            step=step,
            data_digest=run.corpus_sha256,
            model=run.model,
            world_size=trainer.mesh.world_size,
            extra=_identity(run) | _learning_rate(run) | _loss_scale(trainer) | _rebalanced(run),
        )
        finish(folder, state, run.keep_checkpoints)
    trainer.mesh.wait_for_disks()
    return folder


def _saved_by_others(trainer: Trainer) -> set[str]:
    """Names of what this rank holds and is not the first to hold."""
    process, parts = trainer.mesh.process, trainer.parts
    holdings = (holding for layer in parts.holdings(trainer.world, process) for holding in layer)
    places = {(id(p), at) for holding in holdings if holding.holders[0] != process for p, at in holding.slices}
    names = {name for name, (parameter, at) in parameter_slices(parts).items() if (id(parameter), at) in places}
    layers = [layer for layer in range(trainer.world.layers) if trainer.world.attending_at(layer)[0] != process]
    return names | {name for name in named_state(parts) for layer in layers if name.startswith(f"layers.{layer}.")}


def restore(run: RunSpec, trainer: Trainer) -> None:
    """Collective: load run.resume_from into this rank's parts, whatever layout wrote it; UserError if it is damaged."""
    assert run.resume_from is not None
    folder = Path(run.resume_from)
    trainer.loss_scale.restore(read_manifest(folder).extra.get("loss_scale"), run.start_step, f"{folder / MANIFEST}")
    tensors = load_tensors(folder, training_names(trainer.parts))
    restore_training(trainer.parts, trainer.optimizer, tensors, trainer.loss_scale.taken(run.start_step))
    trainer.mesh.wait_for_disks()


def take_weights(run: RunSpec, trainer: Trainer) -> None:
    """Collective: begin with the weights in run.weights_from; UserError if they are not this model's."""
    assert run.weights_from is not None
    parts = trainer.parts
    names = [*parameter_slices(parts), *named_state(parts)]
    begin_with(parts, trainer.optimizer, Weights(Path(run.weights_from), run.model).tensors(names))
    trainer.mesh.wait_for_disks()


def check_resumable(run: RunSpec) -> int:
    """Finished steps of the checkpoint run.resume_from, which `run` can continue; UserError otherwise.

    It must be undamaged and of the same model, text and batch order.
    """
    assert run.resume_from is not None
    folder = Path(run.resume_from)
    manifest = verify(folder)
    for field in type(run.model).model_fields:
        found, value = getattr(manifest.model, field), getattr(run.model, field)
        if found != value:
            raise UserError(
                f"{folder}: field model.{field}: made with {found}, this run has {value}: plan for that model"
            )
    if manifest.data_digest != run.corpus_sha256:
        raise UserError(f"{folder}: field data_digest: made with other text: pass the same --data as then")
    for field, value in _identity(run).items():
        found = manifest.extra.get(field, _LATER_FIELDS.get(field))
        if found != value:
            raise UserError(f"{folder}: field extra.{field}: made with {found}, this run has {value}")
    if manifest.step > run.steps or (manifest.step == run.steps and _finished(run)):
        raise UserError(f"{folder}: already at step {manifest.step} of {run.steps}: raise --steps to go on")
    return manifest.step


def _finished(run: RunSpec) -> bool:
    """Whether the run came to its end: after the last checkpoint it is still validated."""
    path = Path(run.folder) / STATUS
    return path.exists() and json.loads(path.read_text())["state"] == "finished"


def resumed_placement(run: RunSpec) -> Rebalance | None:
    """Where the checkpoint run.resume_from had moved experts to, if that was under this plan's groups."""
    assert run.resume_from is not None
    folder = Path(run.resume_from)
    stored = read_manifest(folder).extra.get("rebalanced")
    if not stored or "groups" not in stored:  # made before several groups could move theirs
        return None
    change = parse(Rebalance, stored, f"{folder / MANIFEST}: extra.rebalanced")
    return change if change.is_of(run.plan.groups) else None


def resume_note(run: RunSpec) -> str | None:
    """What makes a run with --resume differ from one that had not stopped, though it can go on."""
    if not run.resume_from:
        return f"{run.folder}: no checkpoint to resume from: the run begins at step 0"
    extra = read_manifest(Path(run.resume_from)).extra
    if run.rebalanced is None and "rebalanced" in extra:
        return "the checkpoint's experts had moved from their places in another plan: they go where this plan has them"
    changed = [name for name, value in _learning_rate(run).items() if extra.get(name) != value]
    return f"resuming with another {', '.join(changed)}: not as if the run had never stopped" if changed else None


def _rebalanced(run: RunSpec) -> dict[str, object]:
    """Nothing where experts are where the plan has them."""
    return {"rebalanced": run.rebalanced.model_dump(mode="json")} if run.rebalanced else {}


def _loss_scale(trainer: Trainer) -> dict[str, object]:
    """Nothing of runs that never were scaled."""
    scale = trainer.loss_scale
    return {"loss_scale": scale.state()} if scale.dynamic or scale.skipped_steps else {}


def _learning_rate(run: RunSpec) -> dict[str, object]:
    """What may be changed on resuming."""
    train = run.plan.inputs.train
    names = ("learning_rate", "minimum_learning_rate_ratio", "warmup_steps", "weight_decay", "gradient_clip")
    return {"steps": run.steps, **{name: getattr(train, name) for name in names}}


def _identity(run: RunSpec) -> dict[str, object]:
    """What must be equal for a resumed run to go on as if it had not stopped. Nothing in training draws at random:
    the data order is a function of (seed, step)."""
    train = run.plan.inputs.train
    return {
        "seed": train.seed,
        "global_batch_sequences": train.global_batch_sequences,
        "sequence_length": run.sequence_length,
        "precision": run.precision,
        "router": run.router,
        "documents": train.documents,
        "document_end": train.document_end,
    }

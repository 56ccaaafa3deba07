"""Saving checkpoints, in three phases with a barrier between them, which the caller provides: every rank calls
`write_shard`, then rank 0 calls `finish`. No reader (checkpoint.py) sees the folder before `finish` has renamed it into
place.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.weights.checkpoint import (
    LATEST,
    MANIFEST,
    REPLACED,
    UNFINISHED,
    CheckpointState,
    Manifest,
    Shard,
    TensorInfo,
    disk_errors,
    dtype_name,
    finished,
    read_json,
    refuse_difference,
)
from hetermoe_cli.model.weights.hashing import file_sha256
from hetermoe_cli.spec.files import write_atomic


def write_shard(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Write one rank's tensors (possibly none) beside the future `folder`; UserError if the disk refuses."""
    unfinished = _unfinished(folder)
    path = unfinished / f"rank-{rank:05d}.safetensors"
    plain = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    with disk_errors(path):
        unfinished.mkdir(parents=True, exist_ok=True)
        # An interrupted save may have left a sidecar, which must not vouch for a half-written file.
        path.with_suffix(".json").unlink(missing_ok=True)
        save_file(plain, path)
        _sync(path)
        shard = Shard(
            file=path.name,
            sha256=file_sha256(path),
            size_bytes=path.stat().st_size,
            tensors={name: TensorInfo(shape=tuple(t.shape), dtype=dtype_name(t)) for name, t in plain.items()},
        )
        write_atomic(path.with_suffix(".json"), shard.model_dump_json())


def finish(folder: Path, state: CheckpointState, keep: int = 2) -> None:
    """Turn the shards of ranks 0..world_size-1 into the checkpoint `folder`, the new `latest`; keep the last `keep`.

    UserError if a shard is missing, or the shards do not hold every tensor exactly once: then nothing has changed.
    """
    unfinished = _unfinished(folder)
    shards = [_read_sidecar(unfinished, rank) for rank in range(state.world_size)]
    manifest = Manifest(**dict(state), files=shards)
    refuse_difference(unfinished, manifest)
    with disk_errors(folder):
        write_atomic(unfinished / MANIFEST, manifest.model_dump_json(indent=1))
        wanted = {MANIFEST, *(shard.file for shard in shards)}
        for stray in [path for path in unfinished.iterdir() if path.name not in wanted]:
            stray.unlink()
        _sync(unfinished)
        _swap_in(unfinished, folder)
        write_atomic(folder.parent / LATEST, folder.name + "\n")
        _sync(folder.parent)
        _prune(folder, keep)


def _read_sidecar(unfinished: Path, rank: int) -> Shard:
    path = unfinished / f"rank-{rank:05d}.json"
    if not path.is_file():
        raise UserError(f"{path}: rank {rank} wrote no shard here: put the run folder where all ranks can write")
    shard = read_json(Shard, path)
    data = unfinished / shard.file
    if not data.is_file() or data.stat().st_size != shard.size_bytes:
        raise UserError(f"{data}: not the {shard.size_bytes} bytes that rank {rank} wrote: check the disk, save again")
    return shard


def _swap_in(unfinished: Path, folder: Path) -> None:
    """Rename into place; a finished checkpoint of the same name survives any failure, at worst as NAME.old."""
    replaced = folder.with_name(folder.name + REPLACED)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    try:
        unfinished.rename(folder)
    except BaseException:
        if replaced.exists():
            replaced.rename(folder)
        raise


def _prune(newest: Path, keep: int) -> None:
    """Delete finished checkpoints beyond the last `keep` written, and what interrupted saves left."""
    others = [folder for folder in finished(newest.parent) if folder != newest]
    by_age = sorted(others, key=lambda folder: (folder / MANIFEST).stat().st_mtime_ns, reverse=True)
    left_over = [path for end in (UNFINISHED, REPLACED) for path in newest.parent.glob(f"step-*{end}")]
    for folder in by_age[max(keep - 1, 0) :] + left_over:
        # Without its manifest a half-deleted folder is not taken for a checkpoint.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _unfinished(folder: Path) -> Path:
    return folder.with_name(folder.name + UNFINISHED)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

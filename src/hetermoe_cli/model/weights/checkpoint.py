"""Checkpoint files: one safetensors shard per rank and a JSON manifest, keyed by layout-independent names; how they are
read and checked. How they are written: checkpoint_saving.py.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.weights.hashing import check_each, file_sha256
from hetermoe_cli.model.weights.training_state import training_shapes
from hetermoe_cli.spec.base import NonNegativeInt, PositiveInt, Spec
from hetermoe_cli.spec.files import SpecT, parse, read_text
from hetermoe_cli.spec.model import ModelConfig

MANIFEST = "manifest.json"
LATEST = "latest"
UNFINISHED, REPLACED = ".tmp", ".old"  # ends of folders
_OTHER_CHECKPOINT = "resume from another checkpoint or restore this one from a copy"


class TensorInfo(Spec):
    """Shape and torch dtype name of a stored tensor."""

    shape: tuple[NonNegativeInt, ...]
    dtype: str


class Shard(Spec):
    """One file of a checkpoint, and what is in it."""

    file: str
    sha256: str
    size_bytes: NonNegativeInt
    tensors: dict[str, TensorInfo]


class CheckpointState(Spec):
    """What a checkpoint records beside tensors; `step` counts finished optimizer steps, `extra` is plain JSON."""

    step: NonNegativeInt
    data_digest: str
    model: ModelConfig
    world_size: PositiveInt
    extra: dict[str, Any] = Field(default_factory=dict)


class Manifest(CheckpointState):
    """manifest.json."""

    kind: Literal["checkpoint"] = "checkpoint"
    schema_version: Literal[1] = 1
    files: list[Shard]

    def tensors(self) -> dict[str, TensorInfo]:
        """Every stored tensor by name."""
        return {name: info for shard in self.files for name, info in shard.tensors.items()}


def step_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return run_folder / f"step-{step:08d}"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished checkpoint, complete for its model; UserError otherwise."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{path}: missing, so {folder} is no finished checkpoint: {_OTHER_CHECKPOINT}")
    manifest = read_json(Manifest, path)
    refuse_difference(path, manifest)
    return manifest


def find_latest(run_folder: Path) -> Path | None:
    """The newest finished checkpoint of a run, None if there is none; UserError if `latest` names one that is gone."""
    pointer = run_folder / LATEST
    if not pointer.is_file():
        # The first save may have been cut off after its folder was renamed into place.
        return max(finished(run_folder), default=None)
    name = read_text(pointer).strip()
    for folder in (run_folder / name, run_folder / (name + REPLACED)):
        if name and (folder / MANIFEST).is_file():
            return folder
    raise UserError(f"{pointer}: names the checkpoint {name!r}, which is not there: restore it or write another name")


class Stored(Mapping[str, Tensor]):
    """Tensors on the CPU that are views of their files: none takes memory but while it is used, and of it what is."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths

    def __getitem__(self, name: str) -> Tensor:
        """A file is opened for each tensor, as all that one opening gives share what was read of the file."""
        path = self._paths[name]
        with disk_errors(path, _OTHER_CHECKPOINT), safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def load_tensors(folder: Path, names: set[str]) -> Stored:
    """The tensors called `names`, to be read from the shards that hold them; each of those is verified.

    UserError if a name is not in the checkpoint, or a shard is missing or not what was written.
    """
    manifest = read_manifest(folder)
    unknown = sorted(names - manifest.tensors().keys())
    if unknown:
        raise UserError(f"{folder / MANIFEST}: {_some(unknown)} not in this checkpoint: use the model it was made with")
    needed = [shard for shard in manifest.files if names & shard.tensors.keys()]
    _verify(folder, needed)
    paths: dict[str, Path] = {}
    for shard in needed:
        here = names & shard.tensors.keys()
        paths |= dict.fromkeys(sorted(here), folder / shard.file)
        _check_content(folder / shard.file, shard, here)
    return Stored(paths)


def _check_content(path: Path, shard: Shard, names: set[str]) -> None:
    with disk_errors(path, _OTHER_CHECKPOINT), safe_open(path, framework="pt") as file:
        if set(file.keys()) != shard.tensors.keys():
            raise UserError(f"{path}: holds other tensors than the manifest says: {_OTHER_CHECKPOINT}")
        found = {name: file.get_tensor(name) for name in sorted(names)}  # reads nothing yet
    for name, tensor in found.items():
        if TensorInfo(shape=tuple(tensor.shape), dtype=dtype_name(tensor)) != shard.tensors[name]:
            raise UserError(f"{path}: {name} has another shape or dtype than the manifest says: {_OTHER_CHECKPOINT}")


def verify(folder: Path) -> Manifest:
    """Check every file of a finished checkpoint against its manifest; UserError names the first damaged one."""
    manifest = read_manifest(folder)
    _verify(folder, manifest.files)
    return manifest


def _verify(folder: Path, shards: list[Shard]) -> None:
    check_each(lambda shard, stop: _verify_file(folder / shard.file, shard, stop), shards)


def _verify_file(path: Path, shard: Shard, stop: Event) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing: {_OTHER_CHECKPOINT}")
    with disk_errors(path, _OTHER_CHECKPOINT):
        size, found = path.stat().st_size, file_sha256(path, stop)
    if size != shard.size_bytes:
        raise UserError(f"{path}: truncated ({size} bytes, {shard.size_bytes} were written): {_OTHER_CHECKPOINT}")
    if found != shard.sha256:
        raise UserError(f"{path}: corrupt (its sha256 is not the manifest's): {_OTHER_CHECKPOINT}")


def read_json(cls: type[SpecT], path: Path) -> SpecT:
    """A file of a checkpoint; UserError if it is damaged."""
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: malformed JSON ({error.msg}): {_OTHER_CHECKPOINT}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(data).__name__}: {_OTHER_CHECKPOINT}")
    return parse(cls, data, str(path))


def refuse_difference(path: Path, manifest: Manifest) -> None:
    """UserError unless every tensor that the manifest's model needs is stored once, in its shape, and nothing else."""
    stored = manifest.tensors()
    expected = training_shapes(manifest.model)
    times = Counter(name for shard in manifest.files for name in shard.tensors)
    problems = {
        "missing": sorted(expected.keys() - stored.keys()),
        "surplus": sorted(stored.keys() - expected.keys()),
        "stored twice": sorted(name for name, count in times.items() if count > 1),
        "of the wrong shape": sorted(n for n, t in stored.items() if t.shape != expected.get(n, t.shape)),
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"{path}: {_some(found)} {problem} for model {manifest.model.name!r}: {_OTHER_CHECKPOINT}")


def finished(run_folder: Path) -> list[Path]:
    """Folders of all finished checkpoints of a run."""
    ends = (UNFINISHED, REPLACED)
    return [p.parent for p in run_folder.glob(f"step-*/{MANIFEST}") if not p.parent.name.endswith(ends)]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {names[0]!r}{more}"


def dtype_name(tensor: Tensor) -> str:
    """As in TensorInfo."""
    return str(tensor.dtype).removeprefix("torch.")


@contextmanager
def disk_errors(path: Path, advice: str = "free space or check permissions, then resume") -> Iterator[None]:
    """What the disk refuses is a UserError that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: {reason}: {advice}") from error

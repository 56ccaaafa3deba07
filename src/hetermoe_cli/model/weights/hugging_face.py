"""Folders of Hugging Face's weights (config.json and safetensors): out of a model, and into one."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.data.corpus import END_OF_TEXT
from hetermoe_cli.model.weights.hugging_face_names import BIAS, Piece, pieces
from hetermoe_cli.model.weights.training_state import expected_shapes
from hetermoe_cli.spec.files import read_text, write_atomic
from hetermoe_cli.spec.hugging_face import config_fields, read_config
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.named_models import load_model

CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_LARGEST_FILE_BYTES = 5 * 10**9
# Of ModelConfig: what a run may choose for itself and still begin with weights that were trained otherwise.
_FREE = {"name", "initializer_range", "router_balance", "router_auxiliary_loss", "router_bias_rate"}
_FREE |= {"router_z_loss", "router_capacity"}


def export(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    sequence_length: int,
    document_end: int = END_OF_TEXT,
) -> None:
    """Write `tensors` (all weights and selection biases by our names) and config.json to the new `folder`. The token
    `document_end` stands between documents, so it begins and ends a text.

    UserError if Hugging Face has no such model, the folder holds something or the disk refuses.
    """
    fields = config_fields(config, sequence_length) | {"bos_token_id": document_end, "eos_token_id": document_end}
    fields["dtype"] = str(tensors["norm.weight"].dtype).removeprefix("torch.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already: name a new --output")
    _write(folder, _Theirs(config, tensors))
    write_atomic(folder / CONFIG, json.dumps(fields, indent=2) + "\n")  # last: without it nobody reads the rest


class _Theirs:
    """Hugging Face's tensors out of ours. It keeps none, as each of ours may map a whole shard of a checkpoint."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self._config, self._tensors = config, tensors
        self._pieces = {piece.name: (ours, piece.rows) for ours, parts in pieces(config).items() for piece in parts}

    def sizes(self) -> dict[str, int]:
        """Bytes by name, in order; reads nothing."""
        return {name: self._ours(ours).to("meta")[rows].nbytes for name, (ours, rows) in self._pieces.items()}

    def read(self, name: str) -> Tensor:
        """A copy: a view would keep the shard mapped."""
        ours, rows = self._pieces[name]
        return self._ours(ours)[rows].clone(memory_format=torch.contiguous_format)

    def _ours(self, name: str) -> Tensor:
        if name.endswith(BIAS) and name not in self._tensors:
            return torch.zeros(self._config.experts)  # of a gate that no bias balances
        return self._tensors[name]


def _write(folder: Path, theirs: _Theirs) -> None:
    """One file after the other, so that no more than one file's tensors are in memory."""
    sizes = theirs.sizes()
    groups = _split(sizes)
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    files = dict(zip(names if len(groups) > 1 else [_SINGLE], groups, strict=True))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, group in files.items():
            save_file({name: theirs.read(name) for name in group}, folder / file, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: {error}: free space or check permissions") from error
    if len(groups) > 1:
        place = {name: file for file, group in files.items() for name in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place}
        write_atomic(folder / _INDEX, json.dumps(index, indent=1) + "\n")


def _split(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names by file, in order; a file is full before it exceeds the limit."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > _LARGEST_FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


class Weights:
    """A folder of Hugging Face's weights for a model; nothing is read but headers until a tensor is asked for.

    UserError if the folder is not of this model, lacks a tensor, or holds others or other shapes.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder, self.config = folder, config
        fields = read_config(folder / CONFIG)
        _refuse_other_model(folder / CONFIG, fields.get("n_group"), "quantization_config" in fields, config)
        self._pieces = pieces(config, interleaved=bool(fields.get("rope_interleave", True)))
        self._files = self._find_files()
        self._check()

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by our names, on the CPU, in the precision they are stored in."""
        return {name: self._joined(self._pieces[name]) for name in names}

    def _joined(self, parts: list[Piece]) -> Tensor:
        found = [self._read(piece.name) for piece in parts]
        result = torch.empty(sum(len(tensor) for tensor in found), *found[0].shape[1:], dtype=found[0].dtype)
        for piece, tensor in zip(parts, found, strict=True):
            result[piece.rows] = tensor
        return result

    def _read(self, name: str) -> Tensor:
        path = self.folder / self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {error}: fetch it again") from error

    def _find_files(self) -> dict[str, str]:
        """Where every tensor lies: name -> file."""
        index = self.folder / _INDEX
        if not index.is_file():
            return dict.fromkeys(self._shapes(_SINGLE), _SINGLE)
        try:
            place = json.loads(read_text(index))["weight_map"]
            return {str(name): str(file) for name, file in place.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: field weight_map: no mapping of names to files: fetch it again") from error

    def _shapes(self, file: str) -> dict[str, tuple[int, ...]]:
        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {error}: fetch it again") from error

    def _check(self) -> None:
        """Every name and shape, every expert by identity; layers behind the last are multi-token prediction's."""
        found: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self._files.values())):
            found |= self._shapes(file)
        expected = self._expected()
        behind = f"model.layers.{self.config.layers + self.config.dense_layers}."
        surplus = {name for name in found.keys() - expected.keys() if not name.startswith(behind)}
        problems = {
            "missing": sorted(expected.keys() - (found.keys() & self._files.keys())),
            "unknown": sorted(surplus),
            "of another shape": sorted(n for n, shape in expected.items() if found.get(n, shape) != shape),
        }
        for problem, names in problems.items():
            if names:
                raise UserError(
                    f"{self.folder}: tensor {names[0]!r} is {problem} for model {self.config.name} "
                    f"({len(names)} such): take weights of this model"
                )
        if self.config.router_balance != "bias":
            self._refuse_biases()

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Shapes by Hugging Face's names."""
        shapes, biases = expected_shapes(self.config), (self.config.experts,)
        result = {}
        for ours, parts in self._pieces.items():
            first, *rest = shapes.get(ours, biases)
            for piece in parts:
                height = len(range(first)[piece.rows]) if isinstance(piece.rows, slice) else len(piece.rows)
                result[piece.name] = (height, *rest)
        return result

    def _refuse_biases(self) -> None:
        """A model without selection biases may take none that are not zero."""
        for ours, parts in self._pieces.items():
            if ours.endswith(BIAS) and self._joined(parts).any():
                raise UserError(
                    f"{self.folder}: tensor {parts[0].name!r} biases the choice of experts, which model "
                    f"{self.config.name} does not: give it router_balance: bias and a router_bias_rate"
                )


def _refuse_other_model(path: Path, groups: int | None, quantised: bool, config: ModelConfig) -> None:
    if quantised:
        raise UserError(f"{path}: field quantization_config: the weights are quantised: take them in bf16 or wider")
    if (groups or 1) > 1:
        raise UserError(f"{path}: field n_group: this engine's gate does not choose among {groups} groups of experts")
    found = load_model(str(path))
    for field in ModelConfig.model_fields.keys() - _FREE:
        theirs, ours = getattr(found, field), getattr(config, field)
        if theirs != ours:
            raise UserError(f"{path}: field {field} is {theirs}, model {config.name} has {ours}: plan for that model")

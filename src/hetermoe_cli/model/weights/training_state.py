"""Weights, AdamW state and selection biases by layout-independent name: out of a module, and back into any split."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.optimizer import AdamW, part_of
from hetermoe_cli.model.transformer import Transformer, named_state, named_tensors, parameter_slices
from hetermoe_cli.spec.model import ModelConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the model by name; allocates nothing."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in named_tensors(Transformer(config)).items()}


def training_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """`expected_shapes` plus AdamW state and selection biases: the full set of tensors in a checkpoint."""
    shapes = {full: shape for name, shape in expected_shapes(config).items() for full in _with_moments(name)}
    with torch.device("meta"):
        return shapes | {name: tuple(tensor.shape) for name, tensor in named_state(Transformer(config)).items()}


def weight_names(config: ModelConfig) -> set[str]:
    """Names of all weights and selection biases: a checkpoint without AdamW state."""
    return {name for name in training_shapes(config) if "@" not in name}


def training_names(parts: nn.Module) -> set[str]:
    """Names of all that `restore_training` needs for `parts`."""
    return {full for name in parameter_slices(parts) for full in _with_moments(name)} | named_state(parts).keys()


def training_tensors(parts: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """NAME (the master's values), NAME@exp_avg and NAME@exp_avg_sq of every parameter that this rank holds all of,
    zeros for state that no step has made yet; NAME of every selection bias."""
    result = named_state(parts)
    for name, (parameter, index) in parameter_slices(parts).items():
        if parameter not in optimizer.pieces:
            result |= state_tensors(name, state_slices(optimizer, parameter, index))
    return result


def state_tensors(name: str, states: Iterable[Tensor]) -> dict[str, Tensor]:
    """Master and both moments of what is called `name`, by their names in a checkpoint."""
    return dict(zip(_with_moments(name), states, strict=True))


def state_slices(optimizer: AdamW, weight: Tensor, index: int | None) -> list[Tensor]:
    """Master and both moments of a parameter or a piece's weight, or of the expert at `index` in it: views, but for
    zeros in place of moments that no step has made yet."""
    master = optimizer.master(weight)
    state = optimizer.state.get(master, {})
    own = part_of(master, index)
    return [own, *(part_of(state[m], index) if m in state else torch.zeros_like(own) for m in _MOMENTS)]


def restore_training(parts: nn.Module, optimizer: AdamW, tensors: Mapping[str, Tensor], step: int) -> None:
    """The inverse of `training_tensors` after `step` optimizer steps, into this module's own split of the experts.

    UserError, with nothing changed, if `tensors` are not exactly `training_names(parts)` in shape and dtype.
    """
    slices = parameter_slices(parts)
    _refuse_difference(parts, tensors)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = fresh_state(optimizer, parameter, step)
    with torch.no_grad():
        for name, (parameter, index) in slices.items():
            sources = (tensors[full] for full in _with_moments(name))  # one at a time
            if parameter not in optimizer.pieces:
                _copy(sources, state_slices(optimizer, parameter, index))
            elif piece := optimizer.pieces[parameter].get(index):
                _copy(map(piece.of, sources), state_slices(optimizer, piece.weight, None))
            if parameter.untyped_storage().size():  # else the weights are gathered from all ranks' masters when needed
                part_of(parameter, index).copy_(tensors[name])  # rounded, where it is not its own master
        for name, tensor in named_state(parts).items():
            tensor.copy_(tensors[name])


def begin_with(parts: nn.Module, optimizer: AdamW, weights: Mapping[str, Tensor]) -> None:
    """Take weights and selection biases by name, in any precision; the moments begin at zero."""
    needed = named_tensors(parts) | named_state(parts)
    tensors = {n: weights[n].to(torch.promote_types(own.dtype, torch.float32)) for n, own in needed.items()}
    moments = {full: tensors[n] for n in parameter_slices(parts) for full in _with_moments(n)[1:]}
    restore_training(parts, optimizer, tensors | {name: torch.zeros_like(t) for name, t in moments.items()}, step=0)


def _copy(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def fresh_state(optimizer: AdamW, parameter: Tensor, step: int) -> dict[str, Tensor]:
    """What AdamW itself makes at its first step, with the count at `step`."""
    on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
    count = torch.tensor(float(step), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    moments = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in _MOMENTS}
    return {"step": count, **moments}


def _refuse_difference(parts: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    needed = {full: own for name, own in named_tensors(parts).items() for full in _with_moments(name)}
    needed |= named_state(parts)
    for name, own in needed.items():
        found, dtype = tensors.get(name), torch.promote_types(own.dtype, torch.float32)
        if found is None:
            raise UserError(f"checkpoint: tensor {name!r} is missing: resume with the model it was made with")
        if (found.shape, found.dtype) != (own.shape, dtype):
            raise UserError(
                f"checkpoint: tensor {name!r} is {found.dtype} {list(found.shape)}, this run needs {dtype} "
                f"{list(own.shape)}: resume with the model and the precision it was made with"
            )
    surplus = sorted(tensors.keys() - needed.keys())
    if surplus:
        raise UserError(f"checkpoint: tensor {surplus[0]!r} has no place on this rank: load only what it holds")


def _with_moments(name: str) -> tuple[str, ...]:
    return (name, *(f"{name}@{moment}" for moment in _MOMENTS))

"""AdamW, with fp32 master copies of narrower weights, and its learning rate."""

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hetermoe_cli.spec.train import TrainSpec

_FUSED_DEVICES = {"cpu", "cuda"}
_CHUNK_ELEMENTS = 2**20  # fp32 gradients that live at once: 4 MiB, or one parameter's if that is more


def learning_rate(train: TrainSpec, step: int) -> float:
    """Rate of step 0, 1, ...: linear up to `learning_rate` in the warm-up, then a cosine to its minimum at `steps`."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    decaying = max(train.steps - train.warmup_steps, 1)
    progress = min((step - train.warmup_steps) / decaying, 1.0)
    lowest = train.minimum_learning_rate_ratio
    return train.learning_rate * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress)))


def part_of(tensor: Tensor, index: int | None) -> Tensor:
    """View of a parameter, or of the expert at `index` in stacked ones."""
    return tensor.detach() if index is None else tensor.detach()[index]


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened parameter, or expert, that several ranks share out; `weight` is what of
    them is stepped."""

    start: int
    stop: int
    weight: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The same elements of a tensor like the whole."""
        return tensor.detach().flatten()[self.start : self.stop]


Pieces = Mapping[nn.Parameter, Mapping[int | None, Piece]]  # by `index` of part_of; other ranks step what is missing


class AdamW(torch.optim.AdamW):
    """AdamW that steps on fp32 masters of fp16 and bf16 weights; a wider weight is its own master.

    Of parameters in `pieces` it holds and steps these only.
    """

    # torch's own load its compiler, to tell it to leave them alone: a second of every process' start
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    grad_scale: Tensor | None = None  # torch's: what its fused kernel divides gradients by

    def __init__(
        self,
        groups: list[dict[str, Any]],
        masters: Mapping[Tensor, Tensor],
        pieces: Pieces | None = None,
        **options: Any,
    ) -> None:
        """`groups` hold masters; `masters` names those of weights that are not their own."""
        super().__init__(groups, **options)
        self._masters, self.pieces = dict(masters), {} if pieces is None else pieces

    def master(self, weight: Tensor) -> Tensor:
        """What is stepped on in place of a parameter, or of a piece's weight: in fp32 or wider."""
        return self._masters.get(weight, weight)

    def add(self, parameter: nn.Parameter, weights: Sequence[Tensor]) -> None:
        """Step on another parameter as well: on its master, or itself, or on its pieces' weights."""
        if parameter not in self.pieces and weights[0] is not parameter:
            self._masters[parameter] = weights[0]
        self.param_groups[parameter.dim() < 2]["params"] += weights

    def drop(self, weights: Iterable[Tensor]) -> None:
        """Forget parameters, or pieces' weights, and their state."""
        gone = {self._masters.pop(weight, weight) for weight in weights}
        for group in self.param_groups:
            group["params"] = [master for master in group["params"] if master not in gone]
        for master in gone:
            self.state.pop(master, None)

    def _stepped(self, gradients: Mapping[Any, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights that are stepped, with their gradients."""
        for parameter, gradient in gradients.items():
            if parameter not in self.pieces:
                yield parameter, gradient
            else:
                for index, piece in self.pieces[parameter].items():
                    yield piece.weight, piece.of(part_of(gradient, index))

    @property
    def has_masters(self) -> bool:
        """Whether some weight is narrower than what is stepped on."""
        return bool(self._masters)

    def step_from(self, factor: float, gradients: list[Tensor]) -> None:
        """One step from `factor` times `gradients`, which are all that parameters have as their `grad` and are
        overwritten. torch's fused kernel divides fp32 ones by 1 / `factor` in fp32, as it reads them."""
        if factor == 1 or not gradients:
            self.step()
        elif self.defaults["fused"] and all(gradient.dtype == torch.float32 for gradient in gradients):
            self.grad_scale = torch.full((), 1 / factor, dtype=torch.float32, device=gradients[0].device)
            self.step()
            self.grad_scale = None
        else:
            torch._foreach_mul_(gradients, factor)
            self.step()

    def update(self, gradients: Mapping[Any, Tensor], factor: float) -> None:
        """One step from `factor` times `gradients` of any precision, by parameter, then round masters to weights.

        Gradients are widened some parameters at a time, so that few wide copies live at once.
        """
        self.zero_grad()
        gradients = dict(self._stepped(gradients))
        with torch.no_grad():
            for chunk in _chunks(gradients):
                wide = {p: gradients[p].to(self.master(p).dtype, copy=True) for p in chunk}
                for parameter in chunk:
                    self.master(parameter).grad = wide[parameter]
                self.step_from(factor, list(wide.values()))  # passes over what has no gradient
                for parameter in chunk:
                    master = self.master(parameter)
                    master.grad = None
                    if master is not parameter:
                        parameter.copy_(master)


def _chunks(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    chunk: list[Tensor] = []
    for parameter in parameters:
        if chunk and sum(p.numel() for p in chunk) + parameter.numel() > _CHUNK_ELEMENTS:
            yield chunk
            chunk = []
        chunk.append(parameter)
    if chunk:
        yield chunk


def make_optimizer(
    parts: nn.Module,
    train: TrainSpec,
    masters: Mapping[Any, Tensor] | None = None,
    pieces: Pieces | None = None,
) -> AdamW:
    """AdamW over all parameters of `parts`, decaying only matrices; fused where torch has a kernel.

    `masters`: fp32 values of the narrower parameters and pieces. `pieces`: what to step of the parameters in it.
    """
    masters, pieces = masters or {}, {} if pieces is None else pieces
    groups: dict[bool, list[Tensor]] = {True: [], False: []}  # matrices, others
    for parameter in parts.parameters():
        weights = [piece.weight for piece in pieces[parameter].values()] if parameter in pieces else [parameter]
        groups[parameter.dim() >= 2] += [masters.get(weight, weight) for weight in weights]
    return AdamW(
        [
            {"params": groups[True], "weight_decay": train.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        masters,
        pieces,
        lr=learning_rate(train, 0),
        betas=(train.beta1, train.beta2),
        eps=train.adam_epsilon,
        fused=all(p.device.type in _FUSED_DEVICES for p in parts.parameters()),
    )

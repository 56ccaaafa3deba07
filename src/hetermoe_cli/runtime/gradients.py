"""Gradients of one rank: where they accumulate, how they are summed over ranks and clipped by the true global norm."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hetermoe_cli.runtime.mesh import Mesh, peer_errors


class Gradients:
    """Preallocated gradients: autograd accumulates in place, and what got no token is zero, not missing.

    `shared` parameters (dense part, replicated experts) have views of one flat buffer, summed over the attending
    ranks in one all-reduce; `own` parameters (hosted experts) exist once in the world.
    """

    def __init__(self, shared: Iterable[nn.Parameter], own: Iterable[nn.Parameter], mesh: Mesh) -> None:
        self._mesh = mesh
        self._own = list(own)
        shared = list(shared)
        kind = shared[0] if shared else torch.empty(0)
        self._flat = torch.zeros(sum(p.numel() for p in shared), dtype=kind.dtype, device=mesh.device)
        offset = 0
        for parameter in shared:
            parameter.grad = self._flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        for parameter in self._own:
            parameter.grad = torch.zeros_like(parameter)

    @property
    def _own_gradients(self) -> list[Tensor]:
        return [p.grad for p in self._own if p.grad is not None and p.numel()]

    def zero(self) -> None:
        """Start a new iteration."""
        self._flat.zero_()
        if self._own_gradients:
            torch._foreach_zero_(self._own_gradients)

    def reduce(self, figures: Tensor) -> tuple[Tensor, float]:
        """Sum shared gradients over their holders, and `figures` [n] float64 over all ranks.

        Returns (summed figures, global gradient norm).
        """
        if self._mesh.attending is not None and self._flat.numel():
            with peer_errors():
                dist.all_reduce(self._flat, group=self._mesh.attending)
        square = torch.zeros(1, dtype=torch.float64, device=self._mesh.device)
        attends = self._mesh.attending is not None
        if attends and dist.get_rank(self._mesh.attending) == 0:  # one copy of what all attending ranks share
            square += _square(self._flat)
        for gradient in self._own_gradients:
            square += _square(gradient)
        total = torch.cat([square, figures])
        with peer_errors():
            dist.all_reduce(total)
        return total[1:], float(total[0].sqrt())

    def clip(self, norm: float, limit: float) -> None:
        """Scale all gradients so that the global norm is at most `limit`."""
        scale = limit / (norm + 1e-6)
        if scale < 1:
            self._flat.mul_(scale)
            if self._own_gradients:
                torch._foreach_mul_(self._own_gradients, scale)


def _square(gradient: Tensor) -> Tensor:
    """Sum of squares in float64."""
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    return norm.square()

"""Parts: the modules that one rank holds under a layout."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor, nn

from hetermoe_cli.model.layers.gate import Router
from hetermoe_cli.model.layers.moe import ExpertGroup
from hetermoe_cli.model.transformer import DenseModel, initialise_tensor, parameter_slices
from hetermoe_cli.runtime.machine.mesh import Mesh
from hetermoe_cli.runtime.modules.stage import ExpertParts
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.world import Share, World

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


Slices = Sequence[tuple[nn.Parameter, int | None]]  # parameters, or experts by their place in stacked ones


@dataclass(frozen=True)
class Holding:
    """Some of a layer's shared parameters, and all processes that hold them, in ascending order. The slices come in
    one order on all of these."""

    holders: tuple[int, ...]
    slices: Slices


@dataclass(frozen=True)
class Precisions:
    """What rows and shared gradients travel in, and what each rank computes in (all in `exchange` if empty)."""

    exchange: str
    ranks: Sequence[str] = ()

    def of(self, rank: int) -> str:
        """This rank's own."""
        return self.ranks[rank] if self.ranks else self.exchange

    def gathered(self, ranks: Iterable[int]) -> torch.dtype:
        """The narrowest that holds what each of `ranks` computes in."""
        return reduce(torch.promote_types, [DTYPES[self.of(rank)] for rank in ranks])

    @property
    def scaled(self) -> bool:
        """Whether anything is in fp16, whose range is too small for gradients as they are."""
        return "fp16" in (self.exchange, *self.ranks)


class Parts(nn.Module):
    """`dense` on ranks that attend or compute the head, and the local experts of every layer (possibly none).

    `dtype` is this rank's, `exchange` that of rows on their way, `precisions` those of all ranks; `masters`: fp32
    values of narrower parameters, but for those that are shared out (shards.py). Parameters of `build_parts`
    have no values, and no memory, until `fill`.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        rank: int,
        router: Router = "learned",
        document_end: int | None = None,
    ) -> None:
        super().__init__()
        self.dense = _dense_part(config, layout, rank, router, document_end) if layout.has_dense(rank) else None
        self.experts = nn.ModuleList(
            ExpertParts(
                ExpertGroup(config, layer, placement.experts[rank]),
                ExpertGroup(config, layer, placement.replicated if layout.attends(rank, layer) else []),
            )
            for layer, placement in enumerate(layout.placement)
        )
        self.dtype = self.exchange = torch.get_default_dtype()
        self.precisions = Precisions("fp32")
        self.masters: dict[nn.Parameter | Tensor, Tensor] = {}
        self._initialise: Callable[[str, Tensor], None] = lambda name, tensor: None
        self._empty: dict[nn.Parameter, list[tuple[str, int | None]]] = {}  # names of what is in parameters to fill

    def experts_of(self, layer: int) -> ExpertParts:
        """The local experts of a layer."""
        parts = self.experts[layer]
        assert isinstance(parts, ExpertParts)
        return parts

    def parameters_of(self, action: Action) -> Iterator[nn.Parameter]:
        """What the backward of an attention, expert or head action leaves gradients of."""
        if action.kind is Kind.EXPERT:
            yield from self.experts_of(action.layer).parameters()
        elif self.dense is not None and action.kind in (Kind.ATTENTION, Kind.HEAD):
            parts: list[nn.Module] = [self.dense.norm, self.dense.head]
            if action.kind is Kind.ATTENTION:
                before = [] if action.layer else [self.dense.embedding, self.dense.dense_layers]
                parts = [self.dense.layers[action.layer], *before]
            for part in parts:
                yield from part.parameters()

    def shared_segments(self, *, dense: bool = True, hosted: bool = False) -> list[list[nn.Parameter]]:
        """What several processes hold, layer by layer as gradients become complete (cost.reduce_seconds): possibly
        `dense_segments`, every layer's replicated experts, and `hosted` ones where other groups have them."""
        segments = self.dense_segments() if dense else [[] for _ in range(len(self.experts) + 1)]
        for layer in range(len(self.experts)):
            parts = self.experts_of(layer)
            segments[layer] += [*parts.replicated.parameters(), *(parts.hosted.parameters() if hosted else ())]
        return segments

    def holdings(self, world: World, process: int, *, dense: bool = True) -> list[list[Holding]]:
        """Of every shared segment (`shared_segments`), what is summed over whom; the first of an attending process is
        summed over all that attend, and empty if that is the dense part and `dense` is not set."""
        return [self.holdings_of(layer, world, process, dense=dense) for layer in range(len(self.experts) + 1)]

    def holdings_of(self, layer: int, world: World, process: int, *, dense: bool = True) -> list[Holding]:
        """Of one of them."""
        return [
            Holding(share.holders, self._slices(layer, share, dense))
            for share in world.shares(layer)
            if process in share.holders
        ]

    def _slices(self, layer: int, share: Share, dense: bool) -> Slices:
        """The dense part in its order, then all first matrices of the experts in ascending order, then all second."""
        slices: list[tuple[nn.Parameter, int | None]] = []
        if share.dense and dense:
            slices += [(parameter, None) for parameter in self.dense_segments()[layer]]
        if share.experts:
            parts = self.experts_of(layer)
            place = {e: (group, at) for group in (parts.hosted, parts.replicated) for at, e in enumerate(group.ids)}
            found = [place[expert] for expert in share.experts]
            slices += [(group.gate_up, at) for group, at in found] + [(group.down, at) for group, at in found]
        return slices

    def dense_segments(self) -> list[list[nn.Parameter]]:
        """The dense part of every layer: embedding and dense layers go with layer 0, norm and head last. All are empty
        where the rank does not attend."""
        layers, edge = range(len(self.experts)), Action(Kind.HEAD, Pass.BACKWARD)
        segments = [list(self.parameters_of(Action(Kind.ATTENTION, Pass.BACKWARD, layer))) for layer in layers]
        return [*segments, list(self.parameters_of(edge))]

    def widen(self, module: nn.Module, device: torch.device) -> None:
        """Put `module` on the device, in this rank's precision or, where that is narrower, in fp32."""
        module.to(device=device, dtype=torch.promote_types(self.dtype, torch.float32))

    def narrow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Round what is wide to this rank's precision and keep it as masters, if there is a difference."""
        for parameter in parameters:
            if parameter.dtype != self.dtype:
                self.masters[parameter] = parameter.detach()
                parameter.data = parameter.data.to(self.dtype)

    def empty(self, device: torch.device, initialise: Callable[[str, Tensor], None]) -> None:
        """Put modules that were made on the meta device on this one, without memory; `initialise` will fill them, by
        name.

        Module.to_empty would load sympy for a tensor's strides (model/seed.py).
        """
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                values.untyped_storage().resize_(0)
                setattr(module, name, nn.Parameter(values))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
        self._initialise, self._empty = initialise, {parameter: [] for parameter in self.parameters()}
        for name, (parameter, index) in parameter_slices(self).items():
            self._empty[parameter].append((name, index))

    def fill(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give those of `parameters` that are empty their first values, in this rank's precision, with masters where
        it is narrow."""
        with torch.no_grad():
            for parameter in parameters:
                if parameter in self._empty:
                    wide = torch.promote_types(self.dtype, torch.float32)
                    parameter.data = torch.empty(parameter.shape, dtype=wide, device=parameter.device)
                    for name, index in self._empty.pop(parameter):
                        self._initialise(name, parameter if index is None else parameter[index])
                    self.narrow([parameter])

    def hosted_parameters(self) -> list[nn.Parameter]:
        """Hosted experts of all layers."""
        return [p for layer in range(len(self.experts)) for p in self.experts_of(layer).hosted.parameters()]


def _dense_part(config: ModelConfig, layout: Layout, rank: int, router: Router, document_end: int | None) -> DenseModel:
    """What a rank holds of the dense part."""
    attends, last = layout.sequences_per_rank[rank] > 0, layout.layers
    layers = layout.span_of(rank).layers if attends else range(last, last)
    return DenseModel(config, router, document_end, layers, layout.head_share(rank) > 0)


def build_parts(
    config: ModelConfig,
    world: World,
    mesh: Mesh,
    precisions: Precisions,
    seed: int,
    router: Router = "learned",
    document_end: int | None = None,
) -> Parts:
    """This rank's modules on its device, to be filled: equally under every layout and in every precision."""
    with torch.device("meta"):
        parts = Parts(config, world.replica_of(mesh.process).layout, mesh.rank, router, document_end)
    parts.dtype, parts.exchange = DTYPES[precisions.of(mesh.process)], DTYPES[precisions.exchange]
    parts.precisions = precisions
    parts.empty(mesh.device, partial(initialise_tensor, config=config, seed=seed))
    return parts

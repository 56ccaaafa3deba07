"""Move experts between ranks between two steps: weights, masters and both moments, rank to rank, and run on.

Experts move inside a copy of the model, as every one has them all, or inside a pipeline stage of it; all copies do so
at once. Layer by layer, so that a rank holds at most one layer's experts twice. Messages have exact sizes and are
posted in one order on all ranks: by layer, expert, tensor and target. A group of experts that stays as it is is not
touched.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hetermoe_cli.cost.moving import Move, moves
from hetermoe_cli.model.layers.moe import ExpertGroup
from hetermoe_cli.model.optimizer import AdamW
from hetermoe_cli.model.weights.training_state import fresh_state, state_slices
from hetermoe_cli.runtime.machine.mesh import Mesh, regroup
from hetermoe_cli.runtime.machine.peers import peer_errors
from hetermoe_cli.runtime.modules.parts import Parts
from hetermoe_cli.runtime.modules.stage import ExpertParts
from hetermoe_cli.runtime.step.engine import Engine
from hetermoe_cli.runtime.step.trainer import Trainer
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.rebalance import Rebalance
from hetermoe_cli.spec.world import World

Slices = dict[int, list[Tensor]]  # expert -> its masters and moments, in a fixed order; views of the stacked ones


def share_change(mesh: Mesh, change: Rebalance | None) -> Rebalance | None:
    """Collective: what process 0 says, as JSON."""
    text = change.model_dump_json().encode() if change and not mesh.process else b""
    size = torch.tensor([len(text)], dtype=torch.int64, device=mesh.wire)
    with peer_errors():
        dist.broadcast(size, 0)
        if not size.item():
            return None
        body = torch.frombuffer(bytearray(text or bytes(int(size))), dtype=torch.uint8).to(mesh.wire)
        dist.broadcast(body, 0)
    return Rebalance.model_validate_json(bytes(body.tolist()))


def move_experts(trainer: Trainer, model: ModelConfig, world: Layout | World, steps_taken: int) -> None:
    """Collective: bring the experts of every copy of the model to where `world` has them and let `trainer` run it.

    `world` differs from the trainer's in its placements only; `steps_taken`: optimizer steps so far.
    """
    world, before = World.of(world), trainer.layout
    layout = world.replica_of(trainer.mesh.process).layout
    trainer.release_gradients()
    travelling = {layer: list(group) for layer, group in groupby(moves(before, layout), key=lambda move: move.layer)}
    for layer, (old, new) in enumerate(zip(before.placement, layout.placement, strict=True)):
        shared = _shared_places(trainer.world, layer) != _shared_places(world, layer)
        shards = trainer.shards if shared else None
        if shards:
            shards.join(layer, trainer.optimizer, steps_taken)
        if old != new:
            _move_layer(trainer, model, layer, layout, travelling.get(layer, []), steps_taken)
        if shards:
            shards.cut(layer, world, trainer.optimizer, steps_taken)
    regroup(trainer.mesh, trainer.world, world)
    trainer.lay_out(world, Engine(layout, trainer.mesh, trainer.parts, model))


def _shared_places(world: World, layer: int) -> list[object]:
    """Of a layer, where experts are that several processes may hold: the replicated ones, with several copies all."""
    placements = [copy.layout.placement[layer] for copy in world.replicas]
    return [*placements] if len(placements) > 1 else [placements[0].replicated]


def _move_layer(
    trainer: Trainer, model: ModelConfig, layer: int, layout: Layout, travelling: list[Move], steps_taken: int
) -> None:
    parts, optimizer, mesh = trainer.parts, trainer.optimizer, trainer.mesh
    old, new = parts.experts_of(layer), layout.placement[layer]
    copies = new.replicated if layout.attends(mesh.rank, layer) else []
    hosted = _group(parts, mesh, model, layer, new.experts[mesh.rank], old.hosted)
    replicated = _group(parts, mesh, model, layer, copies, old.replicated)
    pairs = ((old.hosted, hosted), (old.replicated, replicated))
    dropped = [before for before, after in pairs if before is not after]
    made = [after for before, after in pairs if before is not after]
    _add_states(parts, optimizer, made, steps_taken)
    here, there = _slices(optimizer, dropped), _slices(optimizer, made)
    with torch.no_grad():
        for expert in there.keys() & here.keys():
            for source, target in zip(here[expert], there[expert], strict=True):
                target.copy_(source)
        _travel(mesh, travelling, here, there)
        for parameter in _parameters(made):
            if (master := optimizer.master(parameter)) is not parameter:
                parameter.copy_(master)
    optimizer.drop(_parameters(dropped))
    for parameter in _parameters(dropped):
        parts.masters.pop(parameter, None)
    parts.experts[layer] = ExpertParts(hosted, replicated)


def _group(
    parts: Parts, mesh: Mesh, model: ModelConfig, layer: int, experts: list[int], old: ExpertGroup
) -> ExpertGroup:
    """Room for `experts` in this rank's precision, with masters where it is narrow; `old` if it holds the same."""
    if experts == old.ids:
        return old
    group = ExpertGroup(model, layer, experts)
    parts.widen(group, mesh.device)
    parts.narrow(group.parameters())
    return group


def _add_states(parts: Parts, optimizer: AdamW, groups: list[ExpertGroup], steps_taken: int) -> None:
    """Let the optimizer step on new groups as if it always had; the moments are still to come."""
    masters = {parameter: parts.masters.get(parameter, parameter) for parameter in _parameters(groups)}
    for parameter, master in masters.items():
        optimizer.add(parameter, [master])
        optimizer.state[master] = fresh_state(optimizer, master, steps_taken)


def _parameters(groups: list[ExpertGroup]) -> list[nn.Parameter]:
    return [parameter for group in groups for parameter in group.parameters()]


def _slices(optimizer: AdamW, groups: list[ExpertGroup]) -> Slices:
    result: Slices = {}
    for group in groups:
        for position, expert in enumerate(group.ids):
            result[expert] = [s for p in group.parameters() for s in state_slices(optimizer, p, position)]
    return result


def _travel(mesh: Mesh, travelling: list[Move], here: Slices, there: Slices) -> None:
    """One layer's messages."""
    landed: list[tuple[Tensor, Tensor]] = []  # what came, and where it belongs
    operations = list(_operations(mesh, travelling, here, there, landed))
    if operations:
        with peer_errors():
            for work in dist.batch_isend_irecv(operations):
                work.wait()
    for message, place in landed:
        place.copy_(message)


def _operations(
    mesh: Mesh, travelling: list[Move], here: Slices, there: Slices, landed: list[tuple[Tensor, Tensor]]
) -> Iterator[dist.P2POp]:
    for move in travelling:
        for target in move.targets:
            if mesh.rank == move.source:
                for tensor in here[move.expert]:
                    yield dist.P2POp(dist.isend, mesh.on_wire(tensor), group=mesh.to_experts, group_peer=target)
            elif mesh.rank == target:
                for place in there[move.expert]:
                    message = place
                    if mesh.wire.type != place.device.type:
                        message = torch.empty_like(place, device=mesh.wire)
                        landed.append((message, place))
                    yield dist.P2POp(dist.irecv, message, group=mesh.to_experts, group_peer=move.source)

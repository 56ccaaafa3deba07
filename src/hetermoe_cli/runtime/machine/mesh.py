"""Mesh: this rank's place, its device, the process groups it talks through, and where messages lie."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.copies import Fetched
from hetermoe_cli.runtime.machine import local_sum
from hetermoe_cli.runtime.machine.neighbours import Mail, connect
from hetermoe_cli.runtime.machine.peers import DISK_TIMEOUT, TIMEOUT, peer_errors
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.world import World

Backend = Literal["gloo", "nccl"]
CPU = torch.device("cpu")
# their names since torch 2.13, or before
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Mesh:
    """This rank of a layout, which is `process` of all `world_size` ones, and its process groups.

    `to_experts`, `from_experts`: the ranks of this copy of the model, one a direction, so that the two never wait for
    each other. `attending`: those of all copies that attend, None where this one does not; `gathering`: those of this
    copy, where it shards all of the dense part. `shared`: by the processes that hold some parameters
    (World.communicators), where there are several and this is one of them; `regroup` changes it where experts move.
    `wire`: where messages lie, the device with NCCL, the host with gloo. `ordered`: whether this rank's lanes call in
    one static order over all of them, as NCCL demands. `processes`: of this copy's ranks. `mail`: of both directions
    and of sums, where all ranks of this copy compute on CPUs of one machine. `patient`: all processes, over gloo.
    `stages`: this copy's ranks once more, for what goes to the next pipeline stage and for what comes back, over
    borders of even and of odd numbers: what comes from one neighbour must not hold up what goes to the other.
    """

    rank: int
    world_size: int
    device: torch.device
    to_experts: dist.ProcessGroup
    from_experts: dist.ProcessGroup
    attending: dist.ProcessGroup | None
    wire: torch.device = CPU
    ordered: bool = False
    process: int = 0
    shared: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)
    gathering: dist.ProcessGroup | None = None
    processes: Sequence[int] = (0,)
    mail: Sequence[Mail] = ()
    patient: dist.ProcessGroup | None = None
    stages: Sequence[dist.ProcessGroup] = ()

    def on_wire(self, tensor: Tensor) -> Tensor:
        """`tensor` where messages lie; if it must come down from the device, this thread waits for it."""
        return tensor if tensor.device.type == self.wire.type else Fetched(tensor).wait()

    def all_reduce(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Sum over the ranks of `group` (None: all), in place."""
        message, ranks = self.on_wire(tensor), self._sharing(group)
        if len(ranks) > 1:
            local_sum.all_reduce(self.mail[2], message, ranks, self.rank)
        else:
            with peer_errors():
                dist.all_reduce(message, group=group)
        if message is not tensor:
            tensor.copy_(message, non_blocking=True)  # from pinned memory

    def _sharing(self, group: dist.ProcessGroup | None) -> list[int]:
        """Ranks of this copy, where all of `group` are such and share memory."""
        if not self.mail:
            return []
        members = dist.get_process_group_ranks(group)
        return [self.processes.index(p) for p in members] if set(members) <= set(self.processes) else []

    def all_gather(self, everyone: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
        """Every rank's `own` [n] into `everyone` [ranks * n], both on the wire."""
        ranks = self._sharing(group)
        if len(ranks) > 1:
            local_sum.all_gather(self.mail[2], everyone, own, ranks, self.rank)
            return
        with peer_errors():
            ALL_GATHER(everyone, own, group=group)

    def reduce_scatter(self, tensor: Tensor, share: int, group: dist.ProcessGroup) -> None:
        """Sum `tensor` [n] over the ranks of `group`, in place: this rank's part, one of `share` elements for each rank
        in turn (the last may have fewer), has its sum then, the others may have anything.
        """
        ranks = self._sharing(group)
        if len(ranks) > 1:
            local_sum.reduce_scatter(self.mail[2], tensor, ranks, self.rank, share)
        elif self.wire.type == "cpu":
            message = self.on_wire(tensor)
            _exchange(message, share, group)
            if message is not tensor:
                tensor.copy_(message, non_blocking=True)  # from pinned memory
        else:
            _scatter(tensor, share, group)

    def wait_for_disks(self) -> None:
        """Collective: until all have read or written their part of a checkpoint; PeerLost if one is gone."""
        with peer_errors():
            dist.all_reduce(torch.zeros(1), group=self.patient)

    def agree(self, digest: int) -> list[int]:
        """Every process' `digest`, by process."""
        found = [torch.zeros(1, dtype=torch.int64, device=self.wire) for _ in range(self.world_size)]
        with peer_errors():
            dist.all_gather(found, torch.tensor([digest], dtype=torch.int64, device=self.wire))
        return [int(one) for one in found]


def _exchange(tensor: Tensor, share: int, group: dist.ProcessGroup) -> None:
    """`Mesh.reduce_scatter` with gloo, whose own makes an all-reduce of a copy: every rank sends the others their
    parts, and adds up its own."""
    parts = torch.split(tensor, share)
    sizes = [len(part) for part in parts] + [0] * (dist.get_world_size(group) - len(parts))
    me = dist.get_rank(group)
    received = tensor.new_empty(len(sizes), sizes[me])
    with peer_errors():
        dist.all_to_all_single(received.view(-1), tensor, [sizes[me]] * len(sizes), sizes, group=group)
    if sizes[me]:
        torch.sum(received, 0, out=parts[me])


def _scatter(tensor: Tensor, share: int, group: dist.ProcessGroup) -> None:
    """`Mesh.reduce_scatter` with NCCL, which knows equal parts only."""
    lacking = share * dist.get_world_size(group) - tensor.numel()
    whole = torch.nn.functional.pad(tensor, (0, lacking)) if lacking else tensor
    first = dist.get_rank(group) * share
    part = whole[first : first + share]
    with peer_errors():
        REDUCE_SCATTER(part, whole, group=group)
    if lacking:
        mine = tensor[first : first + share]
        mine.copy_(part[: len(mine)])


def join(layout: Layout | World, accelerator: str, backend: Backend | None = None, *, shares: bool = True) -> Mesh:
    """Join the launcher's process group (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment).

    `accelerator`: this rank's device, cpu, cuda (that of its LOCAL_RANK) or cuda:N. `backend`, the same on all ranks:
    where some are cpu and some cuda, gloo. None: NCCL for CUDA. `shares`: exchange rows through shared memory where
    that can be. UserError if the launcher started another number of workers than the plan has ranks.
    """
    world, world_size = World.of(layout), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != world.size:
        raise UserError(
            f"world size is {world_size}, the plan has {world.size} ranks: "
            f"start exactly {world.size} workers or plan for {world_size} devices"
        )
    device = torch.device(accelerator)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index)
        torch.cuda.set_device(device)
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    wire = device if backend == "nccl" else CPU
    with peer_errors():
        _start(backend, wire)
        process = dist.get_rank()
        lanes, shared = _groups(world, process, wire)
        patient = dist.new_group(backend="gloo", timeout=DISK_TIMEOUT)
    replica = world.replica_of(process)
    mail = connect(replica.processes, 3, shares=shares and device == CPU) if backend == "gloo" else ()
    return Mesh(
        rank=replica.processes.index(process),
        world_size=world_size,
        device=device,
        to_experts=lanes[0],
        from_experts=lanes[1],
        attending=shared.get(world.attending),
        wire=wire,
        ordered=backend == "nccl",
        process=process,
        shared=shared,
        gathering=shared.get(tuple(replica.attending)) if replica.layout.gathers else None,
        processes=replica.processes,
        mail=mail,
        patient=patient,
        stages=lanes[2:],
    )


def _start(backend: Backend, wire: torch.device) -> None:
    if not dist.is_initialized():
        if backend == "nccl":  # kernels of several communicators start in the order of their calls (NCCL 2.26)
            os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
            os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")  # rows go ahead of compute kernels that wait
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=wire if backend == "nccl" else None)


def _groups(
    world: World, process: int, wire: torch.device
) -> tuple[list[dist.ProcessGroup], dict[tuple[int, ...], dist.ProcessGroup]]:
    """The lanes of this process' copy, and the groups of its shares by their members. All processes make all of them,
    in one order."""
    number, _ = world.seat(process)
    counts = [2 + 2 * min(2, replica.layout.borders) for replica in world.replicas]
    copies = zip(world.replicas, counts, strict=True)
    lanes = [[_new_group(replica.processes) for _ in range(count)] for replica, count in copies][number]
    shared = _communicators(world.communicators(), process)
    for lane in lanes:  # NCCL wants all ranks in a group's first call, and a first transfer may leave some out
        dist.all_reduce(torch.zeros(1, device=wire), group=lane)
    return lanes, shared


def _communicators(members: Iterable[tuple[int, ...]], process: int) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """Of these groups the ones that this process is in. All processes make all of them, in one order."""
    made = {ranks: _new_group(ranks) for ranks in members}
    return {ranks: group for ranks, group in made.items() if process in ranks}


def _new_group(members: Sequence[int]) -> dist.ProcessGroup:
    """It would not wait as long as the group of all processes: half an hour with gloo."""
    return dist.new_group(list(members), timeout=TIMEOUT)  # type: ignore[no-any-return]


def regroup(mesh: Mesh, before: World, after: World) -> None:
    """Collective, between two steps: groups of holders for `after` instead of `before`; those in both stay."""
    old, new = before.communicators(), after.communicators()
    with peer_errors():
        mesh.shared.update(_communicators([ranks for ranks in new if ranks not in old], mesh.process))
        for ranks in [ranks for ranks in mesh.shared if ranks not in new]:
            dist.destroy_process_group(mesh.shared.pop(ranks))

"""Mesh: this rank's place, its device and the process groups it talks through."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.layout import Layout

TIMEOUT = timedelta(minutes=10)


class PeerLost(Exception):
    """Another rank is gone: this one can only leave."""


@contextmanager
def peer_errors() -> Iterator[None]:
    """Around collective or point-to-point calls: their failure means that a peer died."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"lost a peer: {str(error).splitlines()[0]}") from error


def barrier() -> None:
    """Wait for all ranks; PeerLost if one is gone."""
    with peer_errors():
        dist.barrier()


@dataclass(frozen=True)
class Mesh:
    """Groups: one per transfer direction, so that the two never wait for each other; one of the attending ranks.

    `attending` is None on ranks that do not attend.
    """

    rank: int
    world_size: int
    device: torch.device
    to_experts: dist.ProcessGroup
    from_experts: dist.ProcessGroup
    attending: dist.ProcessGroup | None


def join(layout: Layout, accelerator: str) -> Mesh:
    """Join the launcher's process group (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment).

    UserError if the launcher started another number of workers than the plan has ranks.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != layout.world_size:
        raise UserError(
            f"world size is {world_size}, the plan has {layout.world_size} ranks: "
            f"start exactly {layout.world_size} workers or plan for {world_size} devices"
        )
    device = torch.device("cpu")
    if accelerator == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    with peer_errors():
        to_experts, from_experts, attending = _groups(layout, device)
    rank = dist.get_rank()
    return Mesh(
        rank=rank,
        world_size=world_size,
        device=device,
        to_experts=to_experts,
        from_experts=from_experts,
        attending=attending if rank in layout.attending else None,
    )


def _groups(layout: Layout, device: torch.device) -> tuple[dist.ProcessGroup, dist.ProcessGroup, dist.ProcessGroup]:
    cuda = device.type == "cuda"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=device if cuda else None)
    everyone = list(range(layout.world_size))
    lanes = dist.new_group(everyone), dist.new_group(everyone)
    attending = dist.new_group(layout.attending)
    for lane in lanes:  # NCCL wants all ranks in a group's first call, and a first transfer may leave some out
        dist.all_reduce(torch.zeros(1, device=device), group=lane)
    return *lanes, attending

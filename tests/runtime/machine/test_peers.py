"""What is told of a call to other ranks that failed."""

import pytest
import torch

from hetermoe_cli.runtime.machine.peers import PeerLost, peer_errors

NCCL = """NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error, NCCL version 2.27.5
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
socketProgress: Connection closed by remote peer"""
OWN = (
    "NCCL error in: NCCLUtils.cpp:77, invalid usage, NCCL version 2.27.5 Duplicate GPU detected : rank 0 and rank 1",
    "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.27.5 Cuda failure 2 'out of memory'",
)


@pytest.mark.parametrize(("text", "told"), [(NCCL, NCCL.replace("\n", " ")), ("", "")])
def test_the_whole_reason_is_told_in_one_line(text: str, told: str) -> None:
    with pytest.raises(PeerLost) as caught, peer_errors():
        raise RuntimeError(text)
    assert str(caught.value) == f"lost a peer: {told}"


@pytest.mark.parametrize("kind", [torch.AcceleratorError, torch.OutOfMemoryError])
def test_a_failure_of_the_own_device_is_no_lost_peer(kind: type[RuntimeError]) -> None:
    with pytest.raises(kind), peer_errors():
        raise kind("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("text", OWN)
def test_nor_is_what_nccl_could_not_do_here(text: str) -> None:
    with pytest.raises(RuntimeError, match="NCCL error"), peer_errors():
        raise RuntimeError(text)

"""What is told of a call to other ranks that failed."""

import pytest
import torch

from hetermoe_cli.runtime.peers import PeerLost, peer_errors

NCCL = """NCCL error in: NCCLUtils.cpp:77, invalid usage, NCCL version 2.27.5
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000"""


@pytest.mark.parametrize(("text", "told"), [(NCCL, NCCL.replace("\n", " ")), ("", "")])
def test_the_whole_reason_is_told_in_one_line(text: str, told: str) -> None:
    with pytest.raises(PeerLost) as caught, peer_errors():
        raise RuntimeError(text)
    assert str(caught.value) == f"lost a peer: {told}"


@pytest.mark.parametrize("kind", [torch.AcceleratorError, torch.OutOfMemoryError])
def test_a_failure_of_the_own_device_is_no_lost_peer(kind: type[RuntimeError]) -> None:
    with pytest.raises(kind), peer_errors():
        raise kind("CUDA error: device-side assert triggered")

"""bench_gpu.py needs a card; where its plans run does not."""

import sys
from pathlib import Path

from builders import make_inputs, make_profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import bench_gpu


def test_a_card_and_a_cpu_are_one_node() -> None:
    """`train` starts the workers of one node only, and finds each type's devices from 0 on."""
    profiles = {"card": make_profile("card", accelerator="cuda"), "cpu": make_profile("cpu", accelerator="cpu")}
    inputs = make_inputs([("card", 1), ("cpu", 1)], profiles=profiles).model_copy(
        update={"cluster": bench_gpu.one_machine([("card", 1), ("cpu", 1)])}
    )
    assert inputs.nodes == [[0, 1]]
    assert inputs.accelerators() == ["cuda", "cpu"]
    assert [inputs.device_index(rank) for rank in (0, 1)] == [0, 0]

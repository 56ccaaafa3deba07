"""The moment that traces count from is one for all ranks, and not before the last of them came."""

import time

import pytest
from workers import run_workers

from builders import make_layout
from hetermoe_cli.spec.layout import Layout


def work(rank: int, layout: Layout, nodes: list[list[int]]) -> tuple[float, float, float]:
    """Before, the common moment, after: seconds on the monotonic clock of the test's machine; that of rank 0 for all.

    With several nodes, every one has a clock of its own.
    """
    from hetermoe_cli.runtime.clocks import moment
    from hetermoe_cli.runtime.machine.mesh import join

    ahead = 1e5 * next((node for node, ranks in enumerate(nodes) if rank in ranks), 0)
    mesh, clock = join(layout, "cpu"), time.monotonic
    time.monotonic = lambda: clock() + ahead
    time.sleep(0.05 * rank)
    return clock(), moment.common_moment(mesh.wire, nodes) - ahead, clock()


@pytest.mark.parametrize("nodes", [[], [[0, 1, 2]], [[0, 1], [2]], [[0], [1, 2]]])
def test_all_ranks_have_one_start(nodes: list[list[int]]) -> None:
    layout = make_layout((1, 0, 0), (0, 2, 2))
    before, moments, after = zip(*run_workers(3, work, layout, nodes), strict=True)
    near = 0.02 if len(nodes) > 1 else 0.0  # half of the least round trip of many
    assert max(moments) - min(moments) <= near
    assert max(before) - near <= moments[0] <= min(after) + near

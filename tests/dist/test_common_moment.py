"""The moment that traces count from is one for all ranks, and not before the last of them came."""

import time

from workers import run_workers

from builders import make_layout
from hetermoe_cli.spec.layout import Layout


def work(rank: int, layout: Layout) -> tuple[float, float, float]:
    """Before, the common moment, after: seconds on the monotonic clock."""
    from hetermoe_cli.runtime.mesh import join
    from hetermoe_cli.runtime.moment import common_moment

    mesh = join(layout, "cpu")
    time.sleep(0.05 * rank)
    return time.monotonic(), common_moment(mesh.wire), time.monotonic()


def test_all_ranks_have_one_start() -> None:
    before, moments, after = zip(*run_workers(2, work, make_layout()), strict=True)
    assert moments[0] == moments[1]
    assert max(before) <= moments[0] <= min(after)

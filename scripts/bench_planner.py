"""The planner: speed-ups and gaps on the paper's set-ups (planner_grid.py), planning time at scale (planner_scale.py).

All iteration seconds are modelled, none measured; planning seconds are wall time on this machine.
"""

from typing import Any

import bars
import planner_grid
import planner_scale

TIME_LIMIT = 60.0  # seconds of search for each plan of the grid


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """Grid, then scale."""
    grid, plans = planner_grid.measure(TIME_LIMIT)
    scale, times = planner_scale.measure()
    return [*grid, *scale], {"grid": plans, "scale": times}


if __name__ == "__main__":
    bars.report(__doc__, measure)

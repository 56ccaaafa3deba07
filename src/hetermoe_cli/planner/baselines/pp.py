"""PP: a pipeline over layers with passes in turn, the best of pipeline_search/."""

from math import inf

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.baselines.rival import Rival
from hetermoe_cli.planner.pipeline_search.search import PipelineSearch

MOST_DEVICES = 128  # beyond that the search takes seconds


def pp(cost: CostModel, limit: int, *, pipelines: int | None = None) -> Rival:
    """The best pipeline of the searched space. `limit` is for the R of layouts; a pipeline needs more.

    `pipelines`: this many of equal depth over all devices, each device a stage, instead of all widths and depths.
    """
    if len(cost.devices) > MOST_DEVICES:
        return Rival(None, inf, f"not computed for more than {MOST_DEVICES} devices")
    search = PipelineSearch(cost, pipelines)
    found = search.ranked()
    if not found:
        return Rival(None, inf, "does not fit: no split of the layers over stages fits into memory")
    seconds, winner = found[0]
    for tuned in search.tuned(winner.setup, "GPipe"):
        if (piped := search.seconds(tuned)) < seconds:
            winner, seconds = tuned, piped
    return Rival(None, seconds, str(winner), found)

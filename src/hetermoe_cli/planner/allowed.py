"""What a training spec allows: numbers of micro-batches, what is recomputed, and how optimizer states are kept."""

from itertools import product
from typing import get_args

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.spec.train import DenseState, Recompute

FEW_CHOICES = 2  # experts a token


def micro_batch_counts(batch: int, limit: int) -> list[int]:
    """Every R that cuts `batch` sequences into equal micro-batches."""
    return [count for count in range(1, min(batch, limit) + 1) if batch % count == 0]


def recompute_choices(cost: CostModel) -> list[Recompute]:
    """What the training spec allows, cheapest first. `auto` sends rows again only of models with many choices a token:
    where these are few, experts do not keep much more than attention, and all that is searched takes longer."""
    wanted = cost.train.recompute
    if wanted != "auto":
        return [wanted]
    return [each for each in get_args(Recompute) if each != "full" or cost.model.top_k > FEW_CHOICES]


def state_choices(cost: CostModel) -> list[DenseState]:
    """What the training spec allows; whole optimizer states gain nothing over sharded ones."""
    wanted = cost.train.dense_state
    return ["optimizer", "full"] if wanted == "auto" else [wanted]


def kept_choices(cost: CostModel) -> list[tuple[Recompute, DenseState]]:
    """What is kept of activations and states; full ones exclude each other (ScheduleChoice)."""
    pairs = product(recompute_choices(cost), state_choices(cost))
    return [pair for pair in pairs if pair != ("full", "full")]

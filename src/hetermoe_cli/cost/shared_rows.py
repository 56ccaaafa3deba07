"""Rows of a dispatch that takes a token once to every rank that hosts some of its experts (`dispatch: per_device`).

How many these are depends on which experts are chosen together, which no expert load tells. Expected ones are those of
k different experts drawn at random. Where all are as likely that is exact (hypergeometric); else a rank counts as if it
hosted as many equal experts as make up its share of the rows. Modelled, not measured.
"""

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.cost.ports import Matrix, Ranks


def reached(share: NDArray[np.float64], experts: int, top_k: int) -> NDArray[np.float64]:
    """Chance that some of a token's k experts are among those with this share of all rows."""
    none = np.ones_like(share)
    for drawn in range(top_k):
        none *= np.maximum(1 - share * experts / (experts - drawn), 0.0)
    return 1 - none


def once_per_device(rows: Matrix, hosted: Ranks, ranks: Ranks, top_k: int) -> tuple[Matrix, Ranks]:
    """Of rows [world, experts] of every rank's tokens, those that go to ranks with some of their experts.

    `hosted`: experts, rank by rank, and the `ranks` that host them, in ascending order. Returns rows [world, hosts] and
    the ranks that host.
    """
    hosts, first = np.unique(ranks, return_index=True)
    if not len(hosts):
        return np.zeros((len(rows), 0)), hosts
    tokens, there = rows.sum(axis=1, keepdims=True) / top_k, rows[:, hosted]
    most = np.add.reduceat(there, first, axis=1)
    share = np.divide(most, top_k * tokens, out=np.zeros_like(most), where=tokens > 0)
    expected = tokens * reached(share, rows.shape[1], top_k)
    least = np.maximum.reduceat(there, first, axis=1)  # a token has an expert once
    return np.clip(expected, np.minimum(least, tokens), np.minimum(most, tokens)), hosts

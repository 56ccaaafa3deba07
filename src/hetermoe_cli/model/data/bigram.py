"""The bigram byte model: the simplest text model that any training run must beat."""

from typing import Any

import numpy as np
import numpy.typing as npt

from hetermoe_cli.model.data.corpus import VOCAB_SIZE
from hetermoe_cli.model.data.token_files import Tokens

LogTable = npt.NDArray[np.float64]


def fit_bigram(tokens: Tokens) -> LogTable:
    """log P(next byte | byte), [256, 256], counted on `tokens` with one added to every pair."""
    pairs = tokens[:-1].astype(np.int64) * VOCAB_SIZE + tokens[1:]
    counts = np.bincount(pairs, minlength=VOCAB_SIZE**2).reshape(VOCAB_SIZE, VOCAB_SIZE) + 1.0
    table: LogTable = np.log(counts / counts.sum(axis=1, keepdims=True))
    return table


def bigram_loss(table: LogTable, tokens: npt.NDArray[Any], targets: npt.NDArray[Any]) -> float:
    """Mean cross entropy in nats per byte of `targets` after `tokens`, integer arrays of one shape."""
    return float(-table[tokens, targets].mean())

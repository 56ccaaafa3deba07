"""Crossing: the hidden states that attending ranks of one pipeline stage send to those of the next one.

A stage's sequences go to its attending ranks in turn, so that a rank sends to those of the next stage that attend to
some of the same ones. Gradients go the same ways back.
"""

from typing import NamedTuple

import numpy as np

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.ports import Matrix, Ranks
from hetermoe_cli.schedule.action import Pass
from hetermoe_cli.spec.layout import Layout, in_both


class Crossing(NamedTuple):
    """[ports] seconds that each is busy with the forward transfer into a stage, and the ports that it may use."""

    busy: Matrix
    ports: tuple[int, ...]

    @classmethod
    def of(cls, cost: CostModel, layout: Layout, layer: int) -> "Crossing":
        """What crosses into the stage that begins with `layer`, for one micro-batch."""
        shared, before, after = shared_sequences(layout, layer)
        sent = np.zeros((layout.world_size, len(after)))
        sent[before] = shared * (cost.train.sequence_length * cost.row_bytes)
        pairs = [(before[a], after[b]) for a, b in np.argwhere(shared).tolist()]
        network = cost.network
        ports = {int(port) for s, d in pairs for port in (network.out_port[s, d], network.in_port[s, d])}
        return cls(network.busy(sent, after), tuple(sorted(ports)))

    def ports_of(self, direction: Pass) -> tuple[int, ...]:
        """The way back passes the other direction of every port."""
        if direction is Pass.FORWARD:
            return self.ports
        return tuple(sorted(port ^ 1 for port in self.ports))


def shared_sequences(layout: Layout, layer: int) -> tuple[Matrix, Ranks, Ranks]:
    """[before, after] sequences of a micro-batch that both attend to; the attending ranks on either side."""
    before, after = (layout.sequences_of(layout.span_at(at)) for at in (layer - 1, layer))
    shared = [[in_both(one, other) for other in after.values()] for one in before.values()]
    ranks = [np.array([*side], dtype=np.intp) for side in (before, after)]
    return np.array(shared, dtype=np.float64), ranks[0], ranks[1]

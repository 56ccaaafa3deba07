"""Crossing: the hidden states that attending ranks of one pipeline stage send to those of the next one, or of the head.

A stage's sequences go to its attending ranks in turn, and so do tokens to ranks of the head, so that a rank sends to
those that have some of the same ones. Gradients go the same ways back.
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
    def of(cls, cost: CostModel, layout: Layout, layer: int, micro_batch: int = 0) -> "Crossing":
        """What crosses into the stage that begins with `layer`, or into the head, for one micro-batch."""
        tokens = layout.sequences_per_micro_batch * cost.train.sequence_length
        shared, before, after = shared_tokens(layout, layer, tokens, micro_batch)
        sent = np.zeros((layout.world_size, len(after)))
        sent[before] = shared * cost.row_bytes
        pairs = [(before[a], after[b]) for a, b in np.argwhere(shared).tolist() if before[a] != after[b]]
        network = cost.network
        ports = {int(port) for s, d in pairs for port in (network.out_port[s, d], network.in_port[s, d])}
        return cls(network.busy(sent, after), tuple(sorted(ports)))

    def ports_of(self, direction: Pass) -> tuple[int, ...]:
        """The way back passes the other direction of every port."""
        if direction is Pass.FORWARD:
            return self.ports
        return tuple(sorted(port ^ 1 for port in self.ports))


def shared_tokens(layout: Layout, layer: int, tokens: int, micro_batch: int = 0) -> tuple[Matrix, Ranks, Ranks]:
    """[before, after] of a micro-batch's `tokens`, those that both have; the ranks on either side (Layout.crossing)."""
    before, after = layout.crossing(layer, tokens, micro_batch)
    shared = [[in_both(one, other) for other in after.values()] for one in before.values()]
    ranks = [np.array([*side], dtype=np.intp) for side in (before, after)]
    return np.array(shared, dtype=np.float64), ranks[0], ranks[1]

"""Rival methods under the same cost model, memory check and simulator; each with its own best R, window and recompute.

ep, hetero_ep       even.py      every device attends and hosts: in equal shares, or in proportion to its speed
dist_ep             roles.py     the fastest attention type attends, the others host; nothing overlapped
gather_squeeze      roles.py     the same roles, zebra, the paper's Algorithm 1 moves experts back
ep_ideal            ideal.py     EP on each type alone, throughputs added; no real system reaches it
ep_ideal_charged    ideal.py     the same, and the all-reduce of all gradients between the types
pp                  pp.py        layers over stages, tuned under memory limits; data parallel replicas

All-to-alls of EP overlap with other micro-batches, those of DistEP with nothing; on demand each cuts them into parts
(parts.py), as the paper's do.

Assumptions in the reproduction: docs/paper.md. What has no Layout cannot be run by this engine, and its
Rival says in words how it runs.
"""

from collections.abc import Callable

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.baselines.even import ep, hetero_ep
from hetermoe_cli.planner.baselines.ideal import ep_ideal, ep_ideal_charged
from hetermoe_cli.planner.baselines.pp import pp
from hetermoe_cli.planner.baselines.rival import Rival
from hetermoe_cli.planner.baselines.roles import dist_ep, gather_squeeze

RIVALS: dict[str, Callable[[CostModel, int], Rival]] = {
    "ep": ep,
    "dist_ep": dist_ep,
    "gather_squeeze": gather_squeeze,
    "hetero_ep": hetero_ep,
    "ep_ideal": ep_ideal,
    "ep_ideal_charged": ep_ideal_charged,
    "pp": pp,
}

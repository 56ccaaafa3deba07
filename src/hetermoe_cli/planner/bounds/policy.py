"""One step of policy iteration: the LP of the potentials that are best while every event's way onward is fixed."""

from typing import TYPE_CHECKING

import highspy
import numpy as np

from hetermoe_cli.planner.arrays import FloatArray, IntArray
from hetermoe_cli.planner.solver import quiet_highs

if TYPE_CHECKING:
    from hetermoe_cli.planner.bounds.potentials import Stretch


class PotentialsLP:
    """Columns: a potential for every event, then what each pattern's layers add, then what the heads add (forward, by
    pattern) or the end of the window (backward)."""

    def __init__(self, stretch: "Stretch", worth: FloatArray) -> None:
        self.stretch, self.count, self.patterns = stretch, len(stretch.events), len(stretch.every)
        self.highs = quiet_highs()
        self._columns(worth, highspy.kHighsInf)
        self._layers(stretch.ways, (stretch.ways - worth[None, :, None]).argmax(1))
        self._border()

    def solve(self) -> FloatArray | None:
        """[events] potentials; None if there are none that are best."""
        self.highs.run()
        if self.highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        return np.array(self.highs.getSolution().col_value)[: self.count]

    def _columns(self, worth: FloatArray, infinity: float) -> None:
        stretch, gains = self.stretch, np.zeros(self.count)
        if stretch.part == "forward":
            gains[int((stretch.edge - worth).argmax())] -= 1.0  # where the chain begins
        else:
            np.subtract.at(gains, (stretch.heads - worth[:, None]).argmax(0), stretch.last)
        nothing = np.array([], dtype=np.int32)
        for gain in gains.tolist():
            self.highs.addCol(-gain, -stretch.most, stretch.most, 0, nothing, np.array([]))
        ends = stretch.last.tolist() if stretch.part == "forward" else [1.0]
        for weight in [*stretch.every.tolist(), *ends]:
            free = infinity if weight else 0.0
            self.highs.addCol(-weight, -free, free, 0, nothing, np.array([]))

    def _layers(self, ways: FloatArray, onward: IntArray) -> None:
        """A layer adds at most what it does from any event; one without a way counts as left out."""
        for s, p in np.ndindex(self.count, self.patterns):
            t = int(onward[s, p])
            way = float(ways[s, t, p])
            if self.stretch.every[p] and np.isfinite(way):
                self._at_most(way, {self.count + p: 1.0} | ({s: -1.0, t: 1.0} if s != t else {}))

    def _border(self) -> None:
        stretch, first = self.stretch, self.count + self.patterns
        if stretch.part != "forward":
            for s, left in enumerate(stretch.edge.tolist()):
                self._at_most(left, {first: 1.0, s: -1.0})
            return
        for s, p in np.ndindex(self.count, self.patterns):
            if stretch.last[p] and np.isfinite(stretch.heads[s, p]):
                self._at_most(float(stretch.heads[s, p]), {first + p: 1.0, s: -1.0})

    def _at_most(self, most: float, entries: dict[int, float]) -> None:
        index, values = np.array(list(entries), dtype=np.int32), np.array(list(entries.values()))
        self.highs.addRow(-1e30, most, len(index), index, values)

"""Group times: seconds of a composition as a piecewise linear function of its share of the batch."""

from bisect import bisect_right
from dataclasses import dataclass, replace
from math import inf

from hetermoe_cli.planner.allowed import micro_batch_counts
from hetermoe_cli.planner.cluster.choices import options
from hetermoe_cli.planner.cluster.compositions import Composition
from hetermoe_cli.planner.cluster.evaluate import Evaluated, evaluate
from hetermoe_cli.planner.cluster.parts import Kernels, Part
from hetermoe_cli.planner.cluster.synchronise import expected_seconds
from hetermoe_cli.spec.inputs import Inputs

USUAL = 6  # micro-batches of a group, about
TRIES = 4  # options that are evaluated at a point, if their estimates are better than what was found


@dataclass(frozen=True)
class Point:
    """The best that was found for a share, as one of so many groups: seconds with its part of synchronising."""

    seconds: float
    found: Evaluated
    groups: int


class Curves:
    """Points of every composition, computed when they are asked for."""

    def __init__(self, inputs: Inputs, limit: int, most_groups: int | None) -> None:
        self.inputs, self.limit, self.most_groups = inputs, limit, most_groups
        self.kernels = Kernels(inputs)
        self.points: dict[Composition, dict[int, Point | None]] = {}
        self.evaluated = 0
        self._parts: dict[tuple[Composition, int], Part] = {}

    def part(self, composition: Composition, groups: int) -> Part:
        """The composition made ready, as one of `groups`."""
        if (composition, groups) not in self._parts:
            self._parts[composition, groups] = Part(self.inputs, composition, groups)
        return self._parts[composition, groups]

    def point(self, composition: Composition, sequences: int) -> Point | None:
        """The point at `sequences`; None where no layout fits."""
        known = self.points.setdefault(composition, {})
        if sequences not in known:
            found = [self._best(composition, sequences, groups) for groups in self.sharing(composition)]
            known[sequences] = next((point for point in found if point), None)
        return known[sequences]

    def _best(self, composition: Composition, sequences: int, alike: int) -> Point | None:
        part, best = self.part(composition, alike), None
        groups = self._groups(composition)
        counts = micro_batch_counts(sequences, self.limit)
        for option in options(part, self.kernels, sequences, counts)[:TRIES]:
            if best and option.seconds >= best.seconds:
                break
            found = evaluate(part, self.kernels, option)
            self.evaluated += 1
            if found:
                seconds = found.compute + found.optimizer + expected_seconds(part, found, groups)
                if best is None or seconds < best.seconds:
                    best = Point(seconds, found, alike)
        return best

    def promise(self, composition: Composition, sequences: int) -> float:
        """An estimate of a point's seconds, of two numbers of micro-batches only; infinite where none of these fits."""
        counts = sorted(micro_batch_counts(sequences, self.limit), key=lambda count: abs(count - USUAL))[:2]
        for groups in self.sharing(composition):
            found = options(self.part(composition, groups), self.kernels, sequences, counts)
            if found:
                return found[0].seconds
        return inf

    def sharing(self, composition: Composition) -> list[int]:
        """Over how many groups such a group may share out states: what all of its kind are; and where it is the only
        one and does not fit so, as many as the cluster has devices for with others beside it."""
        alike = self.alike(composition)
        more = self._groups(composition) if alike == 1 and self._shares else 1
        return sorted({alike, max(alike, more)})

    @property
    def _shares(self) -> bool:
        return self.inputs.train.dense_state != "replicated"

    def alike(self, composition: Composition) -> int:
        """How many such groups the cluster has devices for."""
        sizes = [node.count * node.devices for node in self.inputs.cluster.nodes]
        most = min(size // count for size, count in zip(sizes, composition, strict=True) if count)
        return min(most, self.most_groups or most)

    def _groups(self, composition: Composition) -> int:
        """About how many groups there are if they are like this one."""
        sizes = [node.count * node.devices for node in self.inputs.cluster.nodes]
        whole = max(1, round(sum(sizes) / sum(composition)))
        return min(whole, self.most_groups or whole)

    def correct(self, composition: Composition, sequences: int, compute: float) -> float:
        """Put what the replay says of a point's compute in place of its estimate; how far off that was."""
        point = self.points[composition][sequences]
        assert point is not None
        error = abs(compute / point.found.compute - 1)
        found = replace(point.found, compute=compute)
        self.points[composition][sequences] = replace(
            point, seconds=point.seconds + compute - point.found.compute, found=found
        )
        return error

    def refuse(self, composition: Composition, sequences: int, groups: int) -> None:
        """The layout did not fit as one of `groups`; if the point took them for more, it is looked for again."""
        point = self.points[composition][sequences]
        fewer = point is not None and groups < point.groups and self._shares
        self.points[composition][sequences] = self._best(composition, sequences, groups) if fewer else None

    def reconsider(self, composition: Composition, sequences: int, groups: int) -> bool:
        """Look for a better layout as one of `groups`, if the point took states for shared out over fewer; whether
        there is one."""
        point = self.points[composition][sequences]
        if point is None or point.groups >= groups or not self._shares:
            return False
        found = self._best(composition, sequences, groups)
        better = found is not None and found.seconds < point.seconds
        self.points[composition][sequences] = found if better else replace(point, groups=groups)
        return better

    def refused(self) -> set[tuple[Composition, int]]:
        """Where no layout fits."""
        return {(c, share) for c, points in self.points.items() for share, point in points.items() if point is None}

    def known(self, composition: Composition) -> list[tuple[int, float]]:
        """(sequences, seconds) of the points that fit, by sequences; made monotone, as more work takes no less time."""
        result, most = [], 0.0
        for sequences, point in sorted(self.points.get(composition, {}).items()):
            if point:
                most = max(most, point.seconds)
                result.append((sequences, most))
        return result


def time_at(points: list[tuple[int, float]], sequences: int) -> float:
    """Interpolated seconds; infinite outside the points."""
    place = bisect_right([x for x, _ in points], sequences)
    if place and points[place - 1][0] == sequences:
        return points[place - 1][1]
    if not 0 < place < len(points):
        return inf
    (low, before), (high, after) = points[place - 1], points[place]
    return before + (after - before) * (sequences - low) / (high - low)

"""World: the full copies of a model that train side by side, each on processes of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from hetermoe_cli.spec.layout import Layout


class Share(NamedTuple):
    """What of one layer the same processes hold, so that its gradients are summed over them: possibly the dense part,
    and experts in ascending order. `holders` ascend."""

    holders: tuple[int, ...]
    dense: bool
    experts: tuple[int, ...]


@dataclass(frozen=True)
class Replica:
    """A copy of the model: local rank r of `layout` is process `processes[r]` (they ascend).

    Of every global batch it takes its own sequences from number `first` on.
    """

    layout: Layout
    processes: tuple[int, ...]
    first: int = 0

    @property
    def sequences(self) -> int:
        """Sequences that it takes of a global batch."""
        return self.layout.sequences_per_micro_batch * self.layout.micro_batches

    @property
    def attending(self) -> list[int]:
        """Processes that attend."""
        return [self.processes[rank] for rank in self.layout.attending]

    def attending_at(self, layer: int) -> list[int]:
        """Processes that attend in a layer; of the number after the last one, that have norm and head."""
        return [self.processes[rank] for rank in self.layout.attending_at(layer)]

    def holders(self, layer: int, expert: int) -> list[int]:
        """Processes that hold an expert: its host, or all that attend in its layer."""
        placement = self.layout.placement[layer]
        if expert in placement.replicated:
            return self.attending_at(layer)
        return [self.processes[rank] for rank, hosted in enumerate(placement.experts) if expert in hosted]


@dataclass(frozen=True)
class World:
    """All copies; their processes are numbered without a gap."""

    replicas: tuple[Replica, ...]

    @classmethod
    def of(cls, layout: "Layout | World") -> "World":
        """A layout as the only copy, on all processes; a world as it is."""
        return layout if isinstance(layout, World) else cls.side_by_side([(layout, range(layout.world_size))])

    @classmethod
    def side_by_side(cls, copies: Sequence[tuple[Layout, Sequence[int]]]) -> "World":
        """Layouts with the processes of each; contiguous parts of the batch in this order."""
        sequences = [layout.sequences_per_micro_batch * layout.micro_batches for layout, _ in copies]
        firsts = accumulate(sequences, initial=0)
        return cls(
            tuple(Replica(layout, tuple(at), first) for (layout, at), first in zip(copies, firsts, strict=False))
        )

    @property
    def size(self) -> int:
        """Processes."""
        return sum(len(replica.processes) for replica in self.replicas)

    @property
    def sequences(self) -> int:
        """The global batch."""
        return sum(replica.sequences for replica in self.replicas)

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.replicas[0].layout.layers

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return self.replicas[0].layout.experts

    @cached_property
    def attending(self) -> tuple[int, ...]:
        """Processes of all copies that attend."""
        return tuple(sorted(process for replica in self.replicas for process in replica.attending))

    def attending_at(self, layer: int) -> tuple[int, ...]:
        """Processes of all copies that hold a layer's dense part; of the number after the last, norm and head."""
        return tuple(sorted(process for replica in self.replicas for process in replica.attending_at(layer)))

    def seat(self, process: int) -> tuple[int, int]:
        """Which copy a process belongs to, and its rank there."""
        return next(
            (number, replica.processes.index(process))
            for number, replica in enumerate(self.replicas)
            if process in replica.processes
        )

    def replica_of(self, process: int) -> Replica:
        """The copy that a process belongs to."""
        return self.replicas[self.seat(process)[0]]

    def holders(self, layer: int, expert: int) -> tuple[int, ...]:
        """Processes of all copies that hold an expert."""
        return tuple(sorted(process for replica in self.replicas for process in replica.holders(layer, expert)))

    def shares(self, layer: int) -> list[Share]:
        """What of a layer several processes may hold; of the number after the last one, of norm and head.

        That of the attending ones comes first, then by holders: all processes sum their shares in this order. An expert
        with one host in the world is in none. Where one copy has an expert on all its attending ranks and another on
        one host, their sum is right: those hold parts of their copy's gradient and this one all of it.
        """
        together: dict[tuple[int, ...], list[int]] = {self.attending_at(layer): []}
        for expert in range(self.experts) if layer < self.layers else ():
            alone = len(self.replicas) == 1
            if not alone or expert in self.replicas[0].layout.placement[layer].replicated:
                together.setdefault(self.holders(layer, expert), []).append(expert)
        dense, *rest = together.items()
        return [Share(dense[0], True, tuple(dense[1])), *(Share(h, False, tuple(e)) for h, e in sorted(rest))]

    @property
    def shares_states(self) -> bool:
        """Whether holders of an expert share its optimizer states: as soon as one copy does not, none can."""
        return all(replica.layout.schedule.shares_states for replica in self.replicas)

    @property
    def shares_dense_states(self) -> bool:
        """Whether all that attend share optimizer states of the dense part, whose weights are whole everywhere."""
        return all(replica.layout.schedule.dense_state == "optimizer" for replica in self.replicas)

    def counts_dense(self, process: int) -> bool:
        """Whether the dense part of the copy that a process belongs to is the one that is saved and in the norm."""
        return self.attending[0] in self.replica_of(process).attending

    def communicators(self) -> list[tuple[int, ...]]:
        """The holders of all shares and the attending processes of every copy that gathers, each once, the attending
        processes of all copies first: equal on all processes."""
        found = {tuple(replica.attending): None for replica in self.replicas if replica.layout.gathers}
        found |= {share.holders: None for layer in range(self.layers + 1) for share in self.shares(layer)}
        first, *rest = {self.attending: None} | found
        return [first, *sorted(rest)]

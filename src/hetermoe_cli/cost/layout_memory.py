"""LayoutMemory: parameters and bytes of every rank of one layout."""

from hetermoe_cli.cost.device import ExpertRows
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.sharers import Sharers
from hetermoe_cli.spec.layout import Layout, Span
from hetermoe_cli.spec.plan import Memory


class LayoutMemory:
    """What each rank holds. `sharers`: who shares out states, where groups do so together."""

    sharers: Sharers | None = None

    def __init__(self, cost: CostModel, layout: Layout) -> None:
        self.cost, self.layout = cost, layout

    def _part(self, span: Span) -> Span | None:
        """A pipeline stage, if it is not the whole model."""
        return span if self.layout.pipeline or self.layout.head else None

    def parameters(self, rank: int) -> float:
        """Parameters that `rank` updates; of what several ranks share out, its share."""
        return self._parameters(rank) + self._head_parameters(rank)

    def _head_parameters(self, rank: int) -> float:
        """Of a head that is not with the last attention."""
        layout, schedule = self.layout, self.layout.schedule
        if not layout.head or not layout.head[rank]:
            return 0.0
        share = self.cost.state_share(schedule, len(layout.head_ranks))
        if self.sharers:
            share = 1 / int(self.sharers.dense[-1])
        return share * self.cost.head_parameters

    def _parameters(self, rank: int) -> float:
        model, span = self.cost.model, self.layout.span_of(rank)
        attends, dense = self.layout.sequences_per_rank[rank] > 0, self.cost.dense_of(self._part(span))
        if self.sharers:
            local = [self.layout.local_experts(layer, rank) for layer in range(model.layers)]
            parts = [(1 / counts[held]).sum() for counts, held in zip(self.sharers.experts, local, strict=True)]
            return attends * self._shared_dense(span, dense) + model.expert_parameters * float(sum(parts))
        cost, schedule, attending = self.cost, self.layout.schedule, len(span.attending)
        hosted = sum([len(placement.experts[rank]) for placement in self.layout.placement])
        result = hosted * cost.state_share(schedule, 1) * model.expert_parameters
        if not attends:
            return result
        copies = sum([len(self.layout.placement[layer].replicated) for layer in span.layers])
        result += copies * cost.state_share(schedule, attending) * model.expert_parameters
        return result + cost.dense_share(schedule, attending) * dense

    def _shared_dense(self, span: Span, dense: int) -> float:
        """Dense parameters that an attending rank of a stage updates where `sharers` share them out."""
        state = self.layout.schedule.dense_state
        if state != "optimizer" or not self.sharers:
            return dense / (len(span.attending) if state == "full" else 1)
        return self.sharers.share(self.cost, span, dense)

    def memory(self, rank: int) -> Memory:
        """Bytes of `rank` by kind, under the inputs' expert load."""
        layout, span = self.layout, self.layout.span_of(rank)
        return self.cost.memory(
            self.cost.of(rank),
            sequences=layout.sequences_per_rank[rank],
            sequences_per_micro_batch=layout.sequences_per_micro_batch,
            schedule=span.schedule,
            hosted=[len(placement.experts[rank]) for placement in layout.placement],
            replicated=[len(layout.placement[layer].replicated) for layer in span.layers],
            rows=None if self.cost.shares is None else self.assumed_rows(rank),
            attending=len(span.attending),
            stepped=self.parameters(rank),
            windows=layout.windows_in_flight(rank),
            on_shift=layout.on_shift_at_once(rank) / layout.schedule.window,
            span=self._part(span),
            head=layout.head_sequences(rank) if layout.head else None,
        )

    def hosted_rows(self, rank: int) -> list[list[float]]:
        """Per layer, the rows of a micro-batch for each expert that `rank` hosts, under the inputs' expert load."""
        total = self.layout.sequences_per_micro_batch
        placements = enumerate(self.layout.placement)
        return [self.cost.expert_rows(total, layer, placement.experts[rank]) for layer, placement in placements]

    def assumed_rows(self, rank: int) -> ExpertRows:
        """Rows of a micro-batch for every expert that `rank` holds, under the inputs' expert load."""
        hosted, own = self.hosted_rows(rank), self.layout.sequences_per_rank[rank]
        copies = [
            self.cost.expert_rows(own, layer, placement.replicated)
            for layer, placement in enumerate(self.layout.placement)
            if placement.replicated and self.layout.attends(rank, layer)
        ]
        rows_of_layer = self.cost.rows_per_expert(self.layout.sequences_per_micro_batch) * self.cost.model.experts
        return ExpertRows(
            hosted=[count for rows in hosted for count in rows],
            replicated=[count for rows in copies for count in rows],
            largest_share=max(map(sum, hosted)) / rows_of_layer,
        )

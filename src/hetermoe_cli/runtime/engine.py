"""The zebra engine: one kind of worker that runs its part of a Schedule on real tensors and messages."""

import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hetermoe_cli.model.documents import Documents
from hetermoe_cli.model.transformer import DenseModel
from hetermoe_cli.runtime.clock import Clock
from hetermoe_cli.runtime.dispatcher import Arrivals, LayerMap, Routing
from hetermoe_cli.runtime.lanes import Handoff, Lanes, exchange
from hetermoe_cli.runtime.mesh import Mesh, peer_errors
from hetermoe_cli.runtime.parts import Parts
from hetermoe_cli.runtime.stage import AttentionStage, Border, ExpertStage
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.schedule.schedule import Schedule, inputs
from hetermoe_cli.spec.layout import Layout

Place = tuple[int, int]  # (layer, micro-batch)
Batch = Callable[[int], tuple[Tensor, Tensor]]  # micro-batch -> this rank's tokens and targets, both [B, S]


class Engine:
    """Runs passes of a schedule. After `run`, gradients are accumulated in the parts; `loss` and `router_losses` [2]
    (auxiliary and z-loss) are this rank's sums."""

    def __init__(self, layout: Layout, mesh: Mesh, parts: Parts, hidden_size: int) -> None:
        self.layout, self.mesh, self.parts = layout, mesh, parts
        self._width = hidden_size
        self._maps = [LayerMap(layout, layer, mesh.rank) for layer in range(layout.layers)]
        self._lanes = Lanes(mesh)
        self._handlers: dict[tuple[Kind, Pass], Callable[[Action], None]] = {
            (Kind.ATTENTION, Pass.FORWARD): self._attention_forward,
            (Kind.ATTENTION, Pass.BACKWARD): self._attention_backward,
            (Kind.EXPERT, Pass.FORWARD): self._expert_forward,
            (Kind.EXPERT, Pass.BACKWARD): self._expert_backward,
            (Kind.HEAD, Pass.FORWARD): self._head,
            (Kind.HEAD, Pass.BACKWARD): self._head,
        }

    def run(
        self,
        schedule: Schedule,
        batch: Batch,
        loss_scale: float,
        clock: Clock,
        after: Callable[[Action], None] = lambda action: None,
        gradients: Callable[[int], Tensor] = lambda layer: torch.empty(0),
    ) -> None:
        """Run all compute actions of this rank but S and O, and `after` each; `loss_scale` multiplies the summed loss
        in backward. `gradients`: of a layer, what attending ranks share, summed over them in place."""
        self._schedule, self._batch, self._loss_scale, self._clock = schedule, batch, loss_scale, clock
        self._attention: dict[Place, AttentionStage] = {}
        self._documents: dict[int, Documents | None] = {}
        self._heads: dict[int, Border] = {}
        self._experts: dict[Place, ExpertStage] = {}
        self._routings: dict[Place, Routing] = {}
        self._routed: dict[Place, Future[None]] = {
            (layer, j): Future() for layer in range(self.layout.layers) for j in range(self.layout.micro_batches)
        }
        self._arrivals: dict[Place, Arrivals] = {}
        self._kept: dict[Action, Tensor] = {}  # rows that stay on this rank
        self.loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        self.router_losses = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        self.counts: NDArray[np.int32] = np.zeros(
            (self.layout.layers, self.layout.micro_batches, self.layout.experts), np.int32
        )
        training = any(action.direction is Pass.BACKWARD for action in schedule.compute[self.mesh.rank])
        reduces = {inputs(t, self.layout.layers)[0]: t for t in schedule.transfers if t.kind is Kind.REDUCE}
        self._lanes.start(schedule, self._carry)
        try:
            with torch.set_grad_enabled(training):
                for action in schedule.compute[self.mesh.rank]:
                    if (action.kind, action.direction) in self._handlers:
                        self._handlers[action.kind, action.direction](action)
                        after(action)
                        if reduce := reduces.get(action):
                            self._clock.sent(reduce)
                            self._lanes.put(reduce, gradients(reduce.layer), [])
            self._lanes.finish()
            for reduce in reduces.values():
                if handoff := self._lanes.get(reduce):
                    handoff.take()
        except BaseException as error:
            self._abort(error)
            raise

    def _abort(self, error: BaseException) -> None:
        """Wake the lanes: what they wait for will never come."""
        for future in self._routed.values():
            if not future.done():
                future.set_exception(error)
        self._lanes.abort(error)

    # Compute tasks. Each waits for its rows, works, reports to the clock, then hands its rows to a lane.

    def _attention_forward(self, action: Action) -> None:
        layer, j = place = action.layer, action.micro_batch
        inputs, arrived = self._border_before(layer, j)
        began = time.monotonic()
        dense = self._dense()
        if layer == 0:
            self._documents[j] = dense.documents(self._batch(j)[0])
        recompute = self.layout.schedule.recompute_attention
        stage = AttentionStage.forward(dense, layer, inputs, recompute, self._documents[j])
        routed = stage.outputs()
        if routed.losses is not None:
            self.router_losses += routed.losses.detach()
        routing = self._maps[layer].route(routed.experts)
        rows = routing.gather(stage.take_rows())
        self._attention[place], self._routings[place] = stage, routing
        self._routed[place].set_result(None)
        self.counts[layer, j] = routing.by_expert
        self._clock.counted(layer, j, routing)
        self._clock.compute(action, began, arrived)
        self._send(Action(Kind.DISPATCH, Pass.FORWARD, layer, j), rows, routing.sizes)

    def _expert_forward(self, action: Action) -> None:
        layer, j = place = action.layer, action.micro_batch
        rows, arrived = self._receive(Action(Kind.DISPATCH, Pass.FORWARD, layer, j))
        began = time.monotonic()
        arrivals = self._arrivals[place]
        parts = self.parts.experts_of(layer)
        recompute = self.layout.schedule.recompute_experts
        stage = ExpertStage.forward(parts, arrivals.group(rows), arrivals.counts, recompute)
        outputs = arrivals.ungroup(stage.take_outputs())
        if torch.is_grad_enabled():
            self._experts[place] = stage
        self._clock.compute(action, began, arrived, arrivals.counts)
        self._send(Action(Kind.COMBINE, Pass.FORWARD, layer, j), outputs, arrivals.sizes)

    def _head(self, action: Action) -> None:
        last, j = self.layout.layers - 1, action.micro_batch
        border, arrived = self._border_before(self.layout.layers, j)
        began = time.monotonic()
        assert isinstance(border, Border)
        loss = self._dense().loss(border.combined(), self._batch(j)[1].to(self.mesh.device))
        self.loss += loss.detach()
        if action.direction is Pass.FORWARD:
            self._clock.compute(action, began, arrived)
            return
        (loss * self._loss_scale).backward()  # type: ignore[no-untyped-call]
        self._heads[j] = border
        rows = self._routings[last, j].gather_choices(border.gradients()[1])
        self._clock.compute(action, began, arrived)
        self._send(Action(Kind.COMBINE, Pass.BACKWARD, last, j), rows, self._routings[last, j].sizes)

    def _expert_backward(self, action: Action) -> None:
        layer, j = place = action.layer, action.micro_batch
        gradient, arrived = self._receive(Action(Kind.COMBINE, Pass.BACKWARD, layer, j))
        began = time.monotonic()
        arrivals = self._arrivals[place]
        rows = arrivals.ungroup(self._experts.pop(place).backward(arrivals.group(gradient)))
        self._clock.compute(action, began, arrived, arrivals.counts)
        self._send(Action(Kind.DISPATCH, Pass.BACKWARD, layer, j), rows, arrivals.sizes)

    def _attention_backward(self, action: Action) -> None:
        layer, j = place = action.layer, action.micro_batch
        rows, arrived = self._receive(Action(Kind.DISPATCH, Pass.BACKWARD, layer, j))
        began = time.monotonic()
        routing = self._routings.pop(place)
        if layer == self.layout.layers - 1:
            following = self._heads.pop(j)
        else:
            following = self._attention.pop((layer + 1, j)).border
        hidden, _, weights = following.gradients()
        stage, rows = self._attention[place], routing.to_tokens(rows).sum(dim=1)
        outputs = stage.backward(hidden, rows, weights, self._loss_scale)
        if outputs is None:
            del self._attention[place]
            self._clock.compute(action, began, arrived)
            return
        before = self._routings[layer - 1, j]
        gradients = before.gather_choices(outputs)
        self._clock.compute(action, began, arrived)
        self._send(Action(Kind.COMBINE, Pass.BACKWARD, layer - 1, j), gradients, before.sizes)

    # Rows in and out.

    def _border_before(self, layer: int, j: int) -> tuple[Border | Tensor, float]:
        """Inputs of the stage after layer - 1, and when they arrived: tokens for the first stage."""
        if layer == 0:
            return self._batch(j)[0].to(self.mesh.device), 0.0
        before = layer - 1, j
        rows, arrived = self._receive(Action(Kind.COMBINE, Pass.FORWARD, *before))
        border = self._attention[before].border_after(self._routings[before].to_tokens(rows))
        if not torch.is_grad_enabled():
            del self._attention[before], self._routings[before]
        return border, arrived

    def _send(self, action: Action, rows: Tensor, sizes: list[int]) -> None:
        """Hand rows (sorted by target rank, `sizes` each) to the lane; this rank's own stay here.

        Others get them in the precision of the exchange.
        """
        start, own = sum(sizes[: self.mesh.rank]), sizes[self.mesh.rank]
        # an empty slice would keep all rows alive
        self._kept[action] = rows[start : start + own] if own else rows.new_empty((0, rows.shape[1]))
        self._clock.sent(action)
        self._lanes.put(action, rows.to(self.parts.exchange), sizes)

    def _receive(self, action: Action) -> tuple[Tensor, float]:
        """Rows of `action` by source rank, this rank's own among them, and when they arrived."""
        handoff = self._lanes.get(action)
        own = self._kept.pop(action, None)
        if handoff is None:
            assert own is not None
            self._own_arrivals(action)
            return own, 0.0
        rows = handoff.take().to(self.parts.dtype)
        if own is not None and len(own):
            start = sum(self._incoming(action)[: self.mesh.rank])
            rows[start : start + len(own)] = own
        return rows, handoff.end

    def _own_arrivals(self, action: Action) -> None:
        """A forward dispatch that leaves all rows here, or brings none: plan for the own ones."""
        place = action.layer, action.micro_batch
        if action.kind is Kind.DISPATCH and action.direction is Pass.FORWARD and place not in self._arrivals:
            rank = self.mesh.rank
            counts = {rank: self._routings[place].counts[rank]}
            self._arrivals[place] = self._maps[action.layer].arrivals(counts, self.mesh.device)

    def _incoming(self, action: Action) -> list[int]:
        """Rows per source rank. A lane may ask for a combine's before the gate has decided: then it waits."""
        place = action.layer, action.micro_batch
        if action.towards_experts:
            return self._arrivals[place].sizes
        self._routed[place].result()
        return self._routings[place].sizes

    # Called by the lanes.

    def _carry(self, action: Action, rows: Tensor | None, sent: list[int]) -> Handoff:
        """Move one transfer: send `rows`, `sent[r]` of them to rank r; receive what comes. Gradients are summed."""
        began = time.monotonic()
        if action.kind is Kind.REDUCE:
            assert rows is not None
            with peer_errors():
                dist.all_reduce(rows, group=self.mesh.attending)
            return self._carried(action, rows, began)
        group = self.mesh.to_experts if action.towards_experts else self.mesh.from_experts
        rank = self.mesh.rank
        if action.kind is Kind.DISPATCH and action.direction is Pass.FORWARD:
            self._exchange_counts(action)
        sends: dict[int, Tensor] = {}
        if rows is not None:
            sends = {peer: part for peer, part in enumerate(torch.split(rows[: sum(sent)], sent)) if peer != rank}
        buffer = torch.empty(0, device=self.mesh.device)
        receives: dict[int, Tensor] = {}
        if rank in self._schedule.receivers[action]:
            sizes = self._incoming(action)
            buffer = torch.empty((sum(sizes), self._width), dtype=self.parts.exchange, device=self.mesh.device)
            receives = {peer: part for peer, part in enumerate(torch.split(buffer, sizes)) if peer != rank}
        exchange(group, sends, receives)
        return self._carried(action, buffer, began)

    def _carried(self, action: Action, rows: Tensor, began: float) -> Handoff:
        handoff = Handoff.of(rows)
        handoff.start, handoff.end = began, time.monotonic()
        self._clock.transferred(action, handoff)
        return handoff

    def _exchange_counts(self, action: Action) -> None:
        """Hosts learn how many rows come from whom: the only unknown sizes of an iteration."""
        place, rank, device = (action.layer, action.micro_batch), self.mesh.rank, self.mesh.device
        layer_map = self._maps[action.layer]
        sends, receives = {}, {}
        if rank in self._schedule.senders[action]:
            counts = self._routings[place].counts
            sends = {
                peer: torch.tensor(counts[peer], dtype=torch.int64, device=device)
                for peer in self._schedule.receivers[action]
                if peer != rank
            }
        if rank in self._schedule.receivers[action]:
            experts = len(layer_map.hosted[rank])
            receives = {
                peer: torch.empty(experts, dtype=torch.int64, device=device)
                for peer in self._schedule.senders[action]
                if peer != rank
            }
        exchange(self.mesh.to_experts, sends, receives)
        if rank in self._schedule.receivers[action]:
            table = {peer: counts.tolist() for peer, counts in receives.items()}
            if place in self._routings:
                table[rank] = self._routings[place].counts[rank]
            self._arrivals[place] = layer_map.arrivals(table, device)

    def _dense(self) -> DenseModel:
        assert self.parts.dense is not None
        return self.parts.dense

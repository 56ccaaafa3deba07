"""The zebra engine: one kind of worker that runs its part of a Schedule on real tensors and messages."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetermoe_cli.model.copies import upload
from hetermoe_cli.model.kernels.documents import Documents
from hetermoe_cli.model.transformer import DenseModel
from hetermoe_cli.runtime.clocks.clock import Clock
from hetermoe_cli.runtime.machine.mesh import Mesh
from hetermoe_cli.runtime.modules.collectives import Collectives
from hetermoe_cli.runtime.modules.parts import Parts
from hetermoe_cli.runtime.modules.stage import AttentionStage, ExpertStage
from hetermoe_cli.runtime.step.carrier import Carrier, Place
from hetermoe_cli.runtime.step.rows import Rows
from hetermoe_cli.runtime.transfers.lanes import Lanes
from hetermoe_cli.runtime.transfers.shared_rows import layer_map
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.schedule.gathers import releases
from hetermoe_cli.schedule.schedule import Schedule
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.model import ModelConfig

# micro-batch -> this rank's tokens [B, S], and the targets of those tokens whose head it computes, in their order
Batch = Callable[[int], tuple[Tensor, Tensor]]


class Engine:
    """Runs passes of a schedule. After `run`, gradients are accumulated in the parts; `loss` and `router_losses` [2]
    (auxiliary and z-loss) are this rank's sums.

    On CUDA the thread that runs it only launches work: permutations stay on the device, and lanes wait for the sizes of
    messages. It waits with them for rows that experts here compute, as a loop over experts needs their numbers.
    """

    def __init__(self, layout: Layout, mesh: Mesh, parts: Parts, model: ModelConfig) -> None:
        self.layout, self.mesh, self.parts = layout, mesh, parts
        self._span = layout.span_of(mesh.rank)
        self._maps = [layer_map(layout, layer, mesh.rank, model.top_k, mesh.device) for layer in range(layout.layers)]
        self._empty = torch.empty((0, model.hidden_size), dtype=parts.exchange, device=mesh.device)
        self._width = model.hidden_size
        self._lanes = Lanes(mesh)
        self._handlers: dict[tuple[Kind, Pass], Callable[[Action], None]] = {
            (Kind.ATTENTION, Pass.FORWARD): self._attention_forward,
            (Kind.ATTENTION, Pass.BACKWARD): self._attention_backward,
            (Kind.EXPERT, Pass.FORWARD): self._expert_forward,
            (Kind.EXPERT, Pass.BACKWARD): self._expert_backward,
            (Kind.HEAD, Pass.FORWARD): self._head,
            (Kind.HEAD, Pass.BACKWARD): self._head,
            (Kind.PASS, Pass.FORWARD): self._pass_forward,
            (Kind.PASS, Pass.BACKWARD): self._pass_backward,
        }

    def run(
        self,
        schedule: Schedule,
        batch: Batch,
        loss_scale: float,
        clock: Clock,
        collectives: Collectives,
        after: Callable[[Action], None] = lambda action: None,
    ) -> None:
        """Run all compute actions of this rank but S and O, and `after` each; `loss_scale` multiplies the summed loss
        in backward."""
        self._batch, self._loss_scale, self._clock, self._collectives = batch, loss_scale, clock, collectives
        crosses = self.layout.borders and self.parts.dense is not None
        length = batch(0)[0].shape[1] if crosses else 0
        self._carrier = Carrier(self.layout, self.mesh, self._maps, self._empty, schedule, clock, collectives, length)
        self._rows = Rows(self.mesh, self.parts, self._maps, self._lanes, self._carrier, clock)
        self._attention: dict[Place, AttentionStage] = {}
        self._documents: dict[int, Documents | None] = {}
        self._gradients: dict[Place, Tensor] = {}  # [B, S, H] of what the stage behind a layer read
        self._experts: dict[Place, ExpertStage] = {}
        self.loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        self.router_losses = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        order, layers = schedule.compute[self.mesh.rank], self.layout.layers
        training = any(action.direction is Pass.BACKWARD for action in order)
        following = self._following(schedule)
        dropped = releases(schedule, order, layers) if self.layout.gathers else {}
        self._rows.start(schedule, self.layout.schedule.window)
        try:
            with torch.set_grad_enabled(training):
                self._give(following.pop(None, []))
                for action in order:
                    if (action.kind, action.direction) in self._handlers:
                        self._take(schedule.needs(action, layers))  # its weights
                        self._handlers[action.kind, action.direction](action)
                        after(action)
                        if (segment := dropped.get(action)) is not None:
                            collectives.release(segment)
                        self._give(following.get(action, []))
            self._lanes.finish()
            self._take([transfer for transfers in following.values() for transfer in transfers])
        except BaseException as error:
            self._abort(error)
            raise

    def _following(self, schedule: Schedule) -> dict[Action | None, list[Action]]:
        """This rank's collectives by the task that each follows (None: the start)."""
        result: dict[Action | None, list[Action]] = {}
        mine = {action: place for place, action in enumerate(schedule.compute[self.mesh.rank])}
        for transfer in schedule.transfers_of(self.mesh.rank):
            if transfer.is_collective:
                own = [source for source in schedule.sources(transfer, self.layout.layers) if source in mine]
                result.setdefault(max(own, key=mine.__getitem__, default=None), []).append(transfer)
        return result

    def _give(self, transfers: Iterable[Action]) -> None:
        """Let a lane do collectives with what this rank brings."""
        for transfer in transfers:
            self._clock.sent(transfer)
            self._lanes.put(transfer, self._collectives.give(transfer), None)

    def _take(self, actions: Iterable[Action]) -> None:
        """Wait for those of `actions` that are collectives, if nothing has waited for them yet."""
        for action in actions:
            if action.is_collective and (handoff := self._lanes.get(action)):
                handoff.take()

    def _abort(self, error: BaseException) -> None:
        """Wake the lanes: what they wait for will never come."""
        self._carrier.abort(error)
        self._lanes.abort(error)

    @property
    def counts(self) -> NDArray[np.int32]:
        """[layers, micro-batches, experts] rows that this rank routed."""
        return self._carrier.counts

    @property
    def waited(self) -> float:
        """Seconds that threads waited for the device to tell numbers of rows; none on the CPU."""
        return self._carrier.waited

    # Compute tasks. Each waits for its rows, works, reports to the clock, then hands its rows to a lane.

    def _attention_forward(self, action: Action) -> None:
        layer, j = place = action.layer, action.micro_batch
        inputs, arrived = self._border_before(layer, j)
        dense = self._dense()
        if layer == self._span.first:
            self._documents[j] = dense.documents(self._batch(j)[0])
        recompute = self._span.schedule.recompute_attention
        stage = AttentionStage.forward(dense, layer, inputs, recompute, self._documents[j])
        routed = stage.outputs()
        if routed.losses is not None:
            self.router_losses += routed.losses.detach()
        routing = self._maps[layer].route(routed.experts)
        sending = Action(Kind.DISPATCH, Pass.FORWARD, layer, j)
        rows = routing.gather_weighted(*stage.take_rows(), self._rows.wide(sending, routing.most))
        self._attention[place] = stage
        self._carrier.routed(place, routing)
        self._clock.counted(layer, j, routing)
        self._clock.compute(action, self._rows.began, arrived)
        self._rows.send(sending, rows, routing)

    def _expert_forward(self, action: Action) -> None:
        layer, j = place = action.layer, action.micro_batch
        rows, arrived = self._rows.receive(Action(Kind.DISPATCH, Pass.FORWARD, layer, j))
        arrivals = self._carrier.arrivals(place)
        parts = self.parts.experts_of(layer)
        schedule, training = self._span.schedule, torch.is_grad_enabled()
        rows, weights = arrivals.group_weighted(rows, self._width)
        with torch.set_grad_enabled(training and not schedule.sends_again):
            stage = ExpertStage.forward(parts, rows, weights, arrivals.counts, schedule.recompute_experts)
        sending = Action(Kind.COMBINE, Pass.FORWARD, layer, j)
        outputs = arrivals.ungroup(stage.take_outputs(), self._rows.room(sending, arrivals.rows))
        if training and not schedule.sends_again:
            self._experts[place] = stage
        self._clock.compute(action, self._rows.began, arrived, arrivals.counts)
        if not training:
            self._carrier.computed(place)
        self._rows.send(sending, outputs, arrivals)

    def _head(self, action: Action) -> None:
        layers, j = self.layout.layers, action.micro_batch
        apart = not self._span.has_head
        hidden, arrived = self._given_to_head(j) if apart else self._border_before(layers, j)
        loss = self._dense().loss(hidden, upload(self._batch(j)[1], self.mesh.device), self._loss_scale)
        self.loss += loss.detach()
        if action.direction is Pass.FORWARD:
            self._clock.compute(action, self._rows.began, arrived)
            return
        loss.backward()  # type: ignore[no-untyped-call]
        if not apart:
            self._return((layers - 1, j), hidden.grad, action, arrived)
            return
        self._clock.compute(action, self._rows.began, arrived)
        assert hidden.grad is not None
        self._rows.cross(Action(Kind.CROSS, Pass.BACKWARD, layers, j), hidden.grad)

    def _expert_backward(self, action: Action) -> None:
        layer, j = place = action.layer, action.micro_batch
        gradient, arrived = self._rows.receive(Action(Kind.COMBINE, Pass.BACKWARD, layer, j))
        arrivals = self._carrier.arrivals(place)
        sending = Action(Kind.DISPATCH, Pass.BACKWARD, layer, j)
        given, rest = gradient[:, : self._width], gradient[:, self._width :]
        if self._span.schedule.sends_again:
            rows, weights = arrivals.group_weighted(rest, self._width)
            stage = ExpertStage.forward(self.parts.experts_of(layer), rows, weights, arrivals.counts, recompute=False)
        else:
            stage = self._experts.pop(place)
        gradients = stage.backward(arrivals.group(given))
        rows = arrivals.ungroup_weighted(*gradients, self._rows.wide(sending, arrivals.rows))
        self._clock.compute(action, self._rows.began, arrived, arrivals.counts)
        self._carrier.computed(place)
        self._rows.send(sending, rows, arrivals)

    def _attention_backward(self, action: Action) -> None:
        layer, j = place = action.layer, action.micro_batch
        rows, arrived = self._rows.receive(Action(Kind.DISPATCH, Pass.BACKWARD, layer, j))
        routing = self._carrier.routing(place)
        self._carrier.forget(place)
        rows, weights = routing.gradients(rows, self._width)
        stage, hidden = self._attention.pop(place), self._gradients.pop(place)
        gradient = stage.backward(hidden, rows.contiguous(), weights, self._loss_scale)
        if layer > self._span.first:
            self._return((layer - 1, j), gradient, action, arrived)
            return
        self._clock.compute(action, self._rows.began, arrived)
        if layer:
            assert gradient is not None
            self._rows.cross(Action(Kind.CROSS, Pass.BACKWARD, layer, j), gradient)

    def _pass_forward(self, action: Action) -> None:
        hidden, arrived = self._border_before(action.layer, action.micro_batch)
        self._clock.compute(action, self._rows.began, arrived)
        self._rows.cross(action._replace(kind=Kind.CROSS), hidden.detach())

    def _pass_backward(self, action: Action) -> None:
        rows, arrived = self._rows.receive(action._replace(kind=Kind.CROSS))
        place = action.layer - 1, action.micro_batch
        self._return(place, self._as_hidden(rows, action.micro_batch), action, arrived)

    def _return(self, place: Place, gradient: Tensor | None, action: Action, arrived: float) -> None:
        """Send the experts of a layer the gradient [B, S, H] of what the stage behind it read, and keep it for the
        stage before."""
        assert gradient is not None
        self._gradients[place] = gradient
        routing, sending = self._carrier.routing(place), Action(Kind.COMBINE, Pass.BACKWARD, *place)
        out, width = self._rows.room(sending, routing.most), self._width
        if self._span.schedule.sends_again:
            rows = self._rows.wide(sending, routing.most) if out is None else out
            routing.gather(gradient.flatten(0, 1), rows[:, :width])
            routing.gather_weighted(*self._attention[place].again(), rows[:, width:])
        else:
            rows = routing.gather(gradient.flatten(0, 1), out)
        self._clock.compute(action, self._rows.began, arrived)
        self._rows.send(sending, rows, routing)

    # Rows in and out.

    def _border_before(self, layer: int, j: int) -> tuple[Tensor, float]:
        """What the stage after layer - 1 reads, a leaf, and when it arrived: tokens for the first stage."""
        if layer == 0:
            self._rows.began = self._clock.mark()
            return upload(self._batch(j)[0], self.mesh.device), 0.0
        if layer == self._span.first:
            rows, arrived = self._rows.receive(Action(Kind.CROSS, Pass.FORWARD, layer, j))
            return self._as_hidden(rows, j).requires_grad_(torch.is_grad_enabled()), arrived
        before = layer - 1, j
        rows, arrived = self._rows.receive(Action(Kind.COMBINE, Pass.FORWARD, *before))
        hidden = self._attention[before].combined(self._carrier.routing(before).summed(rows))
        if not torch.is_grad_enabled():
            del self._attention[before]
            self._carrier.forget(before)
        return hidden, arrived

    def _given_to_head(self, j: int) -> tuple[Tensor, float]:
        """[1, n, H] of those n tokens whose head this rank computes, a leaf, and when they arrived."""
        rows, arrived = self._rows.receive(Action(Kind.CROSS, Pass.FORWARD, self.layout.layers, j))
        return rows.detach()[None].requires_grad_(torch.is_grad_enabled()), arrived

    def _as_hidden(self, rows: Tensor, j: int) -> Tensor:
        """[B * S, H] as [B, S, H]."""
        return rows.view(*self._batch(j)[0].shape, -1)

    def _dense(self) -> DenseModel:
        assert self.parts.dense is not None
        return self.parts.dense

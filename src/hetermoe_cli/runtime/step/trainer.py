"""Trainer: one optimizer step of the whole world, seen from one rank: engine, gradients, optimizer, validation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.copies import upload
from hetermoe_cli.model.data.corpus import Batches
from hetermoe_cli.model.kernels.grouped import give_place
from hetermoe_cli.model.layers.gate import Router
from hetermoe_cli.model.optimizer import learning_rate, make_optimizer
from hetermoe_cli.runtime.clocks.clock import Clock
from hetermoe_cli.runtime.clocks.device_clock import make_clock
from hetermoe_cli.runtime.machine.mesh import Mesh
from hetermoe_cli.runtime.modules.collectives import Collectives
from hetermoe_cli.runtime.modules.gradient_shares import GradientShares
from hetermoe_cli.runtime.modules.gradients import Gradients, clip_factor
from hetermoe_cli.runtime.modules.loss_scale import LossScale
from hetermoe_cli.runtime.modules.parts import Parts, Precisions, build_parts
from hetermoe_cli.runtime.modules.shards import Shards
from hetermoe_cli.runtime.step.engine import Engine
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.schedule.lower import training_schedule, validation_schedule
from hetermoe_cli.schedule.zebra import OPTIMIZER, SYNCHRONISE
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.train import TrainSpec
from hetermoe_cli.spec.world import World
from hetermoe_cli.turns import in_turns


@dataclass(frozen=True)
class StepResult:
    """Equal on all ranks. `loss` in nats a token; `router_losses`, auxiliary and z-loss, are not in it, and come with
    their coefficients; `expert_rows` [layers, experts] rows of the whole batch; `loss_scale` of this step, null where
    nothing is scaled; `skipped`: gradients overflowed, so that nothing was updated; `count_wait_seconds`: how long all
    ranks' threads together waited for their devices to tell numbers of rows, 0 on CPUs."""

    loss: float
    router_losses: tuple[float, float]
    gradient_norm: float
    learning_rate: float
    expert_rows: NDArray[np.float64]
    stop: bool
    count_wait_seconds: float
    loss_scale: float | None
    skipped: bool


class Trainer:
    """Owns this rank's parts, their gradients and their optimizer."""

    def __init__(
        self,
        world: World,
        train: TrainSpec,
        mesh: Mesh,
        parts: Parts,
        engine: Engine,
        sequence_length: int,
        scaled: bool,
    ) -> None:
        self.train, self.mesh, self.parts = train, mesh, parts
        self._tokens, self._length = world.sequences * sequence_length, sequence_length
        layout = world.replica_of(mesh.process).layout
        self.shards = Shards(parts, mesh, world) if layout.schedule.shares_states else None
        parts.fill(parts.parameters())
        self.optimizer = make_optimizer(parts, train, parts.masters, self.shards.pieces if self.shards else None)
        self.lay_out(world, engine)
        self.loss_scale = LossScale(dynamic=scaled)
        self.clock = make_clock(mesh)
        self.stop_requested = False

    def lay_out(self, world: World, engine: Engine) -> None:
        """Run this rank's part of `world` with `engine` from the next step on; parts and optimizer hold what it
        needs."""
        parts, process, alone = self.parts, self.mesh.process, len(world.replicas) == 1
        replica = world.replica_of(process)
        layout = replica.layout
        self.world, self.layout, self.engine = world, layout, engine
        shards = self.shards if self.shards and self.shards.segments else None
        counted, dense = world.counts_dense(process), not layout.gathers
        shares = GradientShares(shards.segments, parts.exchange, counted) if shards else None
        own = parts.hosted_parameters() if alone else []
        shared = parts.shared_segments(dense=dense, hosted=not alone)
        holdings, last = parts.holdings(world, process, dense=dense), layout.micro_batches - 1
        stacks = parts.experts.parameters()
        self.gradients = Gradients(shared, own, self.mesh, parts.exchange, holdings, shares, last, stacks, self.shards)
        self._collectives = Collectives(self.gradients, self.shards, layout.micro_batches)
        found = [of(layout, len(world.replicas)) for of in (training_schedule, validation_schedule)]
        if self.mesh.ordered:
            found = [in_turns(schedule, layout.layers) for schedule in found]
        self._schedule, self._validation = found
        self._last_of_runs = last_of_runs(self._schedule.compute[self.mesh.rank])
        self._span, self._first = layout.span_of(self.mesh.rank), replica.first

    def release_gradients(self) -> None:
        """Free the buffers of gradients between two steps, before `lay_out` makes others."""
        del self.gradients, self._collectives
        for parameter in self.parts.parameters():
            parameter.grad = None
            give_place(parameter, None)

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        layout: Layout | World,
        train: TrainSpec,
        mesh: Mesh,
        *,
        sequence_length: int,
        precision: str,
        rank_precisions: Sequence[str] = (),
        router: Router = "learned",
    ) -> "Trainer":
        """Build parts and engine for `model` under `layout` or a world of several, with weights from train.seed.

        `precision` is what ranks exchange, and compute in unless `rank_precisions`, by process, says otherwise.
        """
        world = World.of(layout)
        precisions = Precisions(precision, rank_precisions)
        document_end = train.document_end if train.documents == "masked" else None
        parts = build_parts(model, world, mesh, precisions, train.seed, router, document_end)
        engine = Engine(world.replica_of(mesh.process).layout, mesh, parts, model)
        return cls(world, train, mesh, parts, engine, sequence_length, precisions.scaled)

    def step(self, batches: Batches | None, step: int, record: bool = False) -> StepResult:
        """One iteration: forward, backward, synchronisation, clipping, AdamW. `record` keeps its spans.

        Only ranks that attend or compute the head need `batches`. If loss or gradients are not finite, the weights stay
        as they are: with loss scaling the step is skipped and the scale halved, without it or at a scale of 1 it is a
        UserError.
        """
        self.gradients.zero()
        start = self.clock.begin_step(step, record)
        loss_scale = self.loss_scale.scale / self._tokens
        batch = partial(self._batch, batches, step)
        self.engine.run(self._schedule, batch, loss_scale, self.clock, self._collectives, self._settle)
        result, first_start = self._synchronise(step, start)
        scale = self.loss_scale.scale
        if not self.loss_scale.follow(finite=not result.skipped):
            # all ranks see the same figures, so all leave here together, before anything is updated or saved
            raise UserError(
                f"step {step}: loss {result.loss}, gradient norm {result.gradient_norm}: training diverged: "
                "lower learning_rate or gradient_clip, then go on with --resume"
            )
        began = self.clock.mark()
        if not result.skipped:
            self._update(result, scale)
        self.clock.compute(OPTIMIZER, began, 0.0)
        self.clock.end_step(first_start)
        return result

    def _update(self, result: StepResult, scale: float) -> None:
        """Clip, undo the loss scale, step, and balance the gates."""
        for group in self.optimizer.param_groups:
            group["lr"] = result.learning_rate
        self.gradients.apply(self.optimizer, clip_factor(result.gradient_norm, self.train.gradient_clip) / scale)
        if self.parts.dense:
            self.parts.dense.update_biases(upload(torch.from_numpy(result.expert_rows), self.mesh.device))

    def _settle(self, action: Action) -> None:
        """After a run of micro-batches through one layer, and before its gradients are summed: they need no fp32 any
        more, and experts that got no rows have none yet."""
        if action in self._last_of_runs:
            self.gradients.fold(self.parts.parameters_of(action))

    def validate(self, batches: Batches | None, count: int) -> float:
        """Mean loss in nats a token over the first `count` global batches; equal on all ranks."""
        total = torch.zeros(1, dtype=torch.float64, device=self.mesh.device)
        for step in range(count):
            batch, clock = partial(self._batch, batches, step), Clock(self.mesh.process)
            self.engine.run(self._validation, batch, 0.0, clock, self._collectives)
            total += self.engine.loss
        self.mesh.all_reduce(total)
        return float(total) / (count * self._tokens)

    def _synchronise(self, step: int, start: float) -> tuple[StepResult, float]:
        """Norm of the reduced gradients, and figures of all ranks; the result, and when the first rank began."""
        began = self.clock.mark()
        self.clock.synchronising()
        layers, experts, world = self.layout.layers, self.layout.experts, self.mesh.world_size
        starts = torch.zeros(world, dtype=torch.float64)
        starts[self.mesh.process] = start
        rows = torch.from_numpy(self.engine.counts.sum(axis=1).astype(np.float64)).flatten()
        losses = torch.cat([self.engine.loss[None], self.engine.router_losses]) / self._tokens
        own = torch.tensor([float(self.stop_requested), self.engine.waited], dtype=torch.float64)
        host = torch.cat([own, rows, starts])
        total, norm = self.gradients.totals(torch.cat([losses, upload(host, self.mesh.device)]))
        self.clock.synchronised(SYNCHRONISE, began)
        norm /= self.loss_scale.scale
        result = StepResult(
            loss=float(total[0]),
            router_losses=(float(total[1]), float(total[2])),
            gradient_norm=norm,
            learning_rate=learning_rate(self.train, self.loss_scale.taken(step)),
            expert_rows=total[5:-world].numpy().reshape(layers, experts),
            stop=bool(total[3] > 0),
            count_wait_seconds=float(total[4]),
            loss_scale=self.loss_scale.scale if self.loss_scale.dynamic else None,
            skipped=not (math.isfinite(float(total[0])) and math.isfinite(norm)),
        )
        return result, float(total[-world:].min())

    def _batch(self, batches: Batches | None, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        assert batches is not None
        layout, rank = self.layout, self.mesh.rank
        own = layout.sequences_of(self._span, micro_batch).get(rank, range(0))
        before = self._first + micro_batch * layout.sequences_per_micro_batch
        tokens, targets = batches.sequences(step, before + own.start, before + own.stop)
        if not layout.head:
            return tokens, targets
        length = self._length
        headed = layout.tokens_at(layout.layers, length * layout.sequences_per_micro_batch).get(rank, range(0))
        first, end = headed.start // length, -(-headed.stop // length)
        _, targets = batches.sequences(step, before + first, before + end)
        return tokens, targets.flatten()[headed.start - first * length : headed.stop - first * length]


def last_of_runs(compute: Sequence[Action]) -> set[Action]:
    """Backward actions after which the next of their kind belongs to another layer or window, or there is none."""
    following: dict[Kind, int] = {}
    result = set()
    for action in reversed(compute):
        if action.direction is Pass.BACKWARD:
            if following.get(action.kind) != action.layer:
                result.add(action)
            if action.kind is not Kind.HEAD:
                following.pop(Kind.HEAD, None)  # heads of the next window
            following[action.kind] = action.layer
    return result

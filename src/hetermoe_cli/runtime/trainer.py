"""Trainer: one optimizer step of the whole world, seen from one rank: engine, gradients, optimizer, validation."""

import math
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.attention import Router
from hetermoe_cli.model.data import Batches
from hetermoe_cli.model.optimizer import learning_rate, make_optimizer
from hetermoe_cli.runtime.clock import Clock
from hetermoe_cli.runtime.engine import Engine
from hetermoe_cli.runtime.gradients import Gradients
from hetermoe_cli.runtime.mesh import Mesh, peer_errors
from hetermoe_cli.runtime.parts import Parts, build_parts
from hetermoe_cli.schedule.lower import training_schedule, validation_schedule
from hetermoe_cli.schedule.zebra import OPTIMIZER, SYNCHRONISE
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.plan import Layout
from hetermoe_cli.spec.train import TrainSpec


@dataclass(frozen=True)
class StepResult:
    """Equal on all ranks. `loss` in nats a token; `expert_rows` [layers, experts] rows of the whole batch."""

    loss: float
    gradient_norm: float
    learning_rate: float
    expert_rows: NDArray[np.float64]
    stop: bool


class Trainer:
    """Owns this rank's parts, their gradients and their optimizer."""

    def __init__(
        self,
        layout: Layout,
        train: TrainSpec,
        mesh: Mesh,
        parts: Parts,
        engine: Engine,
        sequence_length: int,
    ) -> None:
        self.layout, self.train, self.mesh, self.parts, self.engine = layout, train, mesh, parts, engine
        self._tokens = layout.sequences_per_micro_batch * layout.micro_batches * sequence_length
        self.optimizer = make_optimizer(parts, train)
        self.gradients = Gradients(parts.shared_parameters(), parts.own_parameters(), mesh)
        self.clock = Clock(mesh.rank)
        self.stop_requested = False
        self._schedule = training_schedule(layout)
        self._validation = validation_schedule(layout)
        self._first = sum(layout.sequences_per_rank[: mesh.rank])

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        layout: Layout,
        train: TrainSpec,
        mesh: Mesh,
        *,
        sequence_length: int,
        precision: str,
        router: Router = "learned",
    ) -> "Trainer":
        """Build parts and engine for `model` under `layout`, with weights from train.seed."""
        parts = build_parts(model, layout, mesh, precision, train.seed, router)
        return cls(layout, train, mesh, parts, Engine(layout, mesh, parts, model.hidden_size), sequence_length)

    def step(self, batches: Batches | None, step: int, record: bool = False) -> StepResult:
        """One iteration: forward, backward, synchronisation, clipping, AdamW. `record` keeps its spans.

        Only attending ranks need `batches`. UserError, with weights untouched, if loss or gradients are not finite.
        """
        self.gradients.zero()
        start = self.clock.begin_step(step, record)
        self.engine.run(self._schedule, partial(self._batch, batches, step), 1 / self._tokens, self.clock)
        result, first_start = self._synchronise(step, start)
        if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
            # all ranks see the same figures, so all leave here together, before anything is updated or saved
            raise UserError(
                f"step {step}: loss {result.loss}, gradient norm {result.gradient_norm}: training diverged: "
                "lower learning_rate or gradient_clip, then go on with --resume"
            )
        began = time.monotonic()
        self.gradients.clip(result.gradient_norm, self.train.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = result.learning_rate
        self.optimizer.step()
        self.clock.compute(OPTIMIZER, began, 0.0)
        self.clock.end_step(first_start)
        return result

    def validate(self, batches: Batches | None, count: int) -> float:
        """Mean loss in nats a token over the first `count` global batches; equal on all ranks."""
        total = torch.zeros(1, dtype=torch.float64, device=self.mesh.device)
        for step in range(count):
            self.engine.run(self._validation, partial(self._batch, batches, step), 0.0, Clock(self.mesh.rank))
            total += self.engine.loss
        with peer_errors():
            torch.distributed.all_reduce(total)
        return float(total) / (count * self._tokens)

    def _synchronise(self, step: int, start: float) -> tuple[StepResult, float]:
        """Reduce gradients and figures; the result, and when the first rank began."""
        began = time.monotonic()
        self.clock.synchronising()
        layers, experts, world = self.layout.layers, self.layout.experts, self.mesh.world_size
        starts = torch.zeros(world, dtype=torch.float64)
        starts[self.mesh.rank] = start
        rows = torch.from_numpy(self.engine.counts.sum(axis=1).astype(np.float64)).flatten()
        own = torch.tensor([float(self.engine.loss) / self._tokens, float(self.stop_requested)], dtype=torch.float64)
        figures = torch.cat([own, rows, starts])
        total, norm = self.gradients.reduce(figures.to(self.mesh.device))
        self.clock.synchronised(SYNCHRONISE, began)
        total = total.cpu()
        result = StepResult(
            loss=float(total[0]),
            gradient_norm=norm,
            learning_rate=learning_rate(self.train, step),
            expert_rows=total[2:-world].numpy().reshape(layers, experts),
            stop=bool(total[1] > 0),
        )
        return result, float(total[-world:].min())

    def _batch(self, batches: Batches | None, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        assert batches is not None
        start = micro_batch * self.layout.sequences_per_micro_batch + self._first
        return batches.sequences(step, start, start + self.layout.sequences_per_rank[self.mesh.rank])

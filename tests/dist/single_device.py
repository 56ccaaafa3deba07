"""Many steps of the plain model on one device, in float64, on the text of test_engine_equality."""

from collections.abc import Callable

import torch
from test_engine_equality import LENGTH, MODEL, batches

from hetermoe_cli.model.optimizer import AdamW, learning_rate, make_optimizer
from hetermoe_cli.model.transformer import Transformer, initialise
from hetermoe_cli.spec.train import TrainSpec


def trained(
    train: TrainSpec, prepare: Callable[[Transformer], None] = lambda model: None
) -> tuple[Transformer, AdamW, list[float]]:
    """Model, optimizer and every step's loss after `train.steps` steps; `prepare` changes the fresh model."""
    torch.set_num_threads(1)
    model = Transformer(MODEL).double()
    initialise(model, MODEL, seed=train.seed)
    prepare(model)
    optimizer, data, losses = make_optimizer(model, train), batches(), []
    for step in range(train.steps):
        optimizer.zero_grad()
        loss = model(*data.sequences(step, 0, 8)) / (8 * LENGTH)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses

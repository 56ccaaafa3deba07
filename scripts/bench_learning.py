"""Does the model learn real text? Validation loss against a bigram model, on the default corpus.

Twice the same steps: `hetermoe profile`, `plan` and `train` on two CPU workers, and the reference model in one process.

    python scripts/bench_learning.py --json > learning.json
"""

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bars
from demo import ROOT, hetermoe
from hetermoe_cli.model.data.bigram import bigram_loss, fit_bigram
from hetermoe_cli.model.data.corpus import Batches, load_corpus
from hetermoe_cli.model.optimizer import learning_rate, make_optimizer
from hetermoe_cli.model.transformer import Transformer, initialise
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.named_models import load_model
from hetermoe_cli.spec.train import TrainSpec

NATS_PER_BYTE = 1.6
ENGINE_TOLERANCE = 0.02  # nats; single precision free-running
MODEL_FILE, TRAIN_FILE = ROOT / "plans/models/learner.yaml", ROOT / "plans/train/learner.yaml"
CLUSTER_FILE = ROOT / "plans/clusters/cpu2.yaml"
VALIDATION_SEQUENCES = 256

Windows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sample:
    """One point of the curve; losses in nats per byte, `validation_loss` over all validation windows."""

    step: int
    seconds: float
    training_loss: float
    validation_loss: float


def validation_windows(batches: Batches, count: int) -> Iterator[Windows]:
    """The first `count` windows of the validation order, 32 at a time."""
    for start in range(0, count, 32):
        yield batches.sequences(0, start, min(start + 32, count))


def validation_loss(model: Transformer, windows: list[Windows]) -> float:
    """Mean nats per byte."""
    with torch.no_grad():
        total = sum(float(model(tokens, targets)) for tokens, targets in windows)
    return total / sum(targets.numel() for _, targets in windows)


def training_step(
    model: Transformer, optimizer: torch.optim.AdamW, train: TrainSpec, batch: Windows, step: int
) -> float:
    """One AdamW step on the whole batch; its loss in nats per byte."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(train, step)
    optimizer.zero_grad()
    loss: Tensor = model(*batch) / batch[1].numel()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clip)
    optimizer.step()
    return loss.item()


def learn(config: ModelConfig, train: TrainSpec, batches: Batches, windows: list[Windows], every: int) -> list[Sample]:
    """Train for `train.steps`, validating every `every` steps and at the end; seconds include validation."""
    model = Transformer(config)
    initialise(model, config, train.seed)
    optimizer = make_optimizer(model, train)
    samples: list[Sample] = []
    losses: list[float] = []
    began = time.monotonic()
    for step in range(train.steps):
        batch = batches.sequences(step, 0, train.global_batch_sequences)
        losses.append(training_step(model, optimizer, train, batch, step))
        if (step + 1) % every == 0 or step + 1 == train.steps:
            validation = validation_loss(model, windows)
            samples.append(Sample(step + 1, time.monotonic() - began, sum(losses) / len(losses), validation))
            losses.clear()
            print(
                f"step {step + 1:5d}  {samples[-1].seconds:6.1f} s  training {samples[-1].training_loss:.3f}  "
                f"validation {validation:.3f} nats a byte",
                file=sys.stderr,
            )
    return samples


def engine(folder: Path, train: TrainSpec) -> dict[str, Any]:
    """Profile this CPU, plan for two workers and train; the run's figures."""
    shutil.rmtree(folder, ignore_errors=True)
    profiles, plan = folder / "profiles", folder / "plan.yaml"
    hetermoe(
        "profile", "--quick", "--model", MODEL_FILE, "--sequence-lengths", train.sequence_length, "--output", profiles
    )
    inputs = ("--model", MODEL_FILE, "--cluster", CLUSTER_FILE, "--train", TRAIN_FILE, "--profiles", profiles)
    hetermoe("plan", *inputs, "--output", plan)
    batches = VALIDATION_SEQUENCES // train.global_batch_sequences  # the same windows as `validation_windows`
    return hetermoe("train", plan, "--run-folder", folder / "run", "--validation-batches", batches)


def bench(config: ModelConfig, train: TrainSpec, every: int) -> tuple[list[bars.Bar], dict[str, Any]]:
    """The bars and everything that they were computed from."""
    corpus = load_corpus(None)
    held_out = Batches(corpus.validation, train.sequence_length, VALIDATION_SEQUENCES, train.seed, corpus.source)
    windows = list(validation_windows(held_out, VALIDATION_SEQUENCES))
    tokens, targets = (torch.cat(part).numpy() for part in zip(*windows, strict=True))
    bigram = bigram_loss(fit_bigram(corpus.train[0]), tokens, targets)
    print(f"bigram model: {bigram:.3f} nats a byte on {targets.size} validation bytes", file=sys.stderr)
    run = engine(ROOT / "runs" / "bench-learning", train)
    batches = Batches(corpus.train, train.sequence_length, train.global_batch_sequences, train.seed, corpus.source)
    samples = learn(config, train, batches, windows, every)
    single, final = samples[-1].validation_loss, run["validation_loss"]
    found = [
        bars.at_most("engine: validation loss over the bigram model's", final / bigram, 1.0),
        bars.at_most("engine: validation loss, nats a byte", final, NATS_PER_BYTE),
        bars.at_most(
            "engine against one process, fp32, difference of validation losses", abs(final - single), ENGINE_TOLERANCE
        ),
        bars.at_most("one process: validation loss, nats a byte", single, NATS_PER_BYTE),
    ]
    return found, {
        "bigram": bigram,
        "engine": run,
        "one_process": [asdict(sample) for sample in samples],
        "corpus_sha256": corpus.digest,
        "model": config.model_dump(),
        "train": train.model_dump(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    bars.report(__doc__, lambda: bench(load_model(str(MODEL_FILE)), load(TrainSpec, TRAIN_FILE), every=250))

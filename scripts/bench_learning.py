"""Does the reference model learn real text? Validation loss against a bigram model, on the default corpus.

One process, no distributed engine: a run of the engine is held against the same figures.

    python scripts/bench_learning.py --json > learning.json
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hetermoe_cli.model.bigram import bigram_loss, fit_bigram
from hetermoe_cli.model.data import Batches, load_corpus
from hetermoe_cli.model.optimizer import learning_rate, make_optimizer
from hetermoe_cli.model.transformer import Transformer, initialise
from hetermoe_cli.spec.model import NAMED_MODELS, ModelConfig, load_model
from hetermoe_cli.spec.train import TrainSpec

NATS_PER_BYTE = 1.6
MODEL = NAMED_MODELS["small"].model_copy(update={"name": "learner", "layers": 2, "initializer_range": 0.05})
TRAIN = TrainSpec(
    sequence_length=128,
    global_batch_sequences=8,
    precision="fp32",
    steps=2000,
    learning_rate=2e-3,
    minimum_learning_rate_ratio=0.05,
    warmup_steps=100,
    weight_decay=0.1,
)
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


def bench(config: ModelConfig, train: TrainSpec, every: int) -> dict[str, Any]:
    """The bars and everything that they were computed from."""
    corpus = load_corpus(None)
    held_out = Batches(corpus.validation, train.sequence_length, VALIDATION_SEQUENCES, train.seed, corpus.source)
    windows = list(validation_windows(held_out, min(VALIDATION_SEQUENCES, held_out.windows)))
    tokens, targets = (torch.cat(part).numpy() for part in zip(*windows, strict=True))
    bigram = bigram_loss(fit_bigram(corpus.train), tokens, targets)
    print(f"bigram model: {bigram:.3f} nats a byte on {targets.size} validation bytes", file=sys.stderr)
    batches = Batches(corpus.train, train.sequence_length, train.global_batch_sequences, train.seed, corpus.source)
    samples = learn(config, train, batches, windows, every)
    final = samples[-1].validation_loss
    return {
        "bars": [
            {
                "name": "validation loss below the bigram model's",
                "value": final,
                "bar": bigram,
                "holds": final < bigram,
            },
            {
                "name": "validation loss in nats a byte",
                "value": final,
                "bar": NATS_PER_BYTE,
                "holds": final < NATS_PER_BYTE,
            },
        ],
        "seconds": samples[-1].seconds,
        "process_seconds": time.process_time(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "corpus": {
            "sha256": corpus.digest,
            "training_bytes": len(corpus.train),
            "validation_bytes_scored": targets.size,
        },
        "model": config.model_dump(),
        "train": train.model_dump(),
        "samples": [asdict(sample) for sample in samples],
    }


def main() -> int:
    """Exit code 0 if every bar holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--model", help="a named size or a model file; without it two layers of small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=250, help="validate every so many steps")
    parser.add_argument("--steps", type=int, default=TRAIN.steps)
    parser.add_argument("--sequence-length", type=int, default=TRAIN.sequence_length)
    parser.add_argument("--batch", type=int, default=TRAIN.global_batch_sequences, help="sequences of a step")
    parser.add_argument("--learning-rate", type=float, default=TRAIN.learning_rate)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    changed = {
        "steps": options.steps,
        "warmup_steps": min(TRAIN.warmup_steps, options.steps),
        "sequence_length": options.sequence_length,
        "global_batch_sequences": options.batch,
        "learning_rate": options.learning_rate,
    }
    config = load_model(options.model) if options.model else MODEL
    result = bench(config, TRAIN.model_copy(update=changed), options.every)
    if options.json:
        print(json.dumps(result))
    else:
        for bar in result["bars"]:
            print(f"{'holds' if bar['holds'] else 'FAILS'}: {bar['name']}: {bar['value']:.3f} (bar {bar['bar']:.3f})")
    return 0 if all(bar["holds"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())

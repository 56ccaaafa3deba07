"""Rivals' runs: the engine's model, weights and tokens in their form, and two real gloo processes for each rival."""

import json
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.local import MEMORY
from hetermoe_cli.model.data.corpus import Batches, load_corpus
from hetermoe_cli.model.transformer import Transformer, initialise, named_tensors
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.train import TrainSpec

WORKER = Path(__file__).with_name("rivals_worker.py")
WORLD_SIZE = 2
_TIMEOUT_SECONDS = 300
_RENAMED = {
    "attention_norm.weight": "input_layernorm.weight",
    "out.weight": "self_attn.o_proj.weight",
    "expert_norm.weight": "post_attention_layernorm.weight",
    "gate.weight": "mlp.gate.weight",
}


@dataclass(frozen=True)
class Steps:
    """Some steps: their global mean losses, in nats a token, and their seconds."""

    losses: list[float]
    seconds: list[float]


def mixtral_config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    """Arguments of transformers' MixtralConfig."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "num_local_experts": model.experts,
        "num_experts_per_tok": model.top_k,
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": False,
        "sliding_window": None,
    }


def mixtral_weights(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The engine's weights at step 0 under transformers' names in memory (experts stacked, gate before up)."""
    reference = Transformer(model)
    initialise(reference, model, seed)
    ours = named_tensors(reference)
    theirs = {
        "model.embed_tokens.weight": ours["embedding.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    for layer in range(model.layers):
        theirs |= _layer(model, layer, ours)
    return {name: tensor.contiguous() for name, tensor in theirs.items()}


def _layer(model: ModelConfig, layer: int, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    before, after = f"layers.{layer}.", f"model.layers.{layer}."
    theirs = {after + new: ours[before + old] for old, new in _RENAMED.items()}
    query, key = model.attention_heads * model.head_size, model.kv_heads * model.head_size
    parts = torch.split(ours[before + "qkv.weight"], [query, key, key])
    theirs |= {f"{after}self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
    for old, new in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
        stacked = [ours[f"{before}experts.{expert}.{old}"] for expert in range(model.experts)]
        theirs[f"{after}mlp.experts.{new}"] = torch.stack(stacked)
    return theirs


def token_table(train: TrainSpec, steps: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The engine's batches of the default corpus: [steps, sequences, S + 1], targets are tokens one further."""
    corpus = load_corpus(None)
    batches = Batches(corpus.train, train.sequence_length, train.global_batch_sequences, train.seed, corpus.source)

    def windows() -> Iterator[Tensor]:
        for step in range(steps):
            tokens, targets = batches.sequences(step, 0, train.global_batch_sequences)
            yield torch.cat([tokens, targets[:, -1:]], dim=1)

    return torch.stack(list(windows())).to(torch.uint8).numpy()


def write_job(folder: Path, model: ModelConfig, train: TrainSpec, steps: int) -> dict[str, Any]:
    """Weights and tokens on disk, and what every rival's job says of them and of the optimizer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, tokens = folder / "weights.safetensors", folder / "tokens.npy"
    save_file(mixtral_weights(model, train.seed), weights)
    np.save(tokens, token_table(train, steps))
    return {
        "config": mixtral_config(model, train.sequence_length),
        "weights": str(weights),
        "tokens": str(tokens),
        "world_size": WORLD_SIZE,
        "sequences_per_rank": train.global_batch_sequences // WORLD_SIZE,
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "beta1": train.beta1,
        "beta2": train.beta2,
        "epsilon": train.adam_epsilon,
        "gradient_clip": train.gradient_clip,
    }


class Rival:
    """Two processes of one thread each that wait for steps to train, with a core of their own and freed memory kept, as
    the engine's workers. A context manager: they end with it."""

    def __init__(self, python: Path, folder: Path, job: dict[str, Any]) -> None:
        """Start them; `job` is write_job's with `rival` and `variant` (rivals_worker.py)."""
        folder.mkdir(parents=True, exist_ok=True)
        self.name = f"{job['rival']} {json.dumps(job['variant'])}"
        file = folder / "job.json"
        file.write_text(json.dumps(job, indent=1))
        port = _free_port()
        self._logs = [folder / f"rank{rank}.log" for rank in range(WORLD_SIZE)]
        self._ranks = [self._start([str(python), str(WORKER), str(file)], rank, port) for rank in range(WORLD_SIZE)]

    def _start(self, command: list[str], rank: int, port: int) -> "subprocess.Popen[str]":
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(WORLD_SIZE),
            "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            **MEMORY,
        }
        with self._logs[rank].open("w") as log:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=variables
            )

    def __enter__(self) -> "Rival":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._ranks:
            worker.kill()
            worker.wait()

    def wait_ready(self) -> None:
        """Until all ranks have built their model; UserError with the log's last line if one fails."""
        for rank in range(WORLD_SIZE):
            self._answer(rank)

    def train(self, start: int, stop: int) -> Steps:
        """Train steps start..stop, as rank 0 saw them."""
        for rank, worker in enumerate(self._ranks):
            assert worker.stdin is not None
            try:
                worker.stdin.write(f"{start} {stop}\n")
                worker.stdin.flush()
            except BrokenPipeError:
                raise self._failed(rank, "has ended") from None
        answers = [self._answer(rank) for rank in range(WORLD_SIZE)]
        return Steps(**answers[0])

    def _answer(self, rank: int) -> dict[str, Any]:
        output = self._ranks[rank].stdout
        assert output is not None
        if not select.select([output], [], [], _TIMEOUT_SECONDS)[0]:
            raise self._failed(rank, f"did not answer in {_TIMEOUT_SECONDS} s")
        line = output.readline()
        if not line:
            raise self._failed(rank, "has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failed(self, rank: int, how: str) -> UserError:
        log = self._logs[rank]
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else "its log is empty"
        return UserError(f"{self.name}: rank {rank} {how}: {last}; log: {log}", ExitCode.WORKER_DIED)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

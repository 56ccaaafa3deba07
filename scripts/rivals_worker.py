"""One rank of a rival, in the rivals' environment: DeepSpeed AutoEP, or Hugging Face under DistributedDataParallel.

    RANK=0 ... python rivals_worker.py JOB.json    (rivals_runs.py writes the job and starts the ranks)

Trains the job's Mixtral on the job's tokens from the job's weights. Reads lines "START STOP" from standard input,
trains these steps and answers each with one line of JSON on standard output; what libraries print goes to standard
error.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

Step = Callable[[Tensor, Tensor], Tensor]  # tokens and targets [B, S] -> this rank's mean loss, after the update

# DeepSpeed's settings. Under autocast weights stay in fp32; else it keeps fp32 masters.
_PRECISION: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}


def build_model(job: dict[str, Any], experts_implementation: str) -> MixtralForCausalLM:
    """The job's model with the job's weights; SDPA attention, no cache, nothing kept that training does not need."""
    config = MixtralConfig(**job["config"], attn_implementation="sdpa", use_cache=False)
    config._experts_implementation = experts_implementation
    model = MixtralForCausalLM(config)
    model.load_state_dict(load_file(job["weights"]), strict=True)
    return model.train()


def optimizer_groups(model: nn.Module, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Only matrices decay, as in the engine."""
    parameters = list(model.parameters())
    return [
        {"name": "matrices", "params": [p for p in parameters if p.dim() >= 2], "weight_decay": job["weight_decay"]},
        {"name": "norms", "params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(groups: Iterable[dict[str, Any]], job: dict[str, Any]) -> torch.optim.AdamW:
    """torch's fused AdamW, the fastest there is on a CPU."""
    return torch.optim.AdamW(
        groups, lr=job["learning_rate"], betas=(job["beta1"], job["beta2"]), eps=job["epsilon"], fused=True
    )


def mean_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of this rank's tokens, in fp32 from the logits: cheaper than the model's own, which shifts a
    copy."""
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def hugging_face(job: dict[str, Any]) -> Step:
    """DDP with its cheap settings: gradients are views of the buckets, and the graph is the same in every step."""
    model = build_model(job, job["variant"]["experts"])
    wrapped = nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, static_graph=True, bucket_cap_mb=job["variant"]["bucket_mb"]
    )
    optimizer = adamw(optimizer_groups(model, job), job)
    narrow = job["variant"]["precision"] == "autocast"

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = mean_loss(wrapped, tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), job["gradient_clip"], foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    return step


def deepspeed_settings(job: dict[str, Any]) -> dict[str, Any]:
    """AutoEP over all ranks. Its grouped GEMM needs Triton, so a CPU runs its loop over experts."""
    return {
        "train_micro_batch_size_per_gpu": job["sequences_per_rank"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": job["gradient_clip"],
        "zero_optimization": {"stage": job["variant"]["zero"]},
        "zero_allow_untested_optimizer": True,
        "expert_parallel": {
            "enabled": True,
            "autoep_size": job["world_size"],
            "preset_model": "mixtral",
            "use_grouped_mm": False,
            **job["variant"].get("expert_parallel", {}),
        },
        **_PRECISION[job["variant"]["precision"]],
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def deepspeed_autoep(job: dict[str, Any]) -> Step:
    """DeepSpeed's engine around the model, with torch's fused AdamW; experts in parameter groups of their own."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    model = build_model(job, "eager")
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=optimizer_groups(model, job),
        optimizer=lambda groups: adamw(split(groups), job),
        config=deepspeed_settings(job),
        dist_init_required=False,
    )

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = mean_loss(engine, tokens, targets)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


RIVALS: dict[str, Callable[[dict[str, Any]], Step]] = {"hugging_face": hugging_face, "deepspeed": deepspeed_autoep}


def run(step: Step, table: np.ndarray[Any, Any], mine: slice) -> dict[str, list[float]]:
    """Train on every batch of `table` [steps, sequences, S + 1]; the global mean losses in nats a token, and this
    rank's seconds, data and update included."""
    losses, seconds = [], []
    dist.barrier()
    for batch in table:
        began = time.monotonic()
        windows = torch.from_numpy(batch[mine].astype(np.int64))
        losses.append(step(windows[:, :-1], windows[:, 1:]))
        seconds.append(time.monotonic() - began)
    total = torch.stack(losses).double() / dist.get_world_size()
    dist.all_reduce(total)
    return {"losses": total.tolist(), "seconds": seconds}


def serve(job: dict[str, Any], rank: int, answers: TextIO) -> None:
    """Build, say so, and train as asked until standard input ends."""
    table = np.load(job["tokens"], mmap_mode="r")
    mine = slice(rank * job["sequences_per_rank"], (rank + 1) * job["sequences_per_rank"])
    step = RIVALS[job["rival"]](job)
    dist.barrier()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        start, stop = map(int, line.split())
        print(json.dumps(run(step, table[start:stop], mine)), file=answers, flush=True)


def main() -> None:
    """Read the job, join the other ranks, serve."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    job = json.loads(parser.parse_args().job.read_text())
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["LOCAL_RANK"])]})
    dist.init_process_group("gloo")
    serve(job, dist.get_rank(), answers)
    os._exit(0)  # threads of the libraries need not be waited for


if __name__ == "__main__":
    main()

"""Profile of one device: facts, memory and a kernel table per layer shape; and its merge with an earlier file."""

import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch

from hetermoe_cli import __version__
from hetermoe_cli.errors import UserError
from hetermoe_cli.profiler.kernels import Sizes, profile_kernels, require_precision
from hetermoe_cli.profiler.measure import Effort, Progress
from hetermoe_cli.profiler.nvml import cpu_facts, gpu_facts
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.profile import DeviceFacts, KernelTable, Precision, Profile

_RESIDENT = Path("/proc/self/statm")  # its second number; Linux only
_BRANDS = {"NVIDIA", "Tesla", "Quadro", "GeForce", "RTX"}


def resolve_device(name: str) -> torch.device:
    """`auto` (the first CUDA device, else the CPU), `cpu`, `cuda` or `cuda:N`; UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise UserError(f"profile: device {name}: torch {torch.__version__} sees {count} CUDA devices")
    return torch.device("cuda", index)


def device_facts(device: torch.device) -> DeviceFacts:
    """What NVML or the operating system says; torch's own product, capability and memory where NVML is silent."""
    if device.type == "cpu":
        return cpu_facts()
    properties = torch.cuda.get_device_properties(device)
    facts = gpu_facts(f"GPU-{properties.uuid}")
    known = {
        "product": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }
    return facts.model_copy(update={name: value for name, value in known.items() if getattr(facts, name) is None})


def default_name(facts: DeviceFacts, accelerator: str) -> str:
    """`cpu`, or the product's short name: NVIDIA A40 -> A40, Tesla V100-SXM2-16GB -> V100.

    More than 40 GB in the product's name stay in the short one: NVIDIA A100-SXM4-80GB -> A100-80.
    """
    if accelerator == "cpu":
        return "cpu"
    words = re.split(r"[\s-]+", facts.product or "cuda")
    model = next((word for word in words if word not in _BRANDS), "cuda")
    memory = next((match[1] for word in words if (match := re.fullmatch(r"(\d+)GB", word))), None)
    suffix = f"-{memory}" if memory and int(memory) > 40 else ""
    return re.sub(r"[^A-Za-z0-9_.]", "", model) + suffix


def profile_device(
    models: Sequence[ModelConfig],
    device: torch.device,
    name: str | None,
    precision: Precision,
    sizes: Sizes,
    effort: Effort,
    threads: int = 1,
    progress: Progress | None = None,
) -> Profile:
    """Measure every distinct layer shape of `models` on `device`; `threads` is torch's thread count on the CPU.

    `progress` counts over all shapes. UserError if the precision or a size is beyond the device.
    """
    require_precision(precision, device)
    facts = device_facts(device)
    shapes = list({model.shape: model for model in models}.values())
    with torch_threads(threads):
        framework = framework_bytes(device)
        tables = [
            profile_kernels(model, precision, device, sizes, effort, _part(progress, index, len(shapes)))
            for index, model in enumerate(shapes)
        ]
    if facts.memory_bytes is None:
        raise UserError("profile: the operating system does not tell the memory of this machine")
    return Profile(
        device=name or default_name(facts, device.type),
        accelerator="cuda" if device.type == "cuda" else "cpu",
        source="measured",
        date=date.today(),
        software={
            "hetermoe": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": str(threads),
        },
        facts=facts,
        memory_bytes=facts.memory_bytes,
        framework_bytes=framework,
        tables=tables,
    )


def framework_bytes(device: torch.device) -> int:
    """Memory that python, torch and (on CUDA) the context take before any tensor of the model.

    CPU: this process' resident memory now. CUDA: what a first product leaves in use beside torch's own allocations,
    other processes on that GPU included.
    """
    if device.type == "cpu":
        pages = int(_RESIDENT.read_text().split()[1]) if _RESIDENT.exists() else 0
        return pages * os.sysconf("SC_PAGE_SIZE")
    square = torch.ones(64, 64, device=device)
    (square @ square).sum().item()
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def merge(old: Profile | None, new: Profile) -> tuple[Profile, str]:
    """`new`, with the tables of `old` that it does not replace; and what was done with `old`, in words ("" if nothing).

    Only measurements of the same product merge: a modelled file, or another machine's, is replaced as a whole.
    """
    if old is None:
        return new, ""
    if old.source != "measured":
        return new, f"the {old.source} profile was replaced as a whole: it does not mix with measured tables"
    if (old.accelerator, old.facts.product) != (new.accelerator, new.facts.product):
        return new, f"the profile of another product ({old.facts.product or old.accelerator}) was replaced as a whole"
    taken = {_key(table) for table in new.tables}
    kept = [table for table in old.tables if _key(table) not in taken]
    replaced = len(old.tables) - len(kept)
    note = f"{replaced} tables replaced, {len(kept)} kept"
    if kept and old.software != new.software:
        note += f" (measured with {', '.join(f'{k} {v}' for k, v in old.software.items())})"
    return new.model_copy(update={"tables": kept + new.tables}), note


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch's intra-op thread count within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _key(table: KernelTable) -> tuple[object, str]:
    return table.shape, table.precision


def _part(progress: Progress | None, index: int, parts: int) -> Progress | None:
    """Progress of part `index` of `parts` equal ones, in the units of one part."""
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, parts * total)

"""Profile of one device: facts, memory and a kernel table per layer shape."""

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
from hetermoe_cli.model.warm_up import warm_up
from hetermoe_cli.profiler.kernels import Sizes, profile_kernels, require_precision
from hetermoe_cli.profiler.measure import Effort, Progress
from hetermoe_cli.profiler.nvml import cpu_facts, gpu_facts
from hetermoe_cli.runtime.modules.parts import DTYPES
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.profile import DeviceFacts, Precision, Profile

_RESIDENT = Path("/proc/self/statm")  # its second number; Linux only
_BRANDS = {"NVIDIA", "Tesla", "Quadro", "GeForce", "RTX"}
_SEVERAL_SIZES = {"A100": 40}  # GB of the plain name; a larger one is another device type


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
    require_kernels(index)
    return torch.device("cuda", index)


def require_kernels(index: int) -> None:
    """UserError where torch was built for other CUDA devices: the first kernel would fail."""
    capability, built = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if built and not any(_runs_on(capability, architecture) for architecture in built):
        raise UserError(
            f"CUDA device {index} has compute capability {'.'.join(map(str, capability))}, torch {torch.__version__} "
            f"has kernels for {' '.join(built)} only: install a build of it that has them (for V100: pip install torch "
            "--index-url https://download.pytorch.org/whl/cu126)"
        )


def _runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """Whether a device runs kernels built for `architecture`: sm_XY (binary) or compute_XY (compiled for it)."""
    kind, _, number = architecture.partition("_")
    if kind not in ("sm", "compute"):  # not CUDA's
        return True
    major, minor = divmod(int(re.sub(r"\D", "", number)), 10)
    if kind == "compute":
        return (major, minor) <= capability
    return major == capability[0] and minor <= capability[1]


def device_facts(device: torch.device) -> DeviceFacts:
    """What NVML or the operating system says, torch's product and capability where NVML is silent; torch's memory."""
    if device.type == "cpu":
        return cpu_facts()
    properties = torch.cuda.get_device_properties(device)
    facts = gpu_facts(f"GPU-{properties.uuid}")
    known = {
        "product": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }
    found = {name: value for name, value in known.items() if getattr(facts, name) is None}
    return facts.model_copy(update={**found, "memory_bytes": properties.total_memory})  # NVML counts the driver's too


def default_name(facts: DeviceFacts, accelerator: str) -> str:
    """`cpu`, or the product's short name: NVIDIA A40 -> A40, NVIDIA GeForce RTX 3090 -> RTX3090.

    Where a product comes in sizes, the larger keeps its own: NVIDIA A100-SXM4-80GB -> A100-80.
    """
    if accelerator == "cpu":
        return "cpu"
    words = re.split(r"[\s-]+", facts.product or "cuda")
    model = next((word for word in words if word not in _BRANDS), "cuda")
    if model.isdigit() and "RTX" in words:
        model = f"RTX{model}"
    memory = next((match[1] for word in words if (match := re.fullmatch(r"(\d+)GB", word))), None)
    suffix = f"-{memory}" if memory and int(memory) > _SEVERAL_SIZES.get(model, int(memory)) else ""
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
        framework = framework_bytes(device, DTYPES[precision])
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


def framework_bytes(device: torch.device, dtype: torch.dtype) -> int:
    """Memory that python, torch and (on CUDA) the context take before any tensor of the model, after a first step of
    training.

    CPU: this process' resident memory. CUDA: what is in use beside torch's own allocations, other processes on that
    GPU included.
    """
    warm_up(device, dtype)
    if device.type == "cpu":
        pages = int(_RESIDENT.read_text().split()[1]) if _RESIDENT.exists() else 0
        return pages * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch's intra-op thread count within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _part(progress: Progress | None, index: int, parts: int) -> Progress | None:
    """Progress of part `index` of `parts` equal ones, in the units of one part."""
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, parts * total)

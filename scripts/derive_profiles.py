"""Derive the modelled reference profiles and link records in profiles/ from data sheets and the HeterMoE paper.

    python scripts/derive_profiles.py            write profiles/*.yaml and profiles/links/*.yaml
    python scripts/derive_profiles.py --check    exit 1 if a committed file is not what this script would write

The model is in roofline.py; this file holds the constants, where they come from, and the files' layout.
"Paper" is Wu, Liu et al., HeterMoE, arXiv 2504.03871; its ratios between GPU types calibrate the two old types.
"""

import argparse
import itertools
import re
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from hetermoe_cli.spec.cluster import Link, LinkRecord
from hetermoe_cli.spec.files import dump, write_atomic
from hetermoe_cli.spec.model import NAMED_MODELS, LayerShape
from hetermoe_cli.spec.profile import (
    BYTES_PER_ELEMENT,
    AttentionPoint,
    DeviceFacts,
    ExpertPoint,
    HeadPoint,
    KernelTable,
    Profile,
)
from roofline import (
    CORE_BACKWARD,
    PRECISION,
    Rates,
    Work,
    attention_saved_bytes,
    attention_work,
    expert_saved_bytes,
    expert_work,
    head_saved_bytes,
    head_work,
)

PROFILES = Path(__file__).resolve().parent.parent / "profiles"
SHAPES = tuple(NAMED_MODELS[name].shape for name in ("mixtral-w1", "mixtral-d1", "mixtral-8x7b"))
SEQUENCE_LENGTHS = tuple(1024 * k for k in (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64))
SEQUENCES = (1, 2, 4, 8)
TOKENS = tuple(2**power for power in range(6, 18))

GEMM_SHARE = 0.6  # of the data sheet's dense fp16 rate: the middle of the 40-80 % that large GEMMs reach
CORE_SHARE = 0.6  # of the sustained GEMM rate: FlashAttention 2 forward and backward on Ampere and Ada
BANDWIDTH_SHARE = 0.9  # of the data sheet's bandwidth: a device copy on an H100 measured 3.0 of 3.35 TB/s
OPTIMIZER_BYTES = 28  # per parameter: fp16 gradient in, fp32 weight and two moments in and out, fp16 weight out
FRAMEWORK_BYTES = 1_200_000_000  # assumed: CUDA context, cuBLAS workspaces, NCCL buffers, allocator slack

V100_EXPERT_SLOWDOWN = 1 / 0.8  # paper: V100 runs experts at 80 % of A40's speed at every length
V100_ATTENTION_SLOWDOWN = 3.7  # paper: one Mixtral-8x7B attention layer at 64K, against A40
T4_EXPERT_SLOWDOWN = 7.0  # paper: on average, against L40S
T4_ATTENTION_SLOWDOWN = 13.6  # paper: one Mixtral-8x7B attention layer at 64K, against L40S
T4_ATTENTION_SLOWDOWN_4K = 9.9  # paper: at 4K; not used to calibrate, printed as a check
CALIBRATION_LENGTH = 64 * 1024

ETHERNET_SHARE = 0.9  # of the line rate: Ethernet, IP and transport headers, and NCCL's pipelining
PCIE_SHARE = 0.8  # of the raw lane rate: packet headers and flow control
NVLINK_SHARE = 0.8  # of the data sheet's rate per direction


@dataclass(frozen=True)
class Sheet:
    """Data-sheet figures: dense fp16 tensor rate in TFLOP/s, memory in GB (1e9 bytes), bandwidth in GB/s."""

    product: str
    capability: str
    teraflops: float
    memory_gigabytes: int
    gigabytes_per_second: float


@dataclass(frozen=True)
class Gpu:
    """A GPU type; experts take `expert_slowdown` times what `expert_rates` give."""

    sheet: Sheet
    rates: Rates
    expert_rates: Rates
    expert_slowdown: float
    origin: str


def new_gpu(sheet: Sheet) -> Gpu:
    """Rates as stated shares of the data sheet."""
    gemm = GEMM_SHARE * sheet.teraflops * 1e12
    rates = Rates(gemm, CORE_SHARE * gemm, bandwidth(sheet))
    origin = (
        f"{GEMM_SHARE} x {sheet.teraflops:g} TFLOP/s of the data sheet = {gemm / 1e12:.1f}; "
        f"{CORE_SHARE} x that = {rates.core / 1e12:.1f} TFLOP/s (FlashAttention 2)"
    )
    return Gpu(sheet, rates, rates, 1.0, origin)


def old_gpu(sheet: Sheet, reference: Gpu, expert_slowdown: float, attention_slowdown: float) -> Gpu:
    """GEMM rate from the paper's expert ratio; core rate solved so that the attention ratio holds at 64K.

    The ratio is taken over forward + backward of one Mixtral-8x7B attention stage, one sequence.
    """
    work = attention_work(NAMED_MODELS["mixtral-8x7b"].shape, CALIBRATION_LENGTH, 1)
    target = attention_slowdown * (reference.rates.forward(work) + reference.rates.backward(work))
    gemm = reference.rates.gemm / expert_slowdown
    no_core = Rates(gemm, float("inf"), bandwidth(sheet))
    left = target - no_core.forward(work) - no_core.backward(work)
    rates = Rates(gemm, (1 + CORE_BACKWARD) * work.core / left, no_core.bandwidth)
    name = reference.sheet.product.split()[-1]
    origin = (
        f"{gemm / 1e12:.1f} TFLOP/s; {rates.core / 1e12:.1f}\n"
        f"  experts take {expert_slowdown:g} x {name}'s seconds at every size, all GEMM rates follow;\n"
        f"  the core's rate is solved so that a Mixtral-8x7B attention stage, forward + backward, takes\n"
        f"  {attention_slowdown} x {name}'s seconds at 64K: ratios measured by Wu, Liu et al., arXiv 2504.03871"
    )
    return Gpu(sheet, rates, reference.rates, expert_slowdown, origin)


def bandwidth(sheet: Sheet) -> float:
    """Sustained bytes per second."""
    return BANDWIDTH_SHARE * sheet.gigabytes_per_second * 1e9


def gpus() -> dict[str, Gpu]:
    """The reference GPU types by device name."""
    a40 = new_gpu(Sheet("NVIDIA A40", "8.6", 149.7, 48, 696))
    l40s = new_gpu(Sheet("NVIDIA L40S", "8.9", 362, 48, 864))
    v100 = Sheet("Tesla V100-PCIE-16GB", "7.0", 112, 16, 900)
    t4 = Sheet("Tesla T4", "7.5", 65, 16, 320)
    return {
        "A40": a40,
        "V100": old_gpu(v100, a40, V100_EXPERT_SLOWDOWN, V100_ATTENTION_SLOWDOWN),
        "L40S": l40s,
        "T4": old_gpu(t4, l40s, T4_EXPERT_SLOWDOWN, T4_ATTENTION_SLOWDOWN),
    }


def table(gpu: Gpu, shape: LayerShape) -> KernelTable:
    """All points of one layer shape."""
    element = BYTES_PER_ELEMENT[PRECISION]
    attention = [
        AttentionPoint(
            sequence_length=length,
            sequences=sequences,
            saved_bytes=attention_saved_bytes(shape, length, sequences, element),
            **seconds(gpu.rates, attention_work(shape, length, sequences)),
        )
        for length, sequences in itertools.product(SEQUENCE_LENGTHS, SEQUENCES)
    ]
    expert, head = [], []
    for n in TOKENS:
        times = seconds(gpu.expert_rates, expert_work(shape, n), gpu.expert_slowdown)
        expert.append(ExpertPoint(tokens=n, saved_bytes=expert_saved_bytes(shape, n, element), **times))
        times = seconds(gpu.rates, head_work(shape, n))
        head.append(HeadPoint(tokens=n, saved_bytes=head_saved_bytes(shape, n, element), **times))
    return KernelTable(
        shape=shape,
        precision=PRECISION,
        attention=attention,
        expert=expert,
        head=head,
        optimizer_seconds_per_parameter=rounded(OPTIMIZER_BYTES / gpu.rates.bandwidth),
    )


def seconds(rates: Rates, work: Work, slowdown: float = 1.0) -> dict[str, float]:
    """The two times of a Timing."""
    return {
        "forward_seconds": rounded(slowdown * rates.forward(work)),
        "backward_seconds": rounded(slowdown * rates.backward(work)),
    }


def rounded(value: float) -> float:
    """Four significant digits: more would pretend, and make the files long."""
    return float(f"{value:.4g}")


def profile(name: str, gpu: Gpu) -> Profile:
    """The modelled profile, with no field that the data sheet does not give."""
    memory = gpu.sheet.memory_gigabytes * 10**9
    return Profile(
        device=name,
        accelerator="cuda",
        source="modelled",
        date=date.today(),
        comment="Derived by scripts/derive_profiles.py, not measured: see the comments on top of this file.",
        facts=DeviceFacts(product=gpu.sheet.product, compute_capability=gpu.sheet.capability, memory_bytes=memory),
        memory_bytes=memory,
        framework_bytes=FRAMEWORK_BYTES,
        tables=[table(gpu, shape) for shape in SHAPES],
    )


def header(name: str, gpu: Gpu) -> str:
    """The origin of every field, as comment lines."""
    sheet = gpu.sheet
    return "\n".join(
        [
            f"{name}: MODELLED by scripts/derive_profiles.py (regenerate with it, do not edit). Nothing was measured.",
            f"facts, memory_bytes: data sheet; {sheet.memory_gigabytes} GB read as {sheet.memory_gigabytes}e9 bytes "
            "(drivers show about that: GiB less ECC)",
            "framework_bytes: assumed 1.2 GB (CUDA context, cuBLAS workspaces, NCCL buffers)",
            f"GEMM, attention core: {gpu.origin}",
            f"memory traffic: {BANDWIDTH_SHARE} x {sheet.gigabytes_per_second:g} GB/s of the data sheet",
            "seconds: scripts/roofline.py; backward: GEMM and traffic 2 x forward, attention core 2.5 x",
            "saved_bytes: counted in model/*.py for fp16; a test compares the count with the profiler's measurement",
            f"optimizer_seconds_per_parameter: {OPTIMIZER_BYTES} bytes of mixed-precision AdamW over the bandwidth",
            "spread, peak_bytes, other facts: null, since nothing was run",
        ]
    )


def links() -> dict[str, LinkRecord]:
    """The stated link records: (raw GB/s a direction, share that lasts, microseconds, where from)."""
    stated = {
        "ethernet-100g": (12.5, ETHERNET_SHARE, 20, "100 Gb/s line rate"),
        "ethernet-200g": (25.0, ETHERNET_SHARE, 20, "200 Gb/s line rate"),
        "pcie3-x16": (15.75, PCIE_SHARE, 10, "16 lanes of 8 GT/s, 128b/130b coded"),
        "pcie4-x16": (31.5, PCIE_SHARE, 10, "16 lanes of 16 GT/s, 128b/130b coded"),
        "nvlink-a100": (300.0, NVLINK_SHARE, 5, "12 NVLink 3 links of 25 GB/s a direction, A100 data sheet"),
    }
    return {
        name: LinkRecord(
            name=name,
            source="modelled",
            date=date.today(),
            link=Link(bandwidth_gigabytes_per_second=rounded(raw * share), latency_microseconds=latency),
            comment=f"Stated, not measured: {share} of {raw:g} GB/s ({origin}); latency assumed for NCCL send/recv.",
        )
        for name, (raw, share, latency, origin) in stated.items()
    }


def render() -> dict[str, str]:
    """File name below profiles/ -> text."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, gpu in gpus().items():
            dump(profile(name, gpu), root / f"{name}.yaml", header(name, gpu))
        for name, record in links().items():
            dump(record, root / "links" / f"{name}.yaml", "Stated by scripts/derive_profiles.py; not measured.")
        return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*.yaml"))}


def undated(text: str) -> str:
    """The text without its date."""
    return re.sub(r"^date:.*$", "date:", text, flags=re.MULTILINE)


def stale(folder: Path, texts: dict[str, str]) -> list[str]:
    """Files below `folder` that are missing or differ in more than the date."""
    committed = {name: (folder / name).read_text() for name in texts if (folder / name).exists()}
    return [name for name, text in texts.items() if undated(committed.get(name, "")) != undated(text)]


def slowdown(old: Gpu, new: Gpu, length: int) -> float:
    """Seconds of `old` over seconds of `new`, forward + backward of one Mixtral-8x7B attention stage."""
    work = attention_work(NAMED_MODELS["mixtral-8x7b"].shape, length, 1)
    seconds_old, seconds_new = (gpu.rates.forward(work) + gpu.rates.backward(work) for gpu in (old, new))
    return seconds_old / seconds_new


def report() -> str:
    """The paper's attention ratios against the model's."""
    by_name, lines = gpus(), []
    for old, new, length, paper, how in (
        ("V100", "A40", CALIBRATION_LENGTH, V100_ATTENTION_SLOWDOWN, "calibrated"),
        ("T4", "L40S", CALIBRATION_LENGTH, T4_ATTENTION_SLOWDOWN, "calibrated"),
        ("T4", "L40S", 4096, T4_ATTENTION_SLOWDOWN_4K, "check"),
    ):
        model = slowdown(by_name[old], by_name[new], length)
        lines.append(f"attention {old} / {new} at {length}: {model:.2f}x, paper {paper}x ({how})")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description="Derive the modelled reference profiles.")
    parser.add_argument("--check", action="store_true", help="only compare the committed files")
    parser.add_argument("--output", type=Path, default=PROFILES)
    options = parser.parse_args(arguments)
    texts = render()
    old = stale(options.output, texts)
    if not options.check:
        for name in old:
            write_atomic(options.output / name, texts[name])
    print(report())
    for name in old:
        print(f"{'STALE' if options.check else 'written'}: {options.output / name}")
    return int(options.check and bool(old))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

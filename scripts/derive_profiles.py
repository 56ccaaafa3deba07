"""Derive the modelled reference profiles and link records in profiles/ from data sheets and the HeterMoE paper.

    python scripts/derive_profiles.py            write profiles/*.yaml and profiles/links/*.yaml
    python scripts/derive_profiles.py --check    exit 1 if a committed file is not what this script would write

Nothing here was measured on the devices, and every file says so. The kernels' model is in roofline.py; the GPU types,
their data sheets and the shares of them that kernels reach are in cards.py, the links in wires.py. This file holds what
is tabulated for whom, and the files' layout. fp16 and bf16 tables are equal but for their name: tensor cores multiply
both at one rate. V100 and T4 have no bf16 and no such tables.
"""

import argparse
import itertools
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from cards import BANDWIDTH_SHARE, Gpu, gpus, report
from hetermoe_cli.spec.files import dump, write_atomic
from hetermoe_cli.spec.model import LayerShape
from hetermoe_cli.spec.named_models import NAMED_MODELS
from hetermoe_cli.spec.profile import (
    AttentionPoint,
    DensePoint,
    DeviceFacts,
    ExpertPoint,
    HeadPoint,
    KernelTable,
    Precision,
    Profile,
)
from roofline import (
    ELEMENT_BYTES,
    Rates,
    Work,
    attention_saved_bytes,
    attention_work,
    dense_saved_bytes,
    dense_work,
    expert_saved_bytes,
    expert_work,
    head_saved_bytes,
    head_work,
)
from wires import links

PROFILES = Path(__file__).resolve().parent.parent / "profiles"

OPTIMIZER_BYTES = 28  # per parameter: 16-bit gradient in, fp32 weight and two moments in and out, 16-bit weight out
FRAMEWORK_BYTES = 1_200_000_000  # assumed: CUDA context, cuBLAS workspaces, NCCL buffers, allocator slack


@dataclass(frozen=True)
class Grid:
    """Tables of the shapes of `models` at `precisions`: sequence lengths in units of 1024, sequences, powers of 2 of
    expert and head tokens."""

    models: tuple[str, ...]
    precisions: tuple[Precision, ...]
    kilotokens: tuple[int, ...]
    sequences: tuple[int, ...]
    powers: range

    @property
    def tokens(self) -> list[int]:
        """Rows of an expert and tokens of the head."""
        return [2**power for power in self.powers]


PAPER = Grid(  # W1 has W2's shape, D1 that of D2 and D3; the paper trains in fp16
    models=("mixtral-w1", "mixtral-d1", "mixtral-8x7b"),
    precisions=("fp16",),
    kilotokens=(1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64),
    sequences=(1, 2, 4, 8),
    powers=range(6, 18),
)
LARGE = Grid(  # with many experts a single one gets few rows
    models=("qwen3-30b-a3b", "qwen3-235b", "deepseek-v3"),
    precisions=("fp16", "bf16"),
    kilotokens=(2, 4, 8, 16, 32),
    sequences=(1, 2, 4, 8),
    powers=range(4, 18),
)
GRIDS = (PAPER, LARGE)  # of every GPU type, but for bf16 where its tensor cores have none


def tables(gpu: Gpu) -> Iterator[KernelTable]:
    """The device's tables."""
    for grid in GRIDS:
        for model, precision in itertools.product(grid.models, grid.precisions):
            if precision != "bf16" or gpu.sheet.has_bf16:
                yield table(gpu, NAMED_MODELS[model].shape, precision, grid)


def table(gpu: Gpu, shape: LayerShape, precision: Precision, grid: Grid) -> KernelTable:
    """All points of one layer shape."""
    sizes = [(1024 * kilo, sequences) for kilo, sequences in itertools.product(grid.kilotokens, grid.sequences)]
    attention = [
        AttentionPoint(
            sequence_length=length,
            sequences=sequences,
            saved_bytes=attention_saved_bytes(shape, length, sequences, ELEMENT_BYTES),
            **seconds(gpu.rates, attention_work(shape, length, sequences)),
        )
        for length, sequences in sizes
    ]
    dense = [
        DensePoint(
            sequence_length=length,
            sequences=sequences,
            saved_bytes=dense_saved_bytes(shape, length, sequences, ELEMENT_BYTES),
            **seconds(gpu.rates, dense_work(shape, length, sequences)),
        )
        for length, sequences in sizes
        if shape.dense_ffn_size
    ]
    expert, head = [], []
    for n in grid.tokens:
        times = seconds(gpu.expert_rates, expert_work(shape, n), gpu.expert_slowdown)
        expert.append(ExpertPoint(tokens=n, saved_bytes=expert_saved_bytes(shape, n, ELEMENT_BYTES), **times))
        times = seconds(gpu.rates, head_work(shape, n))
        head.append(HeadPoint(tokens=n, saved_bytes=head_saved_bytes(shape, n, ELEMENT_BYTES), **times))
    return KernelTable(
        shape=shape,
        precision=precision,
        attention=attention,
        dense=dense,
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
    memory = gpu.sheet.memory_bytes
    return Profile(
        device=name,
        accelerator="cuda",
        source="modelled",
        date=date.today(),
        comment="Derived by scripts/derive_profiles.py, not measured: see the comments on top of this file.",
        facts=DeviceFacts(product=gpu.sheet.product, compute_capability=gpu.sheet.capability, memory_bytes=memory),
        memory_bytes=memory,
        framework_bytes=FRAMEWORK_BYTES,
        tables=list(tables(gpu)),
    )


def header(name: str, gpu: Gpu) -> str:
    """The origin of every field, as comment lines."""
    sheet = gpu.sheet
    memory = f"data sheet; {sheet.memory_gigabytes} GB read as {sheet.memory_gigabytes}e9 bytes "
    memory += "(drivers show about that: GiB less ECC)"
    if sheet.reported_bytes:
        memory = "as CUDA reports them (deviceQuery)"
    precision = "fp16 and bf16, at equal rates" if sheet.has_bf16 else "fp16 only: no bf16 below capability 8.0"
    return "\n".join(
        [
            f"{name}: MODELLED by scripts/derive_profiles.py (regenerate with it, do not edit). Nothing was measured.",
            f"sheet: {sheet.source}",
            f"facts, memory_bytes: {memory}",
            "framework_bytes: assumed 1.2 GB (CUDA context, cuBLAS workspaces, NCCL buffers)",
            f"GEMM, attention core: {gpu.origin}",
            f"memory traffic: {BANDWIDTH_SHARE} x {sheet.gigabytes_per_second:g} GB/s of the data sheet",
            f"precision: {precision}",
            "seconds: scripts/roofline.py; backward: GEMM and traffic 2 x forward, attention core 2.5 x (latent 2.6 x)",
            "attention of a shape with shared experts: they run in it, on the device's own tokens",
            "dense: one dense layer (attention, SwiGLU of dense_ffn_size) of a model that begins with such layers",
            "saved_bytes: counted in model/ for 2 bytes an element; tests compare the count with measurements",
            f"optimizer_seconds_per_parameter: {OPTIMIZER_BYTES} bytes of mixed-precision AdamW over the bandwidth",
            "spread, peak_bytes, other facts: null, since nothing was run",
        ]
    )


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

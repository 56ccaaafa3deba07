"""`hetermoe profile`: measure this machine's kernels and links into profile files."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hetermoe_cli.cli.link import check_name, describe
from hetermoe_cli.cli.progress_bar import progress_bar
from hetermoe_cli.cli.run_options import Json

if TYPE_CHECKING:
    from hetermoe_cli.spec.cluster import LinkRecord
    from hetermoe_cli.spec.profile import Profile, Timing

# Default sequence lengths, numbers of sequences and rows by accelerator, and the --quick ones.
_SIZES = {
    ("cpu", False): ((64, 128, 256), (1, 2, 4), tuple(2**power for power in range(4, 12))),
    ("cpu", True): ((64, 128), (1, 2), (16, 64, 256, 1024)),
    ("cuda", False): ((1024, 2048, 4096, 8192, 16384, 32768), (1, 2), tuple(2**power for power in range(6, 16))),
    ("cuda", True): ((1024, 4096), (1, 2), (64, 512, 4096)),
}
_LARGEST_SIZE = 2**24


PrecisionChoice = Literal["fp16", "bf16", "fp32", "fp64"]
_PRECISION: dict[str, PrecisionChoice] = {"cpu": "fp32", "cuda": "fp16"}  # cuda: as a training spec's default


def profile(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Named size, YAML or Hugging Face config.json; repeat for several.", show_default="tiny"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    name: Annotated[
        str | None, typer.Option(help="Device type's name in plans.", show_default="cpu, or short product name")
    ] = None,
    precision: Annotated[
        PrecisionChoice | None,
        typer.Option(help="Element type.", show_default="fp16 on CUDA devices, as a training spec's; fp32 on CPUs"),
    ] = None,
    sequence_lengths: Annotated[str | None, typer.Option(help="For attention, such as 64,128.")] = None,
    sequences: Annotated[str | None, typer.Option(help="Sequences attended to at once, such as 1,2,4.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Rows of an expert and of the head, such as 64,256.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; each worker runs with 1.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and repeats.")] = False,
    no_network: Annotated[bool, typer.Option("--no-network", help="Do not measure the link of two workers.")] = False,
    link: Annotated[
        str | None, typer.Option(help="Link's name in cluster files.", show_default="cpu-pair or nccl-pair")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the profiles.")] = Path("profiles"),
    json_output: Json = False,
) -> None:
    """Measure attention, experts and head on one device, and the link between two workers of this machine.

    Writes OUTPUT/DEVICE.yaml and OUTPUT/links/LINK.yaml. A measured file keeps its other tables.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise typer.BadParameter(f"{device!r} is none of auto, cpu, cuda, cuda:N", param_hint="--device")
    for option, value in (("--name", name), ("--link", link)):
        if value is not None:
            check_name(value, option)
    given = [
        _numbers("--sequence-lengths", sequence_lengths),
        _numbers("--sequences", sequences),
        _numbers("--tokens", tokens),
    ]

    from hetermoe_cli.profiler.kernels import Sizes
    from hetermoe_cli.profiler.measure import QUICK, Effort
    from hetermoe_cli.profiler.profile import default_name, device_facts, profile_device, resolve_device
    from hetermoe_cli.profiler.tables import merge
    from hetermoe_cli.spec.files import dump
    from hetermoe_cli.spec.named_models import load_model

    models = [load_model(item) for item in model or ["tiny"]]
    target = resolve_device(device)
    name = name or default_name(device_facts(target), target.type)
    path = output / f"{name}.yaml"
    old = _existing(path)
    sizes = Sizes(*(numbers or default for numbers, default in zip(given, _SIZES[target.type, quick], strict=True)))
    effort = QUICK if quick else Effort()
    element = precision or _PRECISION[target.type]
    with progress_bar(f"profiling {name}") as progress:
        measured = profile_device(models, target, name, element, sizes, effort, threads, progress)
    merged, note = merge(old, measured)
    dump(merged, path, "Measured by `hetermoe profile`; seconds are medians, spread is IQR / median.")
    pair = None if no_network else _link(link, target.type, quick)
    if pair:
        dump(pair, output / "links" / f"{pair.name}.yaml", "Measured by `hetermoe profile`.")
    if json_output:
        _print_json(measured, pair, path, note)
    else:
        _print_tables(measured, pair)
        typer.echo(f"hetermoe: wrote {path}{f': {note}' if note else ''}", err=True)


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Positive integers of a comma-separated list; usage error (exit 2) else."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,8}", part) and 0 < int(part) <= _LARGEST_SIZE for part in parts):
        message = f"{text!r} is not a comma-separated list of numbers between 1 and {_LARGEST_SIZE}"
        raise typer.BadParameter(message, param_hint=option)
    return tuple(int(part) for part in parts)


def _existing(path: Path) -> "Profile | None":
    """The profile to merge with; UserError before any measuring if it is unreadable or cannot be written."""
    from hetermoe_cli.spec.files import check_writable, load
    from hetermoe_cli.spec.profile import Profile

    check_writable(path)
    return load(Profile, path) if path.exists() else None


def _link(name: str | None, accelerator: str, quick: bool) -> "LinkRecord | None":
    """NCCL where two CUDA devices exist, else shared memory or gloo."""
    import torch

    from hetermoe_cli.launch.link import measure_link
    from hetermoe_cli.profiler.network import NAMES, QUICK_SIZES, SIZES, LinkTask

    pair = accelerator == "cuda" and torch.cuda.device_count() > 1
    task = LinkTask("nccl" if pair else "gloo", sizes=QUICK_SIZES if quick else SIZES)
    return measure_link(lambda: task, name or NAMES[task.backend])


def _print_json(measured: "Profile", link: "LinkRecord | None", path: Path, note: str) -> None:
    """What was measured now (not the merged file), and where it went."""
    import json

    data: dict[str, Any] = {
        "file": str(path),
        "note": note,
        "profile": measured.model_dump(mode="json"),
        "link": link.model_dump(mode="json") if link else None,
    }
    typer.echo(json.dumps(data))


def _print_tables(measured: "Profile", link: "LinkRecord | None") -> None:
    """Milliseconds, kilobytes and spread of every point, then optimizer and link."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for kernels in measured.tables:
        table = Table(title=f"{measured.device} {kernels.precision}: {kernels.shape.label()}")
        for column in ("kernel", "size", "forward ms", "backward ms", "saved kB", "spread"):
            table.add_column(column, justify="left" if column == "kernel" else "right")
        rows: list[tuple[str, str, Timing]] = [
            ("attention", f"{p.sequences} x {p.sequence_length}", p) for p in kernels.attention
        ]
        rows += [("dense layer", f"{p.sequences} x {p.sequence_length}", p) for p in kernels.dense]
        rows += [("expert", f"{p.tokens}", p) for p in kernels.expert]
        rows += [("head", f"{p.tokens}", p) for p in kernels.head]
        for kernel, size, point in rows:
            times = [f"{1000 * seconds:.3f}" for seconds in (point.forward_seconds, point.backward_seconds)]
            table.add_row(kernel, size, *times, f"{point.saved_bytes / 1000:.1f}", f"{point.spread or 0:.0%}")
        console.print(table)
        console.print(f"optimizer: {1e9 * kernels.optimizer_seconds_per_parameter:.3f} ns per parameter")
    if link:
        console.print(describe(link))

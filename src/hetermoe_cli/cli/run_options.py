"""Options that several commands share: what to train on, emulation, which of several nodes this is."""

from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from hetermoe_cli.launch.prepare import EmulateOptions

Data = Annotated[
    list[Path] | None,
    typer.Option(help="Text file or folder, or token files (.npy, .bin); repeatable. Default: Python's own."),
]
Router = Annotated[Literal["learned", "balanced"], typer.Option(help="balanced: forced equal loads, for timing.")]
TraceSteps = Annotated[int, typer.Option(min=0, help="Steps that every rank traces, after two of warm-up.")]
NodeRank = Annotated[int | None, typer.Option(min=0, help="Of several nodes: which one this is; default: Slurm's.")]
MasterAddr = Annotated[str | None, typer.Option(help="Address of node 0; default: MASTER_ADDR, or Slurm's first host.")]
MasterPort = Annotated[
    int | None, typer.Option(min=1, max=65535, help="Port of node 0; default: MASTER_PORT, or 29500.")
]
Emulate = Annotated[bool, typer.Option("--emulate", help="Emulate the plan's devices and links on this machine.")]
Executed = Annotated[str | None, typer.Option(help="With --emulate: the model really trained (name or file).")]
ExecutedLength = Annotated[int, typer.Option(min=1, help="With --emulate: its sequence length.")]
ExecutedPrecision = Annotated[Literal["fp32", "fp64"], typer.Option(help="With --emulate: its precision.")]
TimeScale = Annotated[
    float | None, typer.Option(help="With --emulate: seconds per nominal second; default: automatic.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print exactly what would run, start nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def emulation(
    emulate: bool,
    executed: str | None,
    sequence_length: int,
    precision: Literal["fp32", "fp64"],
    time_scale: float | None,
) -> "EmulateOptions | None":
    """What was asked for; None without --emulate. A usage error if the options contradict each other."""
    from hetermoe_cli.launch.prepare import EmulateOptions
    from hetermoe_cli.spec.named_models import load_model

    if time_scale is not None and not 0 < time_scale < inf:
        raise typer.BadParameter(f"{time_scale:g}: must be a positive number", param_hint="--time-scale")
    if emulate:
        return EmulateOptions(load_model(executed) if executed else None, sequence_length, time_scale, precision)
    if executed or time_scale:
        raise typer.BadParameter("only with --emulate", param_hint="--executed, --time-scale")
    return None

"""What `hetermoe train` prints: the dry run, and the summary at the end."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from hetermoe_cli.launch.place import Place, PlaceOptions, command_of_node
from hetermoe_cli.report.run_figures import RunFigures, figures
from hetermoe_cli.report.run_memory import memory_table, run_memory
from hetermoe_cli.spec.run import RunSpec


def what_runs(run: RunSpec, arguments: Sequence[str] = (), options: PlaceOptions | None = None) -> dict[str, Any]:
    """Exactly what would run: of a run on several nodes the commands of all; the workers' command and environment;
    run.yaml. `arguments`: those of this command."""
    from hetermoe_cli.launch.interfaces import socket_environment
    from hetermoe_cli.launch.local import command, environment

    several = len(run.nodes) > 1
    return {
        "workers": run.world.size,
        **({"nodes": _nodes(run, arguments, options or PlaceOptions())} if several else {}),
        "command": command(run),
        "environment": environment(run) | ({} if several else socket_environment(Place())),
        "run": run.model_dump(mode="json"),
    }


def _nodes(run: RunSpec, arguments: Sequence[str], options: PlaceOptions) -> list[dict[str, Any]]:
    inputs = run.plan.inputs
    names, devices = inputs.whole.cluster.node_names, inputs.devices()
    host = options.master_addr or "HOST"
    return [
        {
            "name": names[number],
            "ranks": ranks,
            "devices": [devices[rank].type for rank in ranks],
            "command": command_of_node(arguments, number, host, options.master_port),
        }
        for number, ranks in zip(inputs.node_numbers, run.nodes, strict=True)
    ]


def print_dry_run(what: dict[str, Any], as_json: bool) -> None:
    """What would run, as YAML or JSON."""
    print(json.dumps(what) if as_json else yaml.safe_dump(what, sort_keys=False, width=120, default_flow_style=None))


def print_summary(folder: Path, as_json: bool) -> None:
    """Figures of the finished run on stdout."""
    found, memory = figures(folder), run_memory(folder)
    if as_json:
        print(json.dumps({"folder": str(folder), **found.as_dict(), "memory": memory.as_dict()}))
        return
    console = Console()
    console.print(summary_table(found, str(folder)))
    console.print(memory_table(memory))


def summary_table(found: RunFigures, title: str) -> Table:
    """Two columns; says where seconds are emulated."""
    kind = "emulated" if found.emulated else "measured"
    table = Table("what", "value", title=title, title_justify="left")
    table.add_row("steps", str(found.steps))
    losses = ("overflow" if loss is None else f"{loss:.3f}" for loss in (found.first_loss, found.last_loss))
    table.add_row("training loss, first and last step (nats a token)", " -> ".join(losses))
    if found.validation_loss is not None:
        table.add_row("validation loss (nats a token)", f"{found.validation_loss:.3f}")
    table.add_row(f"iteration, {kind} (median)", f"{found.measured_seconds * 1e3:.1f} ms")
    source = "for the experts' new places" if found.moves else "by the plan"
    table.add_row(f"iteration, predicted {source}", _against(found.predicted_seconds, found.measured_seconds))
    table.add_row(
        "iteration, predicted from the recorded loads", _against(found.replayed_seconds, found.measured_seconds)
    )
    table.add_row(f"tokens/s, {kind}{' (nominal)' if found.emulated else ''}", f"{found.tokens_per_second:,.0f}")
    table.add_row("expert load, hottest over mean", f"{found.expert_imbalance:.2f}")
    for move in found.moves:
        iteration = f"iteration {_milliseconds(move.before_seconds)} -> {_milliseconds(move.after_seconds)} ({kind})"
        table.add_row(f"experts moved after step {move.step}", f"{move.experts}, {iteration}")
    if found.emulated:
        valid = "valid" if found.emulation_valid else "INVALID: real work did not keep up with the targets"
        table.add_row(f"emulation (time scale {found.time_scale:.3g})", f"{valid}, {found.overruns} overruns")
    return table


def _milliseconds(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _against(predicted: float | None, measured: float) -> str:
    if predicted is None:
        return "not recorded"
    return f"{predicted * 1e3:.1f} ms ({(measured / predicted - 1) * 100:+.1f} %)"

"""The main job in a few minutes, on a machine without a GPU: measure, plan, train, compare. `make demo` runs this.

Every command is printed before it runs, so that each can be tried by hand. What is emulated says so: the workers are
real processes that exchange real rows and really train, stretched to the modelled speed of two A40 and two V100.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
HETERMOE = str(Path(sys.executable).parent / "hetermoe")
STEPS, SHORT_STEPS = 42, 5
MICRO_BATCHES = 4  # with more, tasks get so short that emulating them takes long
EXECUTED_SEQUENCE_LENGTH = 96
stderr = Console(stderr=True)


def hetermoe(*arguments: object, **environment: str) -> dict[str, Any]:
    """Run one command of the CLI, with these variables as well; its --json object."""
    words = [str(argument) for argument in arguments]
    stderr.print(f"[bold]$ hetermoe {shlex.join(words)}[/bold]", highlight=False)
    command, variables = [HETERMOE, *words, "--json"], os.environ | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=variables, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def plan(folder: Path, assignment: str) -> Path:
    """Plan for the emulated cluster; the plan file."""
    output = folder / f"{assignment}.yaml"
    inputs = ("--model", "plans/models/demo.yaml", "--cluster", "plans/clusters/demo.yaml")
    spec = ("--train", "plans/train/demo.yaml", "--assignment", assignment, "--output", output)
    hetermoe("plan", *inputs, *spec, "--max-micro-batches", MICRO_BATCHES)
    return output


def train(plan_file: Path, name: str, steps: int, *options: object) -> dict[str, Any]:
    """Train on the emulated devices; figures in nominal seconds beside the run's own."""
    run = ("--run-folder", plan_file.parent / name, "--steps", steps)
    emulation = ("--emulate", "--executed-sequence-length", EXECUTED_SEQUENCE_LENGTH)
    figures = hetermoe("train", plan_file, *run, *emulation, *options)
    nominal = {key: figures[f"{key}_seconds"] / figures["time_scale"] for key in ("measured", "predicted", "replayed")}
    return figures | {"nominal_seconds": nominal}


def demo(folder: Path, steps: int) -> dict[str, Any]:
    """The whole demo; all figures."""
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    executed = ("--model", "tiny", "--sequence-lengths", EXECUTED_SEQUENCE_LENGTH)
    profile = hetermoe("profile", "--quick", *executed, "--output", folder / "profiles")
    best, rival = plan(folder, "optimal"), plan(folder, "ep")
    result: dict[str, Any] = {
        "profile": profile,
        "learned": train(best, "optimal", steps, "--validate-every", max(steps // 2, 1)),
        "learned_ep": train(rival, "ep", SHORT_STEPS),
        "balanced": train(best, "optimal-balanced", SHORT_STEPS, "--router", "balanced"),
        "balanced_ep": train(rival, "ep-balanced", SHORT_STEPS, "--router", "balanced"),
    }
    picture = folder / "timeline.png"
    hetermoe("simulate", best, "--measured", folder / "optimal-balanced", "--picture", picture)
    result |= {"picture": str(picture), "seconds": time.monotonic() - began}
    return result


def early_seconds(figures: dict[str, Any]) -> float:
    """Median nominal iteration over the steps that the short runs have too, so that routers are equally trained."""
    lines = (json.loads(line) for line in (Path(figures["folder"]) / "metrics.jsonl").read_text().splitlines())
    steps = [line["iteration_seconds"] for line in lines if line["event"] == "step" and 2 <= line["step"] < SHORT_STEPS]
    return float(median(steps) / figures["time_scale"])


def speed_up(result: dict[str, Any], router: str) -> float:
    """EP's iteration over the plan's, both in nominal seconds of the emulated devices, over the same steps."""
    return early_seconds(result[f"{router}_ep"]) / early_seconds(result[router])


def predicted_speed_up(result: dict[str, Any]) -> float:
    """The same from the plans' predictions, which assume a balanced router."""
    return float(result["balanced_ep"]["predicted_seconds"] / result["balanced_ep"]["time_scale"]) / float(
        result["balanced"]["predicted_seconds"] / result["balanced"]["time_scale"]
    )


def table(result: dict[str, Any]) -> Table:
    """What a reader takes home."""
    learned, balanced = result["learned"], result["balanced"]
    rows = Table("what", "value", title="hetermoe demo: 2 A40 + 2 V100, EMULATED on this machine's CPU")
    rows.add_row(
        "training loss, first and last step", f"{learned['first_loss']:.2f} -> {learned['last_loss']:.2f} nats a byte"
    )
    rows.add_row("validation loss at the end", f"{learned['validation_loss']:.2f} nats a byte")
    for name, run, key in (
        ("iteration, balanced router", balanced, "predicted"),
        ("iteration, learned router", learned, "replayed"),
    ):
        nominal = run["nominal_seconds"]
        error = (nominal["measured"] / nominal[key] - 1) * 100
        source = "predicted" if key == "predicted" else "predicted from its recorded loads"
        rows.add_row(name, f"{nominal['measured']:.3f} s emulated, {nominal[key]:.3f} s {source} ({error:+.1f} %)")
    expected = f"{predicted_speed_up(result):.2f}x predicted"
    rows.add_row("speed over EP, balanced router", f"{speed_up(result, 'balanced'):.2f}x emulated, {expected}")
    rows.add_row("speed over EP, learned router", f"{speed_up(result, 'learned'):.2f}x emulated")
    cost = learned["nominal_seconds"]["measured"] / balanced["nominal_seconds"]["measured"]
    rows.add_row("hottest expert over the mean", f"{learned['expert_imbalance']:.2f}")
    rows.add_row("what that imbalance costs", f"iteration {(cost - 1) * 100:+.0f} % against the balanced router")
    runs = [result[name] for name in ("learned", "learned_ep", "balanced", "balanced_ep")]
    valid = all(run["emulation_valid"] for run in runs)
    rows.add_row("emulation", "valid" if valid else "INVALID: this machine was too busy to keep up")
    rows.add_row("timeline, predicted above emulated", result["picture"])
    rows.add_row("time of the demo", f"{result['seconds']:.0f} s")
    return rows


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the long run")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()
    result = demo(arguments.folder, arguments.steps)
    if arguments.json:
        print(json.dumps(result))
    else:
        Console().print(table(result))


if __name__ == "__main__":
    main()

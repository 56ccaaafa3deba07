"""The `hetermoe` command: one sub-command a file, errors as one line on stderr, documented exit codes."""

import os
import sys

import typer

from hetermoe_cli.cli import bench, calibrate, export, plan, profile, simulate, train
from hetermoe_cli.errors import ExitCode, UserError

app = typer.Typer(
    name="hetermoe",
    help="Plan and train Mixture-of-Experts models on clusters that mix GPU generations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("profile")(profile.profile)
app.command("plan")(plan.plan)
app.command("simulate")(simulate.simulate)
app.command("train")(train.train)
app.command("bench")(bench.bench)
app.command("export")(export.export)
app.command("calibrate")(calibrate.calibrate)


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as machines are described; CUDA's own: fastest first
    try:
        app()
    except UserError as error:
        print(f"hetermoe: error: {error}", file=sys.stderr)
        sys.exit(int(error.code))
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.INTERRUPTED))

"""The `hetermoe` command: one sub-command a file, errors as one line on stderr, documented exit codes."""

import contextlib
import os
import sys
from typing import NoReturn

import typer

from hetermoe_cli.cli import bench, calibrate, export, link, plan, profile, simulate, tokenize, train
from hetermoe_cli.errors import ExitCode, UserError

app = typer.Typer(
    name="hetermoe",
    help="Plan and train Mixture-of-Experts models on clusters that mix GPU generations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("profile")(profile.profile)
app.command("link")(link.link)
app.command("plan")(plan.plan)
app.command("simulate")(simulate.simulate)
app.command("tokenize")(tokenize.tokenize)
app.command("train")(train.train)
app.command("bench")(bench.bench)
app.command("export")(export.export)
app.command("calibrate")(calibrate.calibrate)


def main() -> None:
    """Entry point of the console script."""
    _open_streams()
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as machines are described; CUDA's own: fastest first
    try:
        _run()
    except UserError as error:
        _fail(str(error), error.code)
    except BrokenPipeError:
        sys.exit(int(ExitCode.NO_READER))
    except OSError as error:  # what no command looks for: a full disk behind stdout, a name that is too long
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}: check the path, its permissions and the space on the disk")
    except MemoryError as error:
        _fail(f"this machine's memory is too small for these inputs: {error or 'no more to be had'}")
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.INTERRUPTED))


def _open_streams() -> None:
    """Give what the caller has closed (`>&-`) a place: the next file that is opened would be taken for it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        stream or os.fdopen(number, mode)
        for number, (stream, mode) in enumerate(((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w")))
    )


def _run() -> None:
    """The command; what it printed is written before it counts as done, as nobody sees a failure after that."""
    try:
        app()
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            with contextlib.suppress(OSError):  # what is left must not fail again at the interpreter's end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise


def _fail(message: str, code: ExitCode = ExitCode.BAD_INPUT) -> NoReturn:
    print(f"hetermoe: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(int(code))

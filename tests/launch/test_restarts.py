"""The command that a start becomes when it begins again."""

from pathlib import Path

import pytest

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.restarts import Restarts, again

OLD, NEW, FOLDER = Path("plans/a.yaml"), Path("/runs/x/replanned.yaml"), Path("runs/x")


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ("train plans/a.yaml --steps 3", "train {} --steps 3"),
        ("train --max-restarts 5 ./plans/a.yaml --resume", "train {}"),
        ("train --weights W --run-folder=runs/x plans/a.yaml --max-restarts=5 --data T", "train {} --data T"),
    ],
)
@pytest.mark.parametrize("new", [OLD, NEW])
def test_the_same_start_goes_on_with_what_was_saved(arguments: str, kept: str, new: Path) -> None:
    expected = f"{kept.format(new)} --run-folder runs/x --resume --max-restarts 4"
    assert again(arguments.split(), OLD, new, FOLDER, 4) == expected.split()


@pytest.mark.parametrize(
    ("code", "left"), [(ExitCode.WORKER_DIED, 0), (ExitCode.BAD_INPUT, 3), (ExitCode.INTERRUPTED, 3)]
)
def test_what_no_restart_mends_ends_the_run(code: ExitCode, left: int) -> None:
    with pytest.raises(UserError, match="why"), Restarts(left, None, ["train"], {}).after_deaths(OLD, FOLDER):
        raise UserError("why", code)

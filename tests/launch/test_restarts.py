"""The command that a start becomes when it begins again."""

from pathlib import Path

import pytest

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.restarts import Restarts, again

OLD, NEW, FOLDER = Path("plans/a.yaml"), Path("/runs/x/replanned.yaml"), Path("runs/x")


GOES_ON = "train --run-folder runs/x --resume --max-restarts 4"


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ("train plans/a.yaml --steps 3", "{} --steps 3"),
        ("train --max-restarts 5 ./plans/a.yaml --resume", "{}"),
        ("train --weights W --run-folder=runs/x plans/a.yaml --max-restarts=5 --data T", "--weights W {} --data T"),
        ("train --data plans/a.yaml plans/a.yaml", "--data plans/a.yaml {}"),
        ("train plans/a.yaml --data plans/a.yaml", "{} --data plans/a.yaml"),
        ("train --steps 3 -- plans/a.yaml", "--steps 3 -- {}"),
    ],
)
@pytest.mark.parametrize("new", [OLD, NEW])
def test_the_same_start_goes_on_with_what_was_saved(arguments: str, kept: str, new: Path) -> None:
    assert again(arguments.split(), OLD, new, FOLDER, 4) == f"{GOES_ON} {kept.format(new)}".split()


def test_a_plan_may_be_called_as_the_command_is() -> None:
    assert again(["train", "train"], Path("train"), NEW, FOLDER, 4) == [*GOES_ON.split(), str(NEW)]


def test_node_0_may_be_another_one_now() -> None:
    arguments = ["train", "--master-addr", "far", "--steps", "3", "--", "plans/a.yaml"]
    moved = "--master-addr 10.0.0.2 --steps 3 --"
    assert again(arguments, OLD, NEW, FOLDER, 4, "10.0.0.2") == [*GOES_ON.split(), *moved.split(), str(NEW)]
    assert "far" in again(arguments, OLD, NEW, FOLDER, 4)


@pytest.mark.parametrize(
    ("code", "left"), [(ExitCode.WORKER_DIED, 0), (ExitCode.BAD_INPUT, 3), (ExitCode.INTERRUPTED, 3)]
)
def test_what_no_restart_mends_ends_the_run(code: ExitCode, left: int) -> None:
    with pytest.raises(UserError, match="why"), Restarts(left, None, ["train"], {}).after_deaths(OLD, FOLDER):
        raise UserError("why", code)

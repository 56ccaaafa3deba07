"""`hetermoe` starts fast: heavy libraries are imported by the commands that need them, when they need them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.plan import Plan

COMMANDS = ("profile", "plan", "simulate", "train", "bench", "calibrate", "export")
HEAVY = ("torch", "pulp", "highspy", "matplotlib", "numpy", "pydantic", "yaml")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


MAIN = "import sys; sys.argv = ['hetermoe', *{!r}]; from hetermoe_cli.cli.main import main; main()"


def hetermoe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python(MAIN.format(arguments))


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    result = python("import json, sys, hetermoe_cli.cli.main; print(json.dumps(sorted(sys.modules)))")
    modules = set(json.loads(result.stdout))
    assert "hetermoe_cli.cli.simulate" in modules
    assert modules.isdisjoint(HEAVY)


def cpu_seconds(code: str) -> float:
    """Of the quickest of five runs: other processes only ever make them slower."""
    seconds = []
    for _ in range(5):
        before = os.times()
        assert python(code).returncode == 0
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(seconds)


def test_help_takes_little_longer_than_importing_what_prints_it() -> None:
    assert cpu_seconds(MAIN.format(("--help",))) < 2 * cpu_seconds("import typer.rich_utils")


@pytest.mark.parametrize(("asked", "order"), [(None, "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")])
def test_cuda_devices_are_counted_as_the_machine_has_them(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, order: str
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    if asked:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", asked)
    show = "import atexit, os; atexit.register(lambda: print(os.environ['CUDA_DEVICE_ORDER']))"
    run = "import sys; sys.argv = ['hetermoe', '--help']; from hetermoe_cli.cli.main import main; main()"
    assert python(f"{show}; {run}").stdout.splitlines()[-1] == order


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str) -> None:
    result = hetermoe(command, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"Usage: hetermoe {command}" in result.stdout


def test_help_names_every_command() -> None:
    result = hetermoe("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in COMMANDS)


def test_an_unknown_command_is_a_usage_error() -> None:
    result = hetermoe("fly")
    assert (result.returncode, result.stdout) == (2, "")
    assert "No such command 'fly'" in result.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("plan", "--help")])
def test_a_full_disk_behind_stdout_is_told_in_one_line(arguments: tuple[str, ...]) -> None:
    run = f"import sys; sys.argv = ['hetermoe', *{arguments!r}]; from hetermoe_cli.cli.main import main; main()"
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([sys.executable, "-c", run], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 3
    assert result.stderr == (
        "hetermoe: error: No space left on device: check the path, its permissions and the space on the disk\n"
    )


def test_a_reader_that_is_gone_is_no_error() -> None:
    run = "import sys; sys.argv = ['hetermoe', '--help']; from hetermoe_cli.cli.main import main; main()"
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, "-c", run], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_a_name_that_no_file_can_have_is_told_in_one_line() -> None:
    name = 300 * "x"
    result = hetermoe("plan", "--model", name, "--cluster", "c.yaml", "--train", "t.yaml")
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.startswith(f"hetermoe: error: {name}: File name too long: check the path")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_streams_that_the_caller_closed_are_no_error(tmp_path: Path, closed: tuple[int, ...]) -> None:
    """Nor is what is written to them found in a file that is opened in their place."""
    plan = tmp_path / "plan.yaml"
    arguments = ["plan", "--model", "mixtral-d1", "--cluster", "plans/clusters/o1.yaml", "--time-limit", "0.5"]
    arguments += ["--train", "plans/train/paper-4k.yaml", "--assignment", "ep", "--output", str(plan)]
    command = [sys.executable, "-c", MAIN.format(arguments)]
    code = f"import os; [os.close(number) for number in {closed}]; os.execv({command[0]!r}, {command!r})"
    assert python(code).returncode == 0
    assert load(Plan, plan).assignment == "ep"

"""Runs the `hetermoe` command inside the test's own process."""

import sys
from typing import NamedTuple

import pytest

from hetermoe_cli.cli.main import main


class Result(NamedTuple):
    """Exit code and output."""

    code: int
    out: str
    err: str


class Hetermoe:
    """The command, called with its arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Result:
        self._monkeypatch.setattr(sys, "argv", ["hetermoe", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code
        return Result(code if isinstance(code, int) else 0, *self._capsys.readouterr())

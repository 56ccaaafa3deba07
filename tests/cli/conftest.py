"""Fixtures of the command line's tests."""

from pathlib import Path

import pytest

from command import Hetermoe


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus, so that workers start quickly."""
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("".join(f"line {n}: {'abc' * (n % 7)} the quick brown fox\n" for n in range(3000)))
    return file


@pytest.fixture
def hetermoe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hetermoe:
    """Runs a command in this process."""
    return Hetermoe(monkeypatch, capsys)

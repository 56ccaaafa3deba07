"""What `hetermoe train` prints at the end of a run."""

import json
from pathlib import Path

import pytest

from hetermoe_cli.report.run_summary import print_summary
from run_builders import measured_plan, write_run


def test_a_run_whose_steps_all_overflowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the first steps in fp16 may: there is no loss to tell, and JSON has no NaN."""
    write_run(tmp_path, measured_plan())
    line = {"event": "step", "step": 0, "loss": None, "iteration_seconds": 1.0, "expert_imbalance": 1.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    print_summary(tmp_path, as_json=True)
    text = capsys.readouterr().out
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in {text}"))
    assert (found["first_loss"], found["last_loss"]) == (None, None)
    print_summary(tmp_path, as_json=False)
    assert "overflow -> overflow" in capsys.readouterr().out

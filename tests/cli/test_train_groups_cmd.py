"""`hetermoe train` with several groups and with devices left out, as a user runs it: planned, trained, resumed."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open

from builders import make_inputs, make_layout, make_model, make_plan, make_profile
from command import Hetermoe
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.report.run_load import read_load
from hetermoe_cli.runtime.recorder import read_metrics
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Group, Inputs, Plan
from train_command import events, train

MODEL = make_model(
    layers=2, experts=4, hidden_size=16, ffn_size=24, head_size=4, router_score="sigmoid", router_balance="bias",
    router_bias_rate=0.01,
)  # fmt: skip
BATCH, STEPS = 8, 6
PAIR = make_layout((2, 0), (1, 2), replicated=1, micro_batches=2)
ALONE = make_layout((2,), (4,), micro_batches=2)


def cpu_inputs(devices: int = 4) -> Inputs:
    """CPUs of one node that talk slowly within a group and fast between groups."""
    profile = make_profile("cpu", model=MODEL, precision="fp32", source="measured", sequence_lengths=(32,))
    inputs = make_inputs(
        (("cpu", devices),), model=MODEL, profiles={"cpu": profile}, sequence_length=32, global_batch_sequences=BATCH,
        precision="fp32", interconnect=Link(bandwidth_gigabytes_per_second=1e-6, latency_microseconds=1e4),
    )  # fmt: skip
    train_spec = inputs.train.model_copy(update={"steps": STEPS, "warmup_steps": 2, "learning_rate": 3e-3})
    return inputs.model_copy(update={"train": train_spec})


def groups_plan(*groups: tuple[Layout, Sequence[list[int]]], devices: int = 4) -> Plan:
    """A plan of these groups, predicted by their replay."""
    inputs = cpu_inputs(devices)
    whole = make_plan(inputs, make_layout((1,) * devices, (1,) * 4 + (0,) * (devices - 4), micro_batches=2))
    found = [Group.of(layout, list(replicas)) for layout, replicas in groups]
    replayed = replay_groups(inputs, found)
    predicted = whole.predicted.model_copy(
        update={"iteration_seconds": replayed.seconds, "busy_share_per_rank": replayed.busy_share(devices)}
    )
    memory = replayed.memory(CostModel(inputs))
    changes = {"groups": found, "predicted": predicted, "memory": memory, "max_groups": None}
    return Plan.model_validate(whole.model_copy(update=changes).model_dump())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("".join(f"line {n}: {'abc' * (n % 7)} the quick brown fox\n" for n in range(3000)))
    return file


@pytest.fixture
def hetermoe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hetermoe:
    return Hetermoe(monkeypatch, capsys)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in events(folder, "step")]


def test_two_groups_are_planned_trained_and_told_of(hetermoe: Hetermoe, text: Path, tmp_path: Path) -> None:
    inputs, plan_file, folder = cpu_inputs(), tmp_path / "plan.yaml", tmp_path / "run"
    for name in ("model", "cluster", "train"):
        dump(getattr(inputs, name), tmp_path / f"{name}.yaml")
    dump(inputs.profiles["cpu"], tmp_path / "profiles/cpu.yaml")
    words = [word for name in ("model", "cluster", "train") for word in (f"--{name}", tmp_path / f"{name}.yaml")]
    words += ["--profiles", tmp_path / "profiles", "--output", plan_file, "--time-limit", 2, "--max-groups", 4]
    assert hetermoe("plan", *words).code == 0
    plan = load(Plan, plan_file)
    assert plan.group_count > 1

    done = train(plan_file, "--run-folder", folder, "--data", text, "--json")
    summary = json.loads(done.stdout)
    found = losses(folder)
    assert len(found) == STEPS
    assert found[-1] < found[0]
    assert summary["validation_loss"] > 0
    used = len(plan.used_ranks)
    assert {path.name for path in (folder / "traces").iterdir()} == {f"rank{rank}.json" for rank in range(used)}
    assert len(summary["memory"]["measured_bytes"]) == used
    assert not events(folder, "drift")
    rows = np.array(read_load(folder).layers)
    assert rows.sum(axis=1).tolist() == [STEPS * BATCH * 32 * MODEL.top_k] * MODEL.layers

"""`hetermoe train` with several groups and with devices left out, as a user runs it: planned, trained, resumed."""

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import make_groups_plan, make_inputs, make_layout, make_model, make_profile
from command import Hetermoe
from hetermoe_cli.profiler.refit import KINDS
from hetermoe_cli.report.run_load import read_load
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.spec.train import DenseState
from train_command import events, train

MODEL = make_model(
    layers=2, experts=4, hidden_size=16, ffn_size=24, head_size=4, router_score="sigmoid", router_balance="bias",
    router_bias_rate=0.01,
)  # fmt: skip
BATCH, STEPS = 8, 6
SLOW = Link(bandwidth_gigabytes_per_second=1e-6, latency_microseconds=1e4)  # so that several groups are best
PAIR = make_layout((2, 0), (1, 2), replicated=1, micro_batches=2)
ALONE = make_layout((2,), (4,), micro_batches=2)
SHARED = make_layout((1, 1), (1, 2), replicated=1, micro_batches=2, schedule="sequential", dense_state="full")


def cpu_inputs(link: Link = SLOW) -> Inputs:
    """Four CPUs of one node that talk over `link`."""
    profile = make_profile("cpu", model=MODEL, precision="fp32", source="measured", sequence_lengths=(32,))
    inputs = make_inputs(
        (("cpu", 4),), model=MODEL, profiles={"cpu": profile}, sequence_length=32, global_batch_sequences=BATCH,
        precision="fp32", interconnect=link,
    )  # fmt: skip
    train_spec = inputs.train.model_copy(update={"steps": STEPS, "warmup_steps": 2, "learning_rate": 3e-3})
    return inputs.model_copy(update={"train": train_spec})


def groups_plan(*groups: tuple[Layout, Sequence[list[int]]], link: Link = SLOW) -> Plan:
    """A plan of these groups on the four CPUs."""
    return make_groups_plan(cpu_inputs(link), *groups)


def sharded(layout: Layout, state: DenseState = "full") -> Layout:
    """The layout with the dense part in shares."""
    return layout.model_copy(update={"schedule": layout.schedule.model_copy(update={"dense_state": state})})


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in events(folder, "step")]


def planned(hetermoe: Hetermoe, folder: Path) -> Plan:
    """What `plan` says of the four CPUs."""
    inputs = cpu_inputs()
    for name in ("model", "cluster", "train"):
        dump(getattr(inputs, name), folder / f"{name}.yaml")
    dump(inputs.profiles["cpu"], folder / "profiles/cpu.yaml")
    words = [word for name in ("model", "cluster", "train") for word in (f"--{name}", folder / f"{name}.yaml")]
    words += ["--profiles", folder / "profiles", "--output", folder / "plan.yaml", "--time-limit", 2, "--max-groups", 4]
    assert hetermoe("plan", *words).code == 0
    return load(Plan, folder / "plan.yaml")


@pytest.mark.parametrize("full", [pytest.param(False, marks=pytest.mark.long), True], ids=["planned", "full"])
def test_several_groups_are_trained_and_told_of(hetermoe: Hetermoe, text: Path, tmp_path: Path, full: bool) -> None:
    """Those of a plan, and two that shard all of their dense part."""
    plan_file, folder = tmp_path / "plan.yaml", tmp_path / "run"
    if full:
        dump(groups_plan((SHARED, [[0, 1], [2, 3]])), plan_file)
    plan = load(Plan, plan_file) if full else planned(hetermoe, tmp_path)
    assert plan.group_count > 1
    assert plan.groups[0].layout.gathers == full

    done = train(plan_file, "--run-folder", folder, "--data", text, "--json")
    summary = json.loads(done.stdout)
    found = losses(folder)
    assert len(found) == STEPS
    assert found[-1] < found[0]
    assert summary["validation_loss"] > 0
    used = len(plan.used_ranks)
    assert {path.name for path in (folder / "traces").iterdir()} == {f"rank{rank}.json" for rank in range(used)}
    assert len(summary["memory"]["measured_bytes"]) == used
    rows = np.array(read_load(folder).layers)
    assert rows.sum(axis=1).tolist() == [STEPS * BATCH * 32 * MODEL.top_k] * MODEL.layers
    sent = sum(np.load(path).sum(axis=2) for path in (folder / "loads").iterdir())  # [steps, layers, experts]
    for line, counts in zip(events(folder, "step"), sent, strict=True):
        shares = counts / counts.mean(axis=1, keepdims=True)
        assert line["expert_load_highest"] == pytest.approx(shares.max(axis=1).tolist(), abs=1e-4)
        assert line["expert_load_lowest"] == pytest.approx(shares.min(axis=1).tolist(), abs=1e-4)
    assert summary["replayed_seconds"] == pytest.approx(plan.predicted.iteration_seconds, rel=0.3)


def resumed(plan_file: Path, source: Path, folder: Path, text: Path) -> list[float]:
    """Losses of `plan_file` from the middle of the run in `source` on."""
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(source / "checkpoints/step-00000003", folder / "checkpoints/step-00000003")
    train(plan_file, "--run-folder", folder, "--data", text, "--checkpoint-every", 3, "--resume")
    return losses(folder)


@pytest.mark.long
def test_a_checkpoint_of_several_groups_goes_on_in_one_and_back(text: Path, tmp_path: Path) -> None:
    """Groups of other layouts, with an expert that one of them replicates; losses do not depend on the plan."""
    plans = {
        "groups": groups_plan((PAIR, [[0, 2]]), (ALONE, [[3]])),
        "one": groups_plan((make_layout((2, 2), (3, 1), micro_batches=2), [[1, 2]])),
        "shared": groups_plan((sharded(ALONE), [[3]]), (SHARED, [[0, 2]])),
        "optimizer": groups_plan((sharded(PAIR, "optimizer"), [[0, 1], [2, 3]])),
    }
    for name, plan in plans.items():
        dump(plan, tmp_path / f"{name}.yaml")
    found = {}
    for name in ("groups", "one", "shared"):
        folder = tmp_path / name
        train(tmp_path / f"{name}.yaml", "--run-folder", folder, "--data", text, "--checkpoint-every", 3)
        found[name] = losses(folder)
        shards = list((folder / "checkpoints/step-00000006").glob("*.safetensors"))
        assert len(shards) == len(plans[name].used_ranks)
    assert found["groups"] == pytest.approx(found["one"], rel=1e-5)
    assert found["shared"] == pytest.approx(found["one"], rel=1e-5)
    again = resumed(tmp_path / "shared.yaml", tmp_path / "shared", tmp_path / "again", text)
    assert again == found["shared"][3:]  # to the bit
    for one, other in pairwise(("groups", "one", "shared", "optimizer")):  # the last are two replicas of one layout
        moved = resumed(tmp_path / f"{other}.yaml", tmp_path / one, tmp_path / f"{one}-{other}", text)
        assert moved == pytest.approx(found["one"][3:], rel=1e-5)


def test_devices_left_out_get_no_worker(hetermoe: Hetermoe, text: Path, tmp_path: Path) -> None:
    plan = groups_plan((make_layout((4, 0), (0, 4), micro_batches=2), [[1, 3]]))
    dump(plan, tmp_path / "plan.yaml")
    done = train(tmp_path / "plan.yaml", "--run-folder", tmp_path / "run", "--data", text, "--json")
    summary = json.loads(done.stdout)
    assert len(summary["memory"]["measured_bytes"]) == 2
    ranks = {path.name for path in (tmp_path / "run/traces").iterdir()}
    assert ranks == {"rank0.json", "rank1.json"}
    compared = compare(hetermoe, tmp_path / "plan.yaml", 0, tmp_path / "run")
    assert [row["rank"] for row in compared["ranks"]] == [0, 1]  # the group's own


def compare(hetermoe: Hetermoe, plan_file: Path, group: int, folder: Path) -> dict[str, Any]:
    """What `simulate` says of a group beside its run."""
    done = hetermoe("simulate", plan_file, "--group", group, "--measured", folder, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    assert found["comparison"]["ratio"] > 0
    return found


@pytest.mark.long
def test_every_group_can_be_compared_with_its_run(hetermoe: Hetermoe, text: Path, tmp_path: Path) -> None:
    dump(groups_plan((ALONE, [[1]]), (PAIR, [[0, 3]])), tmp_path / "plan.yaml")
    train(tmp_path / "plan.yaml", "--run-folder", tmp_path / "run", "--data", text)
    for group, ranks in ((0, [0]), (1, [0, 1])):
        found = compare(hetermoe, tmp_path / "plan.yaml", group, tmp_path / "run")
        assert [row["rank"] for row in found["ranks"]] == ranks


def test_dry_run_shows_the_workers_of_all_groups(text: Path, tmp_path: Path) -> None:
    dump(groups_plan((PAIR, [[0, 2]]), (ALONE, [[3]])), tmp_path / "plan.yaml")
    done = train(tmp_path / "plan.yaml", "--run-folder", tmp_path / "run", "--data", text, "--dry-run", "--json")
    shown = json.loads(done.stdout)
    assert shown["workers"] == 3
    assert [group["replicas"] for group in shown["run"]["plan"]["groups"]] == [[[0, 1]], [[2]]]
    assert shown["run"]["drift_every"] == 20
    assert not (tmp_path / "run").exists()


def test_groups_that_keep_other_dense_states_are_refused(text: Path, tmp_path: Path) -> None:
    dump(groups_plan((PAIR, [[0, 2]]), (sharded(ALONE, "optimizer"), [[3]])), tmp_path / "plan.yaml")
    done = train(tmp_path / "plan.yaml", "--run-folder", tmp_path / "run", "--data", text, code=3)
    assert "field groups: dense_state optimizer, replicated: optimizer states are shared out" in done.stderr


def test_what_compares_one_group_says_so_and_calibration_takes_all(
    hetermoe: Hetermoe, text: Path, tmp_path: Path
) -> None:
    dump(groups_plan((ALONE, [[0], [3]])), tmp_path / "plan.yaml")
    train(tmp_path / "plan.yaml", "--run-folder", tmp_path / "run", "--data", text, "--steps", 4)
    refused = hetermoe("simulate", tmp_path / "plan.yaml", "--measured", tmp_path / "run")
    assert refused.code == 3
    assert "groups" in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    found = hetermoe("calibrate", tmp_path / "run", "--dry-run", "--json")
    assert found.code == 0, found.err
    assert len(json.loads(found.out)["rows"]) == len(KINDS)


@pytest.mark.long
def test_bench_compares_groups_with_one(hetermoe: Hetermoe, text: Path, tmp_path: Path) -> None:
    plans = {
        "groups": groups_plan((ALONE, [[0], [1]])),
        "one": groups_plan((make_layout((2, 2), (3, 1), micro_batches=2), [[2, 3]])),
    }
    for name, plan in plans.items():
        dump(plan, tmp_path / f"{name}.yaml")
    files = [tmp_path / f"{name}.yaml" for name in plans]
    options = ["--repeats", 1, "--steps", 3, "--warm-up", 1, "--data", text, "--output", tmp_path / "bench", "--json"]
    done = hetermoe("bench", *files, *options)
    assert done.code == 0, done.err
    groups, one = json.loads(done.out)["entries"]
    assert (groups["name"], one["name"]) == ("groups", "one")
    assert groups["replayed_seconds"] > 0
    assert groups["measured_seconds"] > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("alone", "pair"),
    [
        (ALONE, PAIR),
        (ALONE, SHARED),
        (make_layout((2,), (4,), micro_batches=2, dense_state="optimizer"),
         make_layout((2, 0), (1, 2), replicated=1, micro_batches=2, dense_state="optimizer")),
    ],
    ids=["replicated", "full", "optimizer"],
)  # fmt: skip
def test_groups_are_emulated(text: Path, tmp_path: Path, alone: Layout, pair: Layout) -> None:
    """Also where one shards its dense part and the other keeps it, and where they gather new weights together."""
    link = Link(bandwidth_gigabytes_per_second=1e-4, latency_microseconds=1e2)
    dump(groups_plan((alone, [[0]]), (pair, [[1, 3]]), link=link), tmp_path / "plan.yaml")
    options = ("--emulate", "--executed-sequence-length", 16, "--steps", 2, "--router", "balanced", "--json")
    done = train(tmp_path / "plan.yaml", "--run-folder", tmp_path / "run", "--data", text, *options)
    summary = json.loads(done.stdout)
    assert summary["emulated"]
    assert summary["measured_seconds"] == pytest.approx(summary["predicted_seconds"], rel=0.2)
    trace = json.loads((tmp_path / "run/traces/rank2.json").read_text())
    assert trace["otherData"]["origin"] == "emulated"

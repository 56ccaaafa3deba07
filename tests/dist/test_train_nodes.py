"""`hetermoe train` of one plan on several nodes: a launcher each, as if on machines of their own."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from workers import run_workers

from builders import make_groups_plan, make_inputs, make_layout, make_model, make_plan, make_profile
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.spec.run import RunSpec
from train_command import HETERMOE, events, train

MODEL = make_model(layers=2, experts=4, hidden_size=16, ffn_size=24, head_size=4)
ENDLESS = ("--steps", 1000000, "--drift-every", 0)


def uneven_plan() -> Plan:
    """Two CPUs on one node and one on another."""
    profile = make_profile("cpu", model=MODEL, precision="fp32", source="measured", sequence_lengths=(32,))
    inputs = make_inputs(
        (("cpu", 2), ("cpu", 1)), model=MODEL, profiles={"cpu": profile}, sequence_length=32,
        global_batch_sequences=4, precision="fp32",
    )  # fmt: skip
    train_spec = inputs.train.model_copy(update={"steps": 6, "warmup_steps": 2, "learning_rate": 3e-3})
    layout = make_layout((1, 1, 0), (1, 1, 1), replicated=1, micro_batches=2)
    return make_plan(inputs.model_copy(update={"train": train_spec}), layout)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"line {n}: {'abc' * (n % 7)} quick brown fox\n" for n in range(3000)))
    return tmp_path / "text.txt"


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    dump(uneven_plan(), tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def start(
    plan: Path, folder: Path, text: Path, *options: object, nodes: tuple[int, ...] = (0, 1)
) -> list[subprocess.Popen[str]]:
    """The launchers of nodes, by their numbers in the cluster file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ("--master-addr", "127.0.0.1", "--master-port", port)
    command = [*HETERMOE, "train", plan, "--run-folder", folder, "--data", text, *where, *options]
    return [
        subprocess.Popen(
            [*map(str, command), "--node-rank", str(node)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for node in nodes[::-1]
    ][::-1]


def ends(launchers: list[subprocess.Popen[str]], seconds: float = 120) -> list[tuple[int, str, str]]:
    """Exit code, stdout and last line of stderr of every launcher."""
    found = []
    for launcher in launchers:
        out, errors = launcher.communicate(timeout=seconds)
        assert "Traceback" not in errors
        found.append((launcher.returncode, out, errors.strip().splitlines()[-1]))
    return found


def worker(folder: Path, rank: int, step: int = 0) -> int:
    """The process of a rank, once the run has made `step` and one more."""
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(events(folder, "step")) <= step:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    found = subprocess.run(["pgrep", "-f", str(folder / "run.yaml")], capture_output=True, text=True).stdout.split()
    variables = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in found}
    return next(int(pid) for pid, values in variables.items() if b"RANK=%d" % rank in values)


def work(rank: int, run: RunSpec) -> None:
    """What a worker does, without a launcher."""
    from hetermoe_cli.runtime import worker

    worker.train(run)


def test_two_nodes_train_as_one(plan_file: Path, text: Path, tmp_path: Path) -> None:
    (code, out, _), (other_code, other_out, last) = ends(start(plan_file, tmp_path / "two", text, "--json"))
    assert (code, other_code, other_out) == (0, 0, "")
    assert json.loads(out)["steps"] == 6
    assert last == "hetermoe: node 1 of 2: done; node 0 shows the summary"
    run = load(RunSpec, tmp_path / "two/run.yaml")
    run_workers(3, work, run.model_copy(update={"folder": str(tmp_path / "one")}))
    losses = [[line["loss"] for line in events(tmp_path / name, "step")] for name in ("two", "one")]
    assert losses[0] == losses[1]
    logs = sorted(path.parts[-5] for path in (tmp_path / "two/logs").glob("*/*/attempt_0/*/stderr.log"))
    assert logs == ["node0", "node0", "node1"]


def test_a_worker_that_dies_ends_all_nodes_with_its_error(plan_file: Path, text: Path, tmp_path: Path) -> None:
    launchers = start(plan_file, tmp_path / "run", text, *ENDLESS)
    os.kill(worker(tmp_path / "run", 2), signal.SIGKILL)
    (code, _, last), (other_code, _, other_last) = ends(launchers, 20)  # torch alone gives one that hangs 30 s
    assert (code, other_code) == (6, 6)
    assert "error: worker of rank 2 died (signal SIGKILL)" in other_last
    assert "error: node 1: worker of rank 2 died (signal SIGKILL)" in last
    assert not (tmp_path / "run/status.json").exists()


@pytest.mark.long
def test_workers_that_died_are_started_again_on_all_nodes(plan_file: Path, text: Path, tmp_path: Path) -> None:
    options = ("--steps", 60, "--drift-every", 0, "--checkpoint-every", 10, "--max-restarts", 1, "--json")
    launchers = start(plan_file, tmp_path / "run", text, *options)
    os.kill(worker(tmp_path / "run", 2, step=25), signal.SIGKILL)
    first, second = (launcher.communicate(timeout=120) for launcher in launchers)
    assert [launcher.returncode for launcher in launchers] == [0, 0]
    assert json.loads(first[0])["steps"] == 60
    died = "worker of rank 2 died (signal SIGKILL)"
    assert f"hetermoe: node 1: {died}" in first[1]
    assert f"hetermoe: {died}" in second[1]
    assert all(errors.count("begins again, restarts left: 0") == 1 for _, errors in (first, second))
    assert [line["step"] for line in events(tmp_path / "run", "step")] == list(range(60))
    assert load(RunSpec, tmp_path / "run/run.yaml").start_step >= 20


def test_what_is_left_trains_by_a_plan_of_its_own(plan_file: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (first,) = start(plan_file, folder, text, "--replan-after", 0.2, "--json", nodes=(0,))
    out, errors = first.communicate(timeout=120)
    assert (first.returncode, json.loads(out)["steps"]) == (0, 6), errors
    assert "node 0 of 2: goes on without nodes 1 of the cluster file, by" in errors
    run = load(RunSpec, folder / "run.yaml")
    assert (run.world.size, run.plan.inputs.node_numbers) == (2, [0])
    assert run.plan.notes[0] == "planned again without node1"


@pytest.mark.long
def test_the_others_go_on_without_node_0(plan_file: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    every = ("--steps", 60, "--drift-every", 0, "--checkpoint-every", 10)
    launchers = start(plan_file, folder, text, *every, "--max-restarts", 1, "--replan-after", 1, "--json")
    worker(folder, 2, step=25)
    launchers[0].kill()
    out, errors = launchers[1].communicate(timeout=120)
    assert (launchers[1].returncode, json.loads(out)["steps"]) == (0, 60), errors
    assert "node 1 of 2: node 1 has taken the place of node 0, at 127.0.0.1" in errors
    assert "node 1 of 2: goes on without nodes 0 of the cluster file, by" in errors
    assert [line["step"] for line in events(folder, "step")] == list(range(60))
    run = load(RunSpec, folder / "run.yaml")
    assert (run.world.size, run.plan.inputs.node_numbers) == (1, [1])


def test_an_interrupt_on_one_node_stops_and_saves_on_all(plan_file: Path, text: Path, tmp_path: Path) -> None:
    launchers = start(plan_file, tmp_path / "run", text, *ENDLESS)
    worker(tmp_path / "run", 2)
    launchers[1].send_signal(signal.SIGINT)
    results = ends(launchers, 60)
    saved = events(tmp_path / "run", "step")[-1]["step"] + 1
    line = f"hetermoe: error: interrupted: saved at step {saved}, go on with --resume --run-folder {tmp_path / 'run'}"
    assert results == [(130, "", line)] * 2


@pytest.mark.long
def test_a_node_that_is_left_out_ends_at_once_and_the_others_train(text: Path, tmp_path: Path) -> None:
    spread = uneven_plan()
    nodes = [*spread.inputs.cluster.nodes, spread.inputs.cluster.nodes[1].model_copy(update={"name": "last"})]
    cluster = spread.inputs.cluster.model_copy(update={"nodes": nodes})
    pair = make_layout((1, 0), (2, 2), micro_batches=4)
    plan = make_groups_plan(spread.inputs.model_copy(update={"cluster": cluster}), (pair, [[2, 3]]))
    dump(plan, tmp_path / "plan.yaml")
    options = (tmp_path / "plan.yaml", "--data", text, "--run-folder", tmp_path / "run")
    shown = json.loads(train(*options, "--dry-run", "--json", "--master-addr", "host").stdout)
    assert [node["name"] for node in shown["nodes"]] == ["node1", "last"]
    assert [node["command"].split("--node-rank ")[1] for node in shown["nodes"]] == [
        "1 --master-addr host",
        "2 --master-addr host",
    ]
    note = train(*options, "--node-rank", 0).stderr
    assert "nothing to do on this node: of the cluster file's nodes the plan uses 1, 2 only" in note
    assert note.count("\n") == 1
    assert not (tmp_path / "run").exists()
    first, last = ends(start(tmp_path / "plan.yaml", tmp_path / "run", text, "--json", nodes=(1, 2)))
    assert (first[0], json.loads(first[1])["steps"]) == (0, 6)
    assert last == (0, "", "hetermoe: node 1 of 2 (node 2 of the cluster file): done; node 0 shows the summary")


def test_what_runs_on_every_node(plan_file: Path, text: Path, tmp_path: Path) -> None:
    options = (plan_file, "--data", text, "--run-folder", tmp_path / "run")
    shown = json.loads(train(*options, "--dry-run", "--json", "--master-addr", "host").stdout)
    assert [node["ranks"] for node in shown["nodes"]] == [[0, 1], [2]]
    assert shown["nodes"][1]["command"].endswith("--node-rank 1 --master-addr host")
    missing = train(*options, code=2).stderr
    assert "the plan has 2 nodes: run on each of them" in missing
    assert missing.count("\n") == 1
    assert not (tmp_path / "run").exists()

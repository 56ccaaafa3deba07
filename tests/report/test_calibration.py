"""Calibration finds what the test hid in the traces: ratios of every kind of task, the link, the iteration."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import make_groups_plan, make_layout
from hetermoe_cli.errors import UserError
from hetermoe_cli.profiler.refit import KINDS
from hetermoe_cli.report.calibration import Calibration, calibrate
from hetermoe_cli.report.link_fit import _transfers as transfer_samples
from hetermoe_cli.report.run_figures import read_run
from hetermoe_cli.report.run_tasks import read_run_tasks
from hetermoe_cli.runtime.run.recorder import load_path, trace_path
from hetermoe_cli.schedule.action import Kind
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.files import dump
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.trace import Trace, read_trace
from run_builders import measured_plan, scaled_inputs, write_run

RATIOS = {
    "new": dict(zip(KINDS, (1.3, 0.8, 1.7, 2.2, 0.6, 4.0), strict=True)),
    "old": dict(zip(KINDS, (2.0, 3.0, 0.9, 1.1, 1.0, 0.5), strict=True)),
}
TWO_NODES = (("new", 1), ("old", 1))
APART = (("new", 1), ("new", 1), ("new", 1), ("old", 1), ("old", 1))
PARTS = ("attention", "expert", "head")


def ratios(found: Calibration) -> dict[tuple[str, str], float]:
    return {(row.device, row.kind): row.ratio for row in found.rows}


def assert_same_curves(found: Calibration, truth: Inputs) -> None:
    """Every point of every table that a row tells of, forward and backward, within 1 %."""
    for device, profile in found.profiles.items():
        new, true = profile.tables[0], truth.profiles[device].tables[0]
        for part in PARTS:
            for one, other in zip(getattr(new, part), getattr(true, part), strict=True):
                assert one.forward_seconds == pytest.approx(other.forward_seconds, rel=0.01)
                assert one.backward_seconds == pytest.approx(other.backward_seconds, rel=0.01)
        assert new.optimizer_seconds_per_parameter == pytest.approx(true.optimizer_seconds_per_parameter, rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "attention", "experts", "all", "full"])
@pytest.mark.parametrize("replicated", [0, 1])
def test_ratios_of_every_kind_are_recovered(tmp_path: Path, recompute: Any, replicated: int) -> None:
    plan = measured_plan(make_layout((2, 1), (1, 2), replicated=replicated, recompute=recompute), TWO_NODES)
    truth = scaled_inputs(plan.inputs, RATIOS)
    found = calibrate(write_run(tmp_path, plan, truth))
    expected = {(device, kind): ratio for device, kinds in RATIOS.items() for kind, ratio in kinds.items()}
    assert ratios(found) == pytest.approx(expected, rel=0.01)
    assert_same_curves(found, truth)
    for row in found.rows:
        assert row.new_seconds == pytest.approx(row.ratio * row.old_seconds, rel=0.01)
        assert row.spread < 1e-6
    assert found.iteration.after_seconds == pytest.approx(found.iteration.measured_seconds, rel=0.01)
    assert found.iteration.before_seconds != pytest.approx(found.iteration.measured_seconds, rel=0.05)


def test_tasks_of_ranks_on_some_shifts_count_as_often_as_they_ran(tmp_path: Path) -> None:
    plain = make_layout((1, 1, 0), (1, 2, 1), micro_batches=4, dense_state="optimizer")
    layout = Layout.model_validate(plain.model_dump() | {"shifts": [[0, 1, 3], [2], []]})
    plan = measured_plan(layout, (("new", 1), ("old", 2)))
    found = calibrate(write_run(tmp_path, plan, scaled_inputs(plan.inputs, RATIOS)))
    expected = {(device, kind): ratio for device, kinds in RATIOS.items() for kind, ratio in kinds.items()}
    assert ratios(found) == pytest.approx(expected, rel=0.01)
    tasks = {(row.device, row.kind): row.tasks for row in found.rows}
    assert [tasks[device, "head"] for device in ("new", "old")] == [3 * found.steps, found.steps]
    assert tasks["old", "expert forward"] == 2 * found.steps * layout.layers * layout.micro_batches
    assert found.iteration.after_seconds == pytest.approx(found.iteration.measured_seconds, rel=0.01)


def groups_plan(dense_state: Any = "replicated", nodes: Any = APART) -> Plan:
    """Two copies of a pair with an expert host, on ranks of both types, and one device alone."""
    schedule = {"micro_batches": 2, "dense_state": dense_state}
    pair, alone = (
        make_layout((2, 0), (1, 2), replicated=1, **schedule),
        make_layout((1,), (4,), recompute="all", **schedule),
    )
    whole = measured_plan(make_layout((5, 0, 0, 0, 0), (4, 0, 0, 0, 0), micro_batches=2), nodes)
    return make_groups_plan(whole.inputs, (pair, [[0, 3], [1, 4]]), (alone, [[2]]))


def test_tasks_of_all_groups_count_with_their_own_layouts_and_loads(tmp_path: Path) -> None:
    plan = groups_plan()
    truth = scaled_inputs(plan.inputs, RATIOS)
    found = calibrate(write_run(tmp_path, plan, truth))
    kinds = {"old": ("expert forward", "expert backward", "optimizer"), "new": KINDS}
    expected = {(device, kind): RATIOS[device][kind] for device in kinds for kind in kinds[device]}
    assert ratios(found) == pytest.approx(expected, rel=0.01)
    tasks = {(row.device, row.kind): row.tasks for row in found.rows}
    steps, layers, micro_batches = found.steps, 2, 2
    assert tasks["new", "head"] == 3 * steps * micro_batches
    assert tasks["old", "expert forward"] == 2 * steps * layers * micro_batches
    assert found.iteration.after_seconds == pytest.approx(found.iteration.measured_seconds, rel=0.01)
    assert found.iteration.before_seconds != pytest.approx(found.iteration.measured_seconds, rel=0.05)


def test_the_optimizer_is_fitted_where_groups_share_out_states(tmp_path: Path) -> None:
    found = calibrate(write_run(tmp_path, groups_plan("optimizer")))
    assert ratios(found)["new", "optimizer"] == pytest.approx(ratios(found)["new", "expert forward"], rel=0.01)


def test_the_link_is_fitted_over_several_groups(tmp_path: Path) -> None:
    """What they sum is one transfer of them all, from when the last of them came to it."""
    before, really = 50.0, 2000.0
    plan = wired(
        groups_plan(nodes=(("new", 5),)), Link(bandwidth_gigabytes_per_second=1.0, latency_microseconds=before)
    )
    slow = Link(bandwidth_gigabytes_per_second=1.0, latency_microseconds=really)
    found = calibrate(write_run(tmp_path, plan, plan.inputs.model_copy(update={"links": {"wire": slow}})))
    assert found.link is not None
    assert found.link.new.latency_microseconds == pytest.approx(really, rel=0.01)
    assert found.iteration.after_seconds == pytest.approx(found.iteration.measured_seconds, rel=0.01)


def test_sums_of_a_sharded_dense_part_are_told_from_each_other(tmp_path: Path) -> None:
    """Groups scatter those of all windows but the last on their own; what they sum then is one transfer."""
    layout = make_layout((1, 1), (2, 2), micro_batches=2, schedule="sequential", dense_state="full")
    whole = measured_plan(make_layout((8, 0, 0, 0), (4, 0, 0, 0), micro_batches=1), (("new", 4),))
    plan = make_groups_plan(whole.inputs, (layout, [[0, 1], [2, 3]]))
    plan = wired(plan, Link(bandwidth_gigabytes_per_second=1.0, latency_microseconds=500.0))
    run, _ = read_run_tasks(write_run(tmp_path, plan))
    costs = run.costs(plan.inputs)
    cost = costs[0][run.steps[0]]
    scattered, summed = (cost.collective(Kind.REDUCE, 0, whole=whole).seconds for whole in (False, True))
    found = [sample.predicted for sample in transfer_samples(run.copies, costs)]
    assert scattered < summed
    assert sum(seconds == pytest.approx(scattered) for seconds in found) == 2 * len(run.steps)
    assert sum(seconds == pytest.approx(summed) for seconds in found) == len(run.steps)
    gathered = cost.collective(Kind.GATHER, 0).seconds  # the first one: new weights of experts come with it
    assert sum(seconds == pytest.approx(gathered) for seconds in found) == len(run.steps)


def test_the_first_traced_step_is_warm_up_unless_it_is_the_only_one(tmp_path: Path) -> None:
    plan = measured_plan()
    found = calibrate(write_run(tmp_path / "four", plan, steps=4))
    assert found.steps == 3
    assert list(ratios(found).values()) == pytest.approx([1.0] * len(KINDS))
    alone = calibrate(write_run(tmp_path / "one", plan, steps=1))
    assert alone.steps == 1
    assert any("a single step was traced" in note for note in alone.notes)


def test_a_run_folder_may_have_been_moved(tmp_path: Path) -> None:
    plan = measured_plan()
    folder = write_run(tmp_path / "run", plan, scaled_inputs(plan.inputs, RATIOS)).rename(tmp_path / "elsewhere")
    assert ratios(calibrate(folder))["new", "expert forward"] == pytest.approx(1.7, rel=0.01)


def test_attention_of_ranks_with_other_batches_gets_ratios_by_size(tmp_path: Path) -> None:
    """One sequence is 1.5 times as slow as profiled, four are 3 times: two are in between."""
    plan = measured_plan(make_layout((1, 4), (2, 2)))
    profile = plan.inputs.profiles["new"]
    table = profile.tables[0]
    slow = [
        point.model_copy(update={"forward_seconds": ratio * point.forward_seconds})
        for point, ratio in zip(table.attention, (1.5, 2.0, 3.0), strict=True)
    ]
    really = profile.model_copy(update={"tables": [table.model_copy(update={"attention": slow})]})
    found = calibrate(write_run(tmp_path, plan, plan.inputs.model_copy(update={"profiles": {"new": really}})))
    row = next(row for row in found.rows if row.kind == "attention forward")
    assert row.knots == ((1, pytest.approx(1.5)), (4, pytest.approx(3.0)))
    new = found.profiles["new"].tables[0].attention
    moved = [one.forward_seconds / other.forward_seconds for one, other in zip(new, table.attention, strict=True)]
    assert moved == pytest.approx([1.5, 2.25, 3.0], rel=0.01)


def test_what_a_device_does_not_do_in_the_run_is_kept_and_named(tmp_path: Path) -> None:
    plan = measured_plan(make_layout((1, 0), (0, 4)), TWO_NODES)
    found = calibrate(write_run(tmp_path, plan, scaled_inputs(plan.inputs, RATIOS)))
    kinds = {device: [kind for name, kind in ratios(found) if name == device] for device in ("new", "old")}
    assert kinds["new"] == ["attention forward", "attention backward", "head", "optimizer"]
    assert kinds["old"] == ["expert forward", "expert backward", "optimizer"]
    assert "old: kept as it was, no usable task: attention forward, attention backward, head" in found.notes
    old = found.profiles["old"]
    assert old.tables[0].attention == plan.inputs.profiles["old"].tables[0].attention
    assert old.comment == f"calibrated from {tmp_path}: expert forward, expert backward, optimizer"


def test_the_new_profile_is_measured_and_keeps_all_else(tmp_path: Path) -> None:
    plan = measured_plan()
    new, old = calibrate(write_run(tmp_path, plan)).profiles["new"], plan.inputs.profiles["new"]
    assert (new.source, new.device) == ("measured", "new")
    kept = {"software", "facts", "memory_bytes", "framework_bytes", "accelerator"}
    assert new.model_dump(include=kept) == old.model_dump(include=kept)


def wired(plan: Plan, link: Link) -> Plan:
    """`plan` whose node names its link instead of stating it."""
    inputs = plan.inputs
    node = inputs.cluster.nodes[0].model_copy(update={"interconnect": "wire", "network": "wire"})
    cluster = inputs.cluster.model_copy(update={"nodes": [node]})
    changed = inputs.model_copy(update={"cluster": cluster, "links": {"wire": link}})
    return plan.model_copy(update={"inputs": changed, "inputs_sha256": changed.hashes()})


@pytest.mark.parametrize(("before", "really"), [(50.0, 2000.0), (2000.0, 50.0)])
def test_the_latency_of_a_nodes_link_is_recovered(tmp_path: Path, before: float, really: float) -> None:
    plan = wired(measured_plan(), Link(bandwidth_gigabytes_per_second=1.0, latency_microseconds=before))
    truth = plan.inputs.model_copy(
        update={"links": {"wire": Link(bandwidth_gigabytes_per_second=1.0, latency_microseconds=really)}}
    )
    found = calibrate(write_run(tmp_path, plan, truth))
    assert found.link is not None
    assert found.link.new.latency_microseconds == pytest.approx(really, rel=0.01)
    assert found.link.measured_seconds == pytest.approx(found.link.old_seconds + (really - before) * 1e-6, rel=0.01)
    assert found.links["wire"].link == found.link.new
    assert found.links["wire"].source == "measured"
    assert found.iteration.after_seconds == pytest.approx(found.iteration.measured_seconds, rel=0.01)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [(TWO_NODES, "clocks of several nodes cannot be compared"), ((("new", 2),), "states this link in numbers")],
)
def test_links_that_cannot_be_fitted_are_kept_and_said_so(tmp_path: Path, nodes: Any, words: str) -> None:
    found = calibrate(write_run(tmp_path, measured_plan(nodes=nodes)))
    assert (found.link, found.links) == (None, {})
    assert any(note.startswith("links are kept: ") and words in note for note in found.notes)


def test_waiting_for_peers_is_no_part_of_a_transfer(tmp_path: Path) -> None:
    """Lanes that take a transfer up early, as a receiver's does, change nothing."""
    link = Link(bandwidth_gigabytes_per_second=1.0, latency_microseconds=500.0)
    plan = wired(measured_plan(), link)
    folder = write_run(tmp_path, plan)
    path = trace_path(folder, 1)
    trace = read_trace([path])
    early = [span if span.lane == "compute" else span._replace(start=span.start - 0.3) for span in trace.spans]
    Trace("measured", early).write(path)
    found = calibrate(folder)
    assert found.link is not None
    assert found.link.new.latency_microseconds == pytest.approx(500.0, abs=1.0)


def test_an_emulated_run_is_refused_and_moves_nothing(tmp_path: Path) -> None:
    plan = measured_plan()
    folder = write_run(tmp_path, plan, emulated_scale=0.25)
    with pytest.raises(UserError, match="an emulated run: its tasks last as long as its profiles say"):
        calibrate(folder)
    found = calibrate(folder, allow_emulated=True)
    assert found.origin == "emulated"
    assert list(ratios(found).values()) == pytest.approx([1.0] * len(KINDS), rel=0.02)
    assert found.iteration.after_seconds == pytest.approx(found.iteration.measured_seconds, rel=0.02)
    assert "emulated seconds are divided by the run's time scale, 0.25" in found.notes


def test_emulated_seconds_are_not_called_measured(tmp_path: Path) -> None:
    plan = measured_plan()
    modelled = {
        name: profile.model_copy(update={"source": "modelled"}) for name, profile in plan.inputs.profiles.items()
    }
    inputs = plan.inputs.model_copy(update={"profiles": modelled})
    plan = plan.model_copy(update={"inputs": inputs, "inputs_sha256": inputs.hashes()})
    found = calibrate(write_run(tmp_path, plan, emulated_scale=1.0), allow_emulated=True)
    assert found.profiles["new"].source == "modelled"


def test_expert_rows_must_be_known(tmp_path: Path) -> None:
    plan = measured_plan()
    with pytest.raises(UserError, match=r"loads/rank\*\.npy are missing"):
        calibrate(write_run(tmp_path / "learned", plan, loads=False))
    found = calibrate(write_run(tmp_path / "balanced", plan, loads=False, router="balanced"))
    assert len(found.rows) == len(KINDS)


@pytest.mark.parametrize("steps", [0, 2])
def test_loads_of_another_run(tmp_path: Path, steps: int) -> None:
    folder = write_run(tmp_path, measured_plan())
    np.save(load_path(folder, 0), np.zeros((steps, 2, 2, 4), np.int32))
    with pytest.raises(UserError, match=r"rank0\.npy: not the expert rows of this run's step"):
        calibrate(folder)


@pytest.mark.parametrize("content", [b"not numpy", b""])
def test_a_broken_load_file(tmp_path: Path, content: bytes) -> None:
    folder = write_run(tmp_path, measured_plan())
    load_path(folder, 1).write_bytes(content)
    with pytest.raises(UserError, match=r"rank1\.npy: not the expert rows"):
        calibrate(folder)


def test_traces_without_the_plans_tasks(tmp_path: Path) -> None:
    folder = write_run(tmp_path, measured_plan())
    for rank in (0, 1):
        path = trace_path(folder, rank)
        trace = read_trace([path])
        Trace("measured", [span._replace(name=f"9{span.name}") for span in trace.spans]).write(path)
    with pytest.raises(UserError, match="its traces hold no compute task of the plan"):
        calibrate(folder)


def test_an_edited_plan(tmp_path: Path) -> None:
    folder = write_run(tmp_path, measured_plan())
    run = read_run(folder)
    run = run.model_copy(update={"plan": run.plan.model_copy(update={"inputs_sha256": {}})})
    dump(run, folder / "run.yaml")
    with pytest.raises(UserError, match="its hash does not match"):
        calibrate(folder)


def test_a_disturbed_run_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path, measured_plan())
    for rank in (0, 1):
        path = trace_path(folder, rank)
        spans = [
            span._replace(end=span.end + 3 * (span.end - span.start)) if span.name.endswith("EF1") else span
            for span in read_trace([path]).spans
        ]
        Trace("measured", spans).write(path)
    notes = [note for note in calibrate(folder).notes if note.startswith("spread above 50%")]
    assert notes == ["spread above 50%, so other work may have disturbed the run: new expert forward"]


def test_work_between_two_tasks_belongs_to_the_later_one(tmp_path: Path) -> None:
    """Spans that begin late, as the engine's do after it has put rows together, take as long as from ready to done."""
    folder = write_run(tmp_path, measured_plan())
    for rank in (0, 1):
        path = trace_path(folder, rank)
        spans = [
            span._replace(start=span.start + 0.3 * (span.end - span.start)) if span.lane == "compute" else span
            for span in read_trace([path]).spans
        ]
        Trace("measured", spans).write(path)
    assert list(ratios(calibrate(folder)).values()) == pytest.approx([1.0] * len(KINDS), rel=0.01)

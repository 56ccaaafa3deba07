"""Runs of a bench: interleaved, each in its own folder, and only plans that compare."""

from pathlib import Path

import pytest

from builders import make_inputs, make_layout, make_model, make_plan
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import UserError
from hetermoe_cli.launch.bench import Contender, contenders, in_turn, notes
from hetermoe_cli.launch.prepare import EmulateOptions, TrainOptions
from hetermoe_cli.planner.baselines.methods import RIVALS
from hetermoe_cli.planner.plan import make_plan as search
from hetermoe_cli.spec.files import dump
from hetermoe_cli.spec.plan import Plan
from run_builders import measured_plan

LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("ep", "gather_squeeze", "dist_ep")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("".join(f"line {n}: the quick brown fox\n" for n in range(3000)))
    return file


class Folder:
    """Where plans are written and benches would run."""

    def __init__(self, path: Path, text: Path) -> None:
        self.path, self.text = path, text

    def write(self, name: str, plan: Plan) -> Path:
        path = self.path / "plans" / f"{name}.yaml"
        dump(plan, path)
        return path

    def contenders(self, *plans: Path, emulate: bool = False) -> list[Contender]:
        options = TrainOptions(self.path / "bench", [self.text], steps=3, emulate=EmulateOptions() if emulate else None)
        return contenders(plans, options)


@pytest.fixture
def folder(tmp_path: Path, text: Path) -> Folder:
    return Folder(tmp_path, text)


def test_rounds_are_interleaved_and_a_plan_may_run_against_itself(folder: Folder) -> None:
    one = folder.write("a", measured_plan())
    other = folder.write("b", measured_plan(make_layout((2, 0), (2, 2))))
    found = folder.contenders(one, other, one)
    order = [(number, contender.name, run.folder) for number, contender, run in in_turn(found, 2)]
    names = ["a", "b", "a-2"]
    assert order == [
        (number, name, str(folder.path / "bench" / name / f"round-{number}")) for number in (1, 2) for name in names
    ]
    assert notes(found) == []
    assert not (folder.path / "bench").exists()


def test_a_folder_in_use_is_left_alone(folder: Folder) -> None:
    plan = folder.write("a", measured_plan())
    (folder.path / "bench").mkdir()
    assert folder.contenders(plan)
    (folder.path / "bench/kept").write_text("")
    with pytest.raises(UserError, match="holds something already: name another --output"):
        folder.contenders(plan)


def test_real_devices_compare_plans_of_one_model_and_size(folder: Folder) -> None:
    first = folder.write("a", measured_plan())
    deeper = folder.write("deeper", measured_plan(make_layout((1, 1), (2, 2), layers=3)))
    wider = folder.write("wider", measured_plan(make_layout((1, 1, 1), (2, 1, 1)), nodes=(("new", 3),)))
    for other, field in ((deeper, "inputs.model"), (wider, "inputs.cluster")):
        with pytest.raises(UserError, match=rf"{other.name}: field {field}: .*--emulate"):
            folder.contenders(first, other)


def test_emulation_takes_any_plans_and_says_what_differs(folder: Folder) -> None:
    def plan(layers: int, **inputs: object) -> Plan:
        return make_plan(make_inputs(model=make_model(layers=layers), **inputs), make_layout(layers=layers))  # type: ignore[arg-type]

    first = folder.write("a", plan(2))
    deeper = folder.write("deeper", plan(3))
    longer = folder.write("longer", plan(2, sequence_length=128))
    said = notes(folder.contenders(first, deeper, longer, emulate=True))
    assert len(said) == 2
    assert said[0].startswith("deeper: another model than a")
    assert "its own prediction" in said[0]
    assert said[1].startswith("longer: another sequence length than a")
    assert "compare tokens/s" in said[1]


@pytest.mark.parametrize("assignment", [*LONG, "hetero_ep"])
def test_a_baseline_is_a_plan_that_the_engine_takes(folder: Folder, assignment: str) -> None:
    inputs = make_inputs((("new", 2), ("old", 2)), global_batch_sequences=8)
    layout = RIVALS[assignment](CostModel(inputs), 8).layout
    assert layout is not None
    best = folder.write("best", search(inputs))
    found = folder.contenders(best, folder.write(assignment, make_plan(inputs, layout)), emulate=True)
    assert notes(found) == []

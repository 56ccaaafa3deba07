"""Several plans in turn: A B C A B C ..., so that what changes on the machine meanwhile meets all of them alike."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.preflight import check_one_node
from hetermoe_cli.launch.prepare import TrainOptions, load_plan, prepare
from hetermoe_cli.runtime.run.recorder import CHECKPOINTS
from hetermoe_cli.spec.run import RunSpec


@dataclass(frozen=True)
class Contender:
    """One plan of a bench: its name, its file, and its run (in the folder that all of its rounds lie in)."""

    name: str
    plan: Path
    run: RunSpec

    def of_round(self, number: int) -> RunSpec:
        """The run of a round, from 1."""
        return self.run.model_copy(update={"folder": str(Path(self.run.folder) / f"round-{number}")})


def contenders(plans: Sequence[Path], options: TrainOptions) -> list[Contender]:
    """Check everything before a single worker starts; `options.folder` holds all runs. Writes nothing.

    UserError names the first problem; also where plans cannot be compared on this machine.
    """
    folder = options.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something already: name another --output")
    names = _names(plans)
    found = [
        Contender(name, plan, _prepare(plan, replace(options, folder=folder / name)))
        for name, plan in zip(names, plans, strict=True)
    ]
    for other in found[1:]:
        _check_comparable(found[0], other)
    return found


def _prepare(path: Path, options: TrainOptions) -> RunSpec:
    plan = load_plan(path)
    if not options.emulate:
        check_one_node(plan, "bench")
    return prepare(plan, path, options)


def _names(plans: Sequence[Path]) -> list[str]:
    """File names without suffix; numbered where they repeat, so that a plan may run against itself."""
    names: list[str] = []
    for plan in plans:
        number, name = 1, plan.stem
        while name in names:
            number, name = number + 1, f"{plan.stem}-{number + 1}"
        names.append(name)
    return names


def _check_comparable(first: Contender, other: Contender) -> None:
    """On real devices another model or number of ranks compares something else than plans."""
    if first.run.emulation:
        return
    one, another = first.run.plan, other.run.plan
    if one.inputs.model != another.inputs.model:
        problem = f"inputs.model: {another.inputs.model.name}, the first plan trains another ({one.inputs.model.name})"
    elif one.world.size != another.world.size:
        problem = f"inputs.cluster: {another.world.size} ranks in use, the first plan has {one.world.size}"
    else:
        return
    raise UserError(
        f"{other.plan}: field {problem}: on real devices compare plans for one model and one number of ranks, "
        "or pass --emulate"
    )


def notes(found: Sequence[Contender]) -> list[str]:
    """What differs from the first plan beside the layout, so that its ratio is no speed-up of the plan alone."""
    first, result = found[0], []
    for other in found[1:]:
        if differing := _differences(first.run, other.run):
            what = ", ".join(differing)
            same_model = not {"model", "devices", "profiles"} & set(differing)
            instead = "compare tokens/s" if same_model else "compare each with its own prediction"
            result.append(f"{other.name}: another {what} than {first.name}, so its ratio is no speed-up: {instead}")
    return result


def _differences(first: RunSpec, other: RunSpec) -> list[str]:
    """Names of the inputs that differ."""
    here, there = first.plan.inputs, other.plan.inputs
    pairs = {
        "model": (here.model, there.model),
        "sequence length": (here.train.sequence_length, there.train.sequence_length),
        "global batch": (here.train.global_batch_sequences, there.train.global_batch_sequences),
        "precision": (here.train.precision, there.train.precision),
        "devices": ([d.type for d in here.devices()], [d.type for d in there.devices()]),
        "profiles": (_shared_profiles(first, other), _shared_profiles(other, first)),
    }
    return [name for name, (one, another) in pairs.items() if one != another]


def _shared_profiles(one: RunSpec, other: RunSpec) -> dict[str, object]:
    """Facts of the profiles of `one` that both have; a plan embeds only the tables that it reads."""
    both = one.plan.inputs.profiles.keys() & other.plan.inputs.profiles.keys()
    profiles = one.plan.inputs.profiles
    return {name: (profiles[name].source, profiles[name].date, profiles[name].facts) for name in both}


def in_turn(found: Sequence[Contender], rounds: int) -> Iterator[tuple[int, Contender, RunSpec]]:
    """(round from 1, contender, its run), in the order in which they start."""
    for number in range(1, rounds + 1):
        for contender in found:
            yield number, contender, contender.of_round(number)


def run_in_turn(
    found: Sequence[Contender], rounds: int, progress: Callable[[str], None]
) -> Iterator[tuple[int, Contender, RunSpec]]:
    """Run them; each is told when it is done. Checkpoints are dropped; metrics, loads and traces are kept.

    UserError ends it at the first run that fails or is interrupted.
    """
    from hetermoe_cli.launch.local import launch
    from hetermoe_cli.launch.progress import Follower

    for number, contender, run in in_turn(found, rounds):
        progress(f"round {number} of {rounds}: {contender.name}")
        try:
            with Follower(run):
                launch(run)
        except UserError as error:
            if error.code is ExitCode.INTERRUPTED:
                raise UserError(f"interrupted in {run.folder}: the runs before it are kept", error.code) from error
            raise UserError(f"{contender.plan}: {error}", error.code) from error
        shutil.rmtree(Path(run.folder) / CHECKPOINTS, ignore_errors=True)
        yield number, contender, run

"""`hetermoe plan`: choose roles, placement and schedule for a model on a cluster, and explain the choice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetermoe_cli.errors import UserError

if TYPE_CHECKING:
    from hetermoe_cli.spec.plan import Inputs, Plan


class AssignmentChoice(StrEnum):
    """Methods that can make a plan."""

    optimal = "optimal"
    gather_squeeze = "gather_squeeze"
    ep = "ep"
    dist_ep = "dist_ep"


def plan(
    model: Annotated[str, typer.Option(help="Named size, YAML or Hugging Face config.json.")],
    cluster: Annotated[Path, typer.Option(help="Cluster YAML.")],
    train: Annotated[Path, typer.Option(help="Training spec YAML.")],
    profiles: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of profiles; repeat for several.", show_default="./profiles, or those shipped"),
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Instead of the training spec's.")] = None,
    global_batch: Annotated[int | None, typer.Option(min=1, help="Sequences; instead of the training spec's.")] = None,
    assignment: Annotated[AssignmentChoice, typer.Option(help="Method.")] = AssignmentChoice.optimal,
    solver: Annotated[str, typer.Option(help="highs, cbc, or another solver that PuLP finds.")] = "highs",
    time_limit: Annotated[
        float, typer.Option(min=0.1, help="Seconds for the search; longer closes more of the gap to the bound.")
    ] = 3.5,
    max_micro_batches: Annotated[int, typer.Option(min=1, help="Largest R to try.")] = 16,
    output: Annotated[
        Path | None, typer.Option(help="Plan YAML to write.", show_default="plans/MODEL-CLUSTER.yaml")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object instead of tables.")] = False,
) -> None:
    """Plan an iteration: who attends, who hosts which experts, in which order, and how fast that will be."""
    inputs = _inputs(
        model,
        cluster,
        train,
        profiles,
        {
            "sequence_length": sequence_length,
            "global_batch_sequences": global_batch,
        },
    )

    from hetermoe_cli.planner.plan import PlanOptions, make_plan
    from hetermoe_cli.planner.solver import SolverOptions
    from hetermoe_cli.spec.files import dump

    path = output or Path("plans") / f"{inputs.model.name}-{inputs.cluster.name}.yaml"
    options = PlanOptions(assignment.value, SolverOptions(solver, time_limit), max_micro_batches)
    with _progress() as progress:
        result = make_plan(inputs, options, progress)
    dump(result, path, "Made by `hetermoe plan`; predictions are simulated. Edit no inputs: their hashes are checked.")
    _print(result, json)
    typer.echo(f"hetermoe: wrote {path}", err=True)


def _inputs(model: str, cluster: Path, train: Path, profiles: list[Path] | None, changes: dict[str, Any]) -> "Inputs":
    """Read everything that a plan is made from."""
    from hetermoe_cli.spec.cluster import ClusterSpec
    from hetermoe_cli.spec.files import load, parse
    from hetermoe_cli.spec.library import default_folders, load_links, load_profiles
    from hetermoe_cli.spec.model import load_model
    from hetermoe_cli.spec.plan import Inputs
    from hetermoe_cli.spec.train import TrainSpec

    for folder in profiles or []:
        if not folder.is_dir():
            raise UserError(f"{folder}: is no folder of profiles")
    folders = profiles or default_folders()
    config, spec, training = load_model(model), load(ClusterSpec, cluster), load(TrainSpec, train)
    given = {name: value for name, value in changes.items() if value is not None}
    return Inputs(
        model=config,
        cluster=spec,
        links=load_links(spec, folders),
        profiles=load_profiles(spec, folders),
        train=parse(TrainSpec, training.model_dump() | given, str(train)),
    )


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What the search is doing, on stderr where that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("planning") as status:
        yield status.update


def _print(plan: "Plan", json: bool) -> None:
    if json:
        typer.echo(plan.model_dump_json())
        return
    from rich.console import Console

    from hetermoe_cli.report.plan_table import print_plan

    print_plan(plan, Console())

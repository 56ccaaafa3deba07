"""`hetermoe plan`: choose roles, placement and schedule for a model on a cluster, and explain the choice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hetermoe_cli.cli.run_options import Json
from hetermoe_cli.errors import UserError

if TYPE_CHECKING:
    from hetermoe_cli.spec.change import Change
    from hetermoe_cli.spec.inputs import Inputs
    from hetermoe_cli.spec.plan import Plan


Assignment = Literal["optimal", "gather_squeeze", "ep", "dist_ep", "hetero_ep", "pp"]


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
    load: Annotated[
        Path | None,
        typer.Option(
            help="Plan for this expert load: a file (kind: expert_load), or a run folder of `hetermoe train`."
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text file or folder, or token file: plan for its documents' length (documents: masked); repeatable."
        ),
    ] = None,
    assignment: Annotated[Assignment, typer.Option(help="Method.")] = "optimal",
    solver: Annotated[str, typer.Option(help="highs, cbc, or another solver that PuLP finds.")] = "highs",
    time_limit: Annotated[
        float, typer.Option(min=0.1, help="Seconds for the search; longer closes more of the gap to the bound.")
    ] = 3.5,
    max_micro_batches: Annotated[int, typer.Option(min=1, help="Largest R to try.")] = 16,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also say why other layouts lost, and what one more device would gain.")
    ] = False,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            help="Also plan a changed cluster: '+2 A40', or '+1 A40,-2 V100'; repeat for several. Each takes up to the "
            "time limit. An added device gets a node and a NIC of its own, like its type's last node."
        ),
    ] = None,
    objective: Annotated[
        Literal["time", "cost"], typer.Option(help="cost: most tokens for a dollar, with the cluster file's prices.")
    ] = "time",
    max_cost: Annotated[
        float | None, typer.Option(min=0.0, help="Dollars an hour that all devices in use may cost together.")
    ] = None,
    max_groups: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Groups that train side by side, each with a full copy of the model. Up to 16 devices one is planned "
            "first, and several for half as long.",
            show_default="any number",
        ),
    ] = None,
    pipeline: Annotated[
        bool, typer.Option(help="Also look at pipeline stages: layers cut into groups of consecutive ones.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option(help="Plan YAML to write.", show_default="plans/MODEL-CLUSTER.yaml")
    ] = None,
    json_output: Json = False,
) -> None:
    """Plan an iteration: who attends, who hosts which experts, in which order, and how fast that will be."""
    inputs = read_inputs(
        model,
        cluster,
        train,
        profiles,
        {
            "sequence_length": sequence_length,
            "global_batch_sequences": global_batch,
        },
    )
    if load:
        inputs = _with_load(inputs, load)
    if data:
        inputs = _with_documents(inputs, data)

    from hetermoe_cli.planner.cluster.objective import Wanted
    from hetermoe_cli.planner.plan import PlanOptions, make_plan
    from hetermoe_cli.planner.solver import SolverOptions
    from hetermoe_cli.planner.what_if import what_if as plan_variants
    from hetermoe_cli.spec.files import check_writable, dump

    variants = _variants(inputs, what_if or [], explain, profiles)
    name = f"{inputs.model.name}-{inputs.cluster.name}".replace("/", "-")  # as in mistralai/Mixtral-8x7B
    path = output or Path("plans") / f"{name}.yaml"
    check_writable(path)
    wanted = Wanted(objective, max_cost, max_groups, pipeline)
    options = PlanOptions(assignment, SolverOptions(solver, time_limit), max_micro_batches, explain, wanted)
    with _progress() as progress:
        result = make_plan(inputs, options, progress)
    if variants:
        compared = plan_variants(result, variants, options, lambda text: typer.echo(f"hetermoe: {text}", err=True))
        result = result.model_copy(update={"what_if": compared})
    dump(result, path, "Made by `hetermoe plan`; predictions are simulated. Edit no inputs: their hashes are checked.")
    _print(result, json_output)
    typer.echo(f"hetermoe: wrote {path}", err=True)


def read_inputs(
    model: str, cluster: Path, train: Path, profiles: list[Path] | None, changes: dict[str, Any]
) -> "Inputs":
    """Read everything that a plan is made from."""
    from hetermoe_cli.spec.cluster import ClusterSpec
    from hetermoe_cli.spec.files import load, parse
    from hetermoe_cli.spec.library import collect_inputs, default_folders
    from hetermoe_cli.spec.named_models import load_model
    from hetermoe_cli.spec.train import TrainSpec

    for folder in profiles or []:
        if not folder.is_dir():
            raise UserError(f"{folder}: is no folder of profiles")
    folders = profiles or default_folders()
    config, spec, training = load_model(model), load(ClusterSpec, cluster), load(TrainSpec, train)
    given = {name: value for name, value in changes.items() if value is not None}
    return collect_inputs(config, spec, parse(TrainSpec, training.model_dump() | given, str(train)), folders)


def _with_load(inputs: "Inputs", path: Path) -> "Inputs":
    """UserError if the load is not one of this model."""
    from hetermoe_cli.report.run_load import read_load

    load = read_load(path)
    load.check(inputs.model, str(path))
    return inputs.model_copy(update={"expert_load": load})


def _with_documents(inputs: "Inputs", sources: list[Path]) -> "Inputs":
    """`document_tokens` as `train` will cut this text. UserError where attention does not stay inside documents."""
    from hetermoe_cli.model.data.corpus import Batches, corpus_of

    train = inputs.train
    if train.documents != "masked":
        raise UserError("--data: the length of documents matters to a training spec with documents: masked only")
    corpus = corpus_of(sources, train)
    size = (train.sequence_length, train.global_batch_sequences, train.seed)
    found = Batches(corpus.train, *size, corpus.source).document_tokens(train.document_end)
    return inputs.with_train(document_tokens=found)


def _variants(
    inputs: "Inputs", changes: list[str], explain: bool, profiles: list[Path] | None
) -> "list[tuple[Change, Inputs]]":
    """The clusters to plan for as well; to explain a plan, one more device of each type comes first."""
    from hetermoe_cli.planner.what_if import changed_inputs
    from hetermoe_cli.spec.change import one_more_of_each, parse_change
    from hetermoe_cli.spec.library import default_folders

    marginal = one_more_of_each(inputs.cluster) if explain else []
    wanted = dict.fromkeys([*marginal, *map(parse_change, changes)])
    return [(change, changed_inputs(inputs, change, profiles or default_folders())) for change in wanted]


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


def _print(plan: "Plan", as_json: bool) -> None:
    if as_json:
        typer.echo(plan.model_dump_json())
        return
    from hetermoe_cli.report.plan_table import print_plan
    from hetermoe_cli.report.tables import console

    print_plan(plan, console())

"""`hetermoe calibrate`: refit a plan's profiles to what a run of it measured, and show what moved."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetermoe_cli.cli.run_options import Json
from hetermoe_cli.errors import UserError

if TYPE_CHECKING:
    from hetermoe_cli.report.calibration import Calibration
    from hetermoe_cli.spec.base import Spec

_DEFAULT_OUTPUT = Path("profiles-calibrated")


def calibrate(
    run: Annotated[Path, typer.Argument(help="Run folder of `hetermoe train`, with traces.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the new profiles.", show_default=str(_DEFAULT_OUTPUT))
    ] = None,
    allow_emulated: Annotated[
        bool, typer.Option("--allow-emulated", help="Take an emulated run, to check that nothing moves.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what moved, write nothing.")] = False,
    json_output: Json = False,
) -> None:
    """Refit the profiles of a run's plan to its traces: measured against predicted seconds by device and kind of task.

    Writes OUTPUT/DEVICE.yaml and, for workers of one node, OUTPUT/links/LINK.yaml. A measured file there keeps its
    other tables.
    """
    from hetermoe_cli.report.calibration import calibrate as fit

    found = fit(run, allow_emulated=allow_emulated)
    folder = output or _DEFAULT_OUTPUT
    files, notes = _files(found, folder, replace=output is not None)
    if not dry_run:
        _write(files, notes)
    _print(found, [] if dry_run else list(files), json_output)
    if not dry_run:
        typer.echo(f"hetermoe: plan with --profiles {folder} --profiles OLD_FOLDER (for what it lacks)", err=True)


def _files(found: "Calibration", folder: Path, replace: bool) -> "tuple[dict[Path, Spec], dict[Path, str]]":
    """What to write where, existing files merged in; and what was done with these.

    UserError, before anything is written, for an unreadable file, or if the run was planned with one and `replace`
    is not set.
    """
    from hetermoe_cli.profiler.tables import merge
    from hetermoe_cli.spec.cluster import LinkRecord
    from hetermoe_cli.spec.files import load
    from hetermoe_cli.spec.profile import Profile

    files: dict[Path, Spec] = {}
    notes: dict[Path, str] = {}
    for device, profile in found.profiles.items():
        path = folder / f"{device}.yaml"
        old = load(Profile, path) if path.exists() else None
        if old and not replace and any(table in old.tables for table in found.inputs.profiles[device].tables):
            raise _original(path, found)
        files[path], note = merge(old, profile)
        notes[path] = f": {note}" if note else ""
    for name, record in found.links.items():
        path = folder / "links" / f"{name}.yaml"
        if path.exists() and load(LinkRecord, path).link == found.inputs.links[name] and not replace:
            raise _original(path, found)
        files[path] = record
    return files, notes


def _write(files: "dict[Path, Spec]", notes: dict[Path, str]) -> None:
    from hetermoe_cli.spec.files import dump

    for path, spec in files.items():
        dump(spec, path, "Made by `hetermoe calibrate`; a spread is that of measured / predicted over the run's tasks.")
        typer.echo(f"hetermoe: wrote {path}{notes.get(path, '')}", err=True)


def _original(path: Path, found: "Calibration") -> UserError:
    return UserError(f"{path}: {found.run} was planned with it: name another --output, or this folder to replace it")


def _print(found: "Calibration", files: list[Path], json_output: bool) -> None:
    from hetermoe_cli.report.calibration_table import as_dict, render

    if json_output:
        import json

        print(json.dumps(as_dict(found) | {"files": [str(path) for path in files]}))
        return

    from hetermoe_cli.report.tables import console

    console().print(render(found))

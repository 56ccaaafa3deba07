"""Library: finds the profile of a device type and the record of a named link in folders of YAML files, and puts a
plan's inputs together."""

from collections.abc import Sequence
from pathlib import Path

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.cluster import ClusterSpec, LinkRecord
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.profile import Profile
from hetermoe_cli.spec.train import TrainSpec


def packaged_folder() -> Path:
    """The reference profiles that ship with hetermoe: in the wheel, or in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_profiles"
    return installed if installed.is_dir() else package.parents[1] / "profiles"


def default_folders() -> list[Path]:
    """`profiles` in the working directory where there is one, then what ships with hetermoe."""
    local, packaged = Path("profiles"), packaged_folder()
    return [local] * (local.is_dir() and local.resolve() != packaged.resolve()) + [packaged]


def collect_inputs(model: ModelConfig, cluster: ClusterSpec, train: TrainSpec, folders: Sequence[Path]) -> Inputs:
    """Everything that a plan is made from, with the links and profiles that the cluster needs from `folders`."""
    links = load_links(cluster, folders)
    return Inputs(
        model=model,
        cluster=cluster,
        links={name: record.link for name, record in links.items()},
        modelled_links=[name for name, record in links.items() if record.source == "modelled"],
        profiles=load_profiles(cluster, folders),
        train=train,
    )


def load_profiles(cluster: ClusterSpec, folders: Sequence[Path]) -> dict[str, Profile]:
    """One profile per device type of the cluster: measured ones before modelled ones, then by the folders' order."""
    return {device: _load_profile(cluster, device, folders) for device in cluster.device_types}


def load_links(cluster: ClusterSpec, folders: Sequence[Path]) -> dict[str, LinkRecord]:
    """The link records that the cluster names, chosen like profiles. UserError where two measured ones differ."""
    return {name: _load_link(cluster, name, folders) for name in sorted(cluster.link_names())}


def _load_profile(cluster: ClusterSpec, device: str, folders: Sequence[Path]) -> Profile:
    found = [(path, load(Profile, path)) for path in _find(f"{device}.yaml", folders)]
    if not found:
        raise UserError(
            f"cluster {cluster.name}: no profile {device}.yaml in {_names(folders)}: run `hetermoe profile` on a "
            f"machine with a {device}, or name the folder with --profiles"
        )
    path, profile = min(found, key=lambda pair: pair[1].source != "measured")
    if profile.device != device:
        raise UserError(f"{path}: field device: expected {device!r}, found {profile.device!r}")
    return profile


def _load_link(cluster: ClusterSpec, name: str, folders: Sequence[Path]) -> LinkRecord:
    found = [(path, load(LinkRecord, path)) for path in _find(f"links/{name}.yaml", folders)]
    if not found:
        raise UserError(
            f"cluster {cluster.name}: no link record links/{name}.yaml in {_names(folders)}: measure it "
            f"with `hetermoe link {name}` between two nodes, `hetermoe profile --link {name}` inside one, or write its "
            "numbers into the cluster file"
        )
    path, record = min(found, key=lambda pair: pair[1].source != "measured")
    if record.name != name:
        raise UserError(f"{path}: field name: expected {name!r}, found {record.name!r}")
    for other, rival in found:
        if rival.source == record.source == "measured" and rival.link != record.link:
            raise UserError(
                f"{other}: field link: contradicts {path}, measured as well: leave one of the two folders out"
            )
    return record


def _find(name: str, folders: Sequence[Path]) -> list[Path]:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{name!r} is no name of a profile or link: it must not leave the profiles folder")
    return [folder / name for folder in folders if (folder / name).is_file()]


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders))

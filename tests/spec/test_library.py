"""Profiles and links are found by name in folders, the first folder first; one line where they are not."""

from pathlib import Path
from typing import Literal

import pytest

from builders import DAY, make_inputs, make_profile
from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.cluster import ClusterSpec, Link, LinkRecord
from hetermoe_cli.spec.files import dump
from hetermoe_cli.spec.library import default_folders, load_links, load_profiles, packaged_folder


def named_cluster(link: str) -> ClusterSpec:
    cluster = make_inputs((("new", 1),)).cluster
    nodes = [node.model_copy(update={"network": link}) for node in cluster.nodes]
    return cluster.model_copy(update={"nodes": nodes})


def record(name: str, bandwidth: float, source: Literal["measured", "modelled"] = "modelled") -> LinkRecord:
    link = Link(bandwidth_gigabytes_per_second=bandwidth, latency_microseconds=0.0)
    return LinkRecord(name=name, source=source, date=DAY, link=link)


def test_the_first_folder_wins(tmp_path: Path) -> None:
    for folder, bandwidth in (("a", 1.0), ("b", 2.0)):
        dump(record("wire", bandwidth), tmp_path / folder / "links" / "wire.yaml")
    dump(make_profile("new"), tmp_path / "b" / "new.yaml")
    folders = [tmp_path / "a", tmp_path / "b"]
    cluster = named_cluster("wire")
    assert load_links(cluster, folders)["wire"].link.bandwidth_gigabytes_per_second == 1.0
    assert load_profiles(cluster, folders)["new"].device == "new"


def test_measured_wins_over_modelled_and_must_not_contradict_itself(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    cluster, profile = named_cluster("wire"), make_profile("new")
    dump(profile.model_copy(update={"source": "modelled"}), tmp_path / "a" / "new.yaml")
    dump(profile.model_copy(update={"source": "measured"}), tmp_path / "b" / "new.yaml")
    assert load_profiles(cluster, folders)["new"].source == "measured"
    dump(record("wire", 1.0), tmp_path / "a" / "links" / "wire.yaml")
    dump(record("wire", 2.0, "measured"), tmp_path / "b" / "links" / "wire.yaml")
    assert load_links(cluster, folders)["wire"].link.bandwidth_gigabytes_per_second == 2.0
    dump(record("wire", 3.0, "measured"), tmp_path / "a" / "links" / "wire.yaml")
    with pytest.raises(UserError, match=r"field link: contradicts .*, measured as well"):
        load_links(cluster, folders)


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    cluster = named_cluster("wire")
    with pytest.raises(UserError, match=r"no profile new\.yaml .*hetermoe profile"):
        load_profiles(cluster, [tmp_path])
    with pytest.raises(UserError, match=r"no link record links/wire\.yaml"):
        load_links(cluster, [tmp_path])
    dump(make_profile("old"), tmp_path / "new.yaml")
    with pytest.raises(UserError, match="field device: expected 'new', found 'old'"):
        load_profiles(cluster, [tmp_path])
    dump(record("rope", 1.0), tmp_path / "links" / "wire.yaml")
    with pytest.raises(UserError, match="field name: expected 'wire', found 'rope'"):
        load_links(cluster, [tmp_path])
    with pytest.raises(UserError, match="must not leave the profiles folder"):
        load_links(named_cluster("../wire"), [tmp_path])


def test_the_working_directory_comes_before_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_folders() == [packaged_folder()]
    assert (packaged_folder() / "A40.yaml").is_file()
    (tmp_path / "profiles").mkdir()
    assert default_folders() == [Path("profiles"), packaged_folder()]

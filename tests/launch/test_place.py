"""Which node a launcher starts: from options, the environment, Slurm; and what it says where that is not known."""

from pathlib import Path

import pytest

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.place import Place, PlaceOptions, command_of_node, find_place

ARGUMENTS = ["train", "my plan.yaml", "--master-port=1", "--steps", "3", "--node-rank", "1", "--dry-run"]


def test_one_node_needs_nothing() -> None:
    assert find_place(1, PlaceOptions(), {"SLURM_NODEID": "0", "MASTER_ADDR": "far"}, []) == Place()
    with pytest.raises(UserError, match="--node-rank is 1: the plan has one node, 0"):
        find_place(1, PlaceOptions(node_rank=1), {}, [])


def test_a_node_has_its_number_in_the_cluster_file() -> None:
    options = PlaceOptions(master_addr="here")
    places = [find_place(4, options, {"SLURM_NODEID": str(node)}, [], [1, 3]) for node in range(4)]
    assert places == [None, Place(0, 2, "here", 29500), None, Place(1, 2, "here", 29500)]
    assert find_place(4, PlaceOptions(node_rank=3, master_addr="here"), {}, [], [1, 3]) == places[3]
    with pytest.raises(UserError, match="--node-rank is 4: "):
        find_place(4, PlaceOptions(node_rank=4), {}, [], [1, 3])
    with pytest.raises(UserError, match=r"the plan has 2 nodes: .* and HOST the address of node 1: "):
        find_place(4, PlaceOptions(), {}, ARGUMENTS, [1, 3])


def test_the_only_node_in_use_may_be_any() -> None:
    assert find_place(2, PlaceOptions(), {}, [], [1]) == Place()
    assert find_place(2, PlaceOptions(node_rank=1), {}, [], [1]) == Place()
    assert find_place(2, PlaceOptions(), {"SLURM_NODEID": "0"}, [], [1]) is None


def test_options_win_over_the_environment() -> None:
    environment = {"SLURM_NODEID": "1", "SLURM_PROCID": "2", "MASTER_ADDR": "there", "MASTER_PORT": "7"}
    assert find_place(3, PlaceOptions(), environment, []) == Place(1, 3, "there", 7)
    assert find_place(3, PlaceOptions(2, "here", 9), environment, []) == Place(2, 3, "here", 9)
    assert find_place(3, PlaceOptions(0, "here"), {}, []) == Place(0, 3, "here", 29500)


def test_slurm_names_the_first_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames gpu[7-8]" ] && printf "gpu7\\ngpu8\\n"\n')
    tool.chmod(0o755)
    environment = {"SLURM_PROCID": "1", "SLURM_JOB_NODELIST": "gpu[7-8]"}
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert find_place(2, PlaceOptions(), environment, []) == Place(1, 2, "gpu7", 29500)
    assert find_place(3, PlaceOptions(node_rank=2), environment, [], [1, 2]) == Place(1, 2, "gpu8", 29500)
    tool.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UserError, match="--node-rank K --master-addr HOST"):
        find_place(2, PlaceOptions(), environment, [])


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        (PlaceOptions(), {}, "the plan has 2 nodes: run on each of them, .*: hetermoe train 'my plan.yaml' --steps 3 "
         "--node-rank K --master-addr HOST "),
        (PlaceOptions(master_addr="a", master_port=5), {}, "--node-rank K --master-addr a --master-port 5 "),
        (PlaceOptions(node_rank=2), {}, "--node-rank is 2: the plan has 2 nodes, 0 to 1"),
        (PlaceOptions(), {"SLURM_NODEID": "3"}, "SLURM_NODEID is 3: the plan has 2 nodes"),
        (PlaceOptions(0, "a"), {"MASTER_PORT": "many"}, "MASTER_PORT is 'many'"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong(options: PlaceOptions, environment: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        find_place(2, options, environment, ARGUMENTS)
    assert caught.value.code is ExitCode.USAGE


def test_the_command_of_another_node() -> None:
    expected = "hetermoe train 'my plan.yaml' --steps 3 --node-rank 0 --master-addr host"
    assert command_of_node(ARGUMENTS, 0, "host", None) == expected

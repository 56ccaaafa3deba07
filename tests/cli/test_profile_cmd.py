"""`hetermoe profile`: real runs on the CPU, merging, and refusals that leave every file as it was."""

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import torch

from builders import make_profile
from hetermoe_cli.cli.main import main
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.profiler.profile import default_name, resolve_device, torch_threads
from hetermoe_cli.profiler.tables import merge
from hetermoe_cli.spec.cluster import LinkRecord
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.named_models import NAMED_MODELS
from hetermoe_cli.spec.profile import DeviceFacts, Profile
from hetermoe_cli.spec.train import TrainSpec

SMALL_RUN = ["--device", "cpu", "--quick", "--sequence-lengths", "16", "--sequences", "1", "--tokens", "8,4"]


class Cli:
    """The command in this process: torch is imported once for all tests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        self.monkeypatch.setattr(sys, "argv", ["hetermoe", "profile", *arguments])
        try:
            main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = self.capfd.readouterr()
        return code, out, err


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capfd)


def measured(**changes: object) -> Profile:
    """A measured CPU profile of the test model's shape."""
    base = make_profile("cpu")
    facts = DeviceFacts(product="Brand CPU", memory_bytes=10**9)
    return base.model_copy(update={"source": "measured", "accelerator": "cpu", "facts": facts, **changes})


def test_a_real_quick_run_writes_profile_and_link(tmp_path: Path) -> None:
    """A process of its own: stdout holds one JSON object and nothing else, files read back."""
    command = [str(Path(sys.executable).parent / "hetermoe"), "profile", "--device", "cpu", "--quick", "--json"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, check=True)
    data = json.loads(done.stdout)
    assert done.stderr == ""  # no terminal, no progress bar
    profile = load(Profile, tmp_path / "cpu.yaml")
    assert data["file"] == str(tmp_path / "cpu.yaml")
    assert data["profile"] == profile.model_dump(mode="json")
    assert (profile.device, profile.source, profile.accelerator) == ("cpu", "measured", "cpu")
    assert profile.date == date.today()
    assert {"torch", "python", "hetermoe"} <= profile.software.keys()
    assert profile.facts.memory_bytes == profile.memory_bytes
    assert 50e6 < profile.framework_bytes < 2e9
    (table,) = profile.tables
    assert (table.shape, table.precision) == (NAMED_MODELS["tiny"].shape, "fp32")
    link = load(LinkRecord, tmp_path / "links" / "cpu-pair.yaml")
    assert data["link"] == link.model_dump(mode="json")


@pytest.mark.parametrize(
    ("accelerator", "given", "precision"),
    [("cpu", [], "fp32"), ("cuda", [], "fp16"), ("cuda", ["--precision", "bf16"], "bf16")],
)
def test_the_precision_is_that_of_a_training_spec_or_a_cpu(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerator: str, given: list[str], precision: str
) -> None:
    """Plans read the profile's tables of the training spec's precision."""
    asked: list[object] = []

    def profile_device(*arguments: object) -> Profile:
        asked.extend(arguments)
        return measured()

    monkeypatch.setattr("hetermoe_cli.profiler.profile.profile_device", profile_device)
    monkeypatch.setattr("hetermoe_cli.profiler.profile.resolve_device", lambda device: torch.device(accelerator))
    monkeypatch.setattr("hetermoe_cli.profiler.profile.device_facts", lambda device: DeviceFacts(product="Brand X1"))
    assert cli(*given, "--no-network", "--output", str(tmp_path))[0] == 0
    assert precision in asked
    assert TrainSpec(sequence_length=1, global_batch_sequences=1).precision == "fp16"


@pytest.mark.long
def test_other_shapes_are_kept_and_the_same_shape_is_replaced(cli: Cli, tmp_path: Path) -> None:
    arguments = [*SMALL_RUN, "--no-network", "--output", str(tmp_path)]
    assert cli(*arguments)[0] == 0
    first = load(Profile, tmp_path / "cpu.yaml")
    code, _, err = cli(*arguments, "--model", "small", "--model", "small")
    assert (code, "0 tables replaced, 1 kept" in err) == (0, True)
    both = load(Profile, tmp_path / "cpu.yaml")
    assert both.tables[0] == first.tables[0]
    assert [t.shape for t in both.tables] == [NAMED_MODELS[name].shape for name in ("tiny", "small")]
    code, _, err = cli(*arguments, "--tokens", "2")
    assert (code, "1 tables replaced, 1 kept" in err) == (0, True)
    again = load(Profile, tmp_path / "cpu.yaml")
    assert [[p.tokens for p in t.expert] for t in again.tables] == [[4, 8], [2]]
    assert not (tmp_path / "links").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["cpu.yaml"]  # no temporary file left


@pytest.mark.long
def test_tables_show_every_point_without_colour(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli(*SMALL_RUN, "--no-network", "--name", "lab", "--output", str(tmp_path))
    assert code == 0
    assert out.count("expert") == out.count("head  ") == 2
    assert "1 x 16" in out
    assert "\x1b" not in out
    assert err == f"hetermoe: wrote {tmp_path / 'lab.yaml'}\n"


def test_a_modelled_file_is_replaced_and_not_merged(cli: Cli, tmp_path: Path) -> None:
    dump(measured(source="modelled"), tmp_path / "cpu.yaml")
    code, _, err = cli(*SMALL_RUN, "--no-network", "--output", str(tmp_path))
    assert (code, "modelled profile was replaced as a whole" in err) == (0, True)
    assert [t.shape for t in load(Profile, tmp_path / "cpu.yaml").tables] == [NAMED_MODELS["tiny"].shape]


def test_a_profile_of_another_product_is_replaced() -> None:
    new = measured(facts=DeviceFacts(product="Other CPU"))
    merged, note = merge(measured(), new)
    assert merged == new
    assert "another product (Brand CPU)" in note


def test_another_precision_is_another_table_and_other_software_is_named() -> None:
    old = measured(software={"torch": "1.0"})
    tables = [old.tables[0].model_copy(update={"precision": "fp64"})]
    merged, note = merge(old, measured(tables=tables, software={"torch": "2.0"}))
    assert [t.precision for t in merged.tables] == [old.tables[0].precision, "fp64"]
    assert merged.software == {"torch": "2.0"}
    assert note == "0 tables replaced, 1 kept (measured with torch 1.0)"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tokens", "0"], "--tokens"),
        (["--tokens", "8,,16"], "--tokens"),
        (["--sequences", "two"], "--sequences"),
        (["--sequence-lengths", "-64"], "--sequence-lengths"),
        (["--sequence-lengths", "99999999"], "--sequence-lengths"),
        (["--device", "tpu"], "--device"),
        (["--name", "../cpu"], "--name"),
        (["--precision", "int8"], "--precision"),
        (["--threads", "0"], "--threads"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_usage_errors_exit_2_and_write_nothing(cli: Cli, tmp_path: Path, arguments: list[str], told: str) -> None:
    code, out, err = cli("--output", str(tmp_path / "new"), *arguments)
    assert (code, out) == (ExitCode.USAGE, "")
    assert told in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_bad_input_exits_3_and_overwrites_nothing(cli: Cli, tmp_path: Path, arguments: list[str], told: str) -> None:
    dump(measured(), tmp_path / "cpu.yaml")
    before = (tmp_path / "cpu.yaml").read_bytes()
    code, out, err = cli(*SMALL_RUN, "--output", str(tmp_path), *arguments)
    assert (code, out) == (ExitCode.BAD_INPUT, "")
    assert err.count("\n") == 1
    assert told in err
    assert (tmp_path / "cpu.yaml").read_bytes() == before


def test_an_unreadable_profile_is_refused_before_measuring(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hetermoe_cli.profiler.profile.profile_device", lambda *_: pytest.fail("measured"))
    (tmp_path / "cpu.yaml").write_text("kind: profile\ndevice: [")
    code, _, err = cli(*SMALL_RUN, "--output", str(tmp_path))
    assert code == ExitCode.BAD_INPUT
    assert f"{tmp_path / 'cpu.yaml'}: line" in err
    assert (tmp_path / "cpu.yaml").read_text() == "kind: profile\ndevice: ["


def test_an_output_that_is_a_file_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    code, _, err = cli(*SMALL_RUN, "--output", str(tmp_path / "taken"))
    assert (code, "cannot be written (Not a directory)" in err) == (ExitCode.BAD_INPUT, True)
    assert (tmp_path / "taken").read_text() == "mine"


def test_interrupted_measuring_leaves_the_old_file(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    dump(measured(), tmp_path / "cpu.yaml")
    before = (tmp_path / "cpu.yaml").read_bytes()
    monkeypatch.setattr("hetermoe_cli.profiler.kernels.measure", interrupt)
    assert cli(*SMALL_RUN, "--output", str(tmp_path))[0] == ExitCode.INTERRUPTED
    assert (tmp_path / "cpu.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA A40", "A40"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla T4", "T4"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 3090", "RTX3090"),
        (None, "cuda"),
    ],
)
def test_the_default_name_is_short(product: str | None, name: str) -> None:
    assert default_name(DeviceFacts(product=product), "cuda") == name
    assert default_name(DeviceFacts(product=product), "cpu") == "cpu"


def test_threads_are_restored() -> None:
    import torch

    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_the_command_line_imports_neither_torch_nor_pydantic() -> None:
    code = "import sys, hetermoe_cli.cli.profile; sys.exit(bool({'torch', 'pydantic', 'pynvml'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"], False),
        ((7, 0), ["sm_50", "sm_60", "sm_70", "sm_75"], True),
        ((8, 9), ["sm_75", "sm_80", "sm_86"], True),
        ((8, 0), ["sm_75", "sm_86"], False),
        ((12, 1), ["sm_90a", "compute_120"], True),
        ((8, 0), [], True),
        ((9, 0), ["gfx90a"], True),
    ],
)
def test_a_card_without_kernels_in_this_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str], runs: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    if runs:
        assert resolve_device("cuda") == torch.device("cuda", 0)
        return
    with pytest.raises(
        UserError, match=rf"CUDA device 0 has compute capability {capability[0]}\.{capability[1]}, torch"
    ):
        resolve_device("cuda")

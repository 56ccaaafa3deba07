"""The modelled reference profiles: the paper's ratios, the saved-bytes formulas, and files that are up to date."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import derive_profiles
import roofline
from hetermoe_cli.profiler.kernels import Sizes, profile_kernels
from hetermoe_cli.profiler.measure import Effort
from hetermoe_cli.spec.cluster import LinkRecord
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.model import NAMED_MODELS
from hetermoe_cli.spec.profile import KernelTable, Profile

MIXTRAL = NAMED_MODELS["mixtral-8x7b"].shape


@pytest.fixture(scope="module")
def profiles() -> dict[str, Profile]:
    """The committed files, not what the script would write."""
    return {name: load(Profile, derive_profiles.PROFILES / f"{name}.yaml") for name in ("A40", "V100", "L40S", "T4")}


def table(profile: Profile) -> KernelTable:
    """Mixtral-8x7B's table."""
    return next(t for t in profile.tables if t.shape == MIXTRAL)


def attention_ratios(old: Profile, new: Profile) -> dict[int, float]:
    """Sequence length -> seconds of `old` over seconds of `new`, forward + backward, one sequence."""
    pairs = zip(table(old).attention, table(new).attention, strict=True)
    return {
        a.sequence_length: (a.forward_seconds + a.backward_seconds) / (b.forward_seconds + b.backward_seconds)
        for a, b in pairs
        if a.sequences == 1
    }


@pytest.mark.parametrize(("old", "new", "ratio"), [("V100", "A40", 1 / 0.8), ("T4", "L40S", 7.0)])
def test_expert_ratios_of_the_paper_hold_at_every_size(
    profiles: dict[str, Profile], old: str, new: str, ratio: float
) -> None:
    for slow, fast in zip(profiles[old].tables, profiles[new].tables, strict=True):
        for a, b in zip(slow.expert, fast.expert, strict=True):
            assert a.forward_seconds / b.forward_seconds == pytest.approx(ratio, rel=0.01)
            assert a.backward_seconds / b.backward_seconds == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize(
    ("old", "new", "length", "paper", "tolerance"),
    [("V100", "A40", 65536, 3.7, 0.02), ("T4", "L40S", 65536, 13.6, 0.02), ("T4", "L40S", 4096, 9.9, 0.16)],
)
def test_attention_ratios_of_the_paper(
    profiles: dict[str, Profile], old: str, new: str, length: int, paper: float, tolerance: float
) -> None:
    """64K is calibrated; 4K is the model's own prediction (8.4), which it misses by 15 %."""
    assert attention_ratios(profiles[old], profiles[new])[length] == pytest.approx(paper, rel=tolerance)


@pytest.mark.parametrize(("old", "new", "expert"), [("V100", "A40", 1.25), ("T4", "L40S", 7.0)])
def test_the_gap_on_attention_widens_with_the_sequence(
    profiles: dict[str, Profile], old: str, new: str, expert: float
) -> None:
    ratios = list(attention_ratios(profiles[old], profiles[new]).values())
    assert ratios == sorted(ratios)
    assert ratios[-1] > 1.9 * expert


def test_backward_takes_two_to_two_and_a_half_forwards(profiles: dict[str, Profile]) -> None:
    for profile in profiles.values():
        for point in table(profile).attention:
            assert 2 <= point.backward_seconds / point.forward_seconds < 2.5
        for row in [*table(profile).expert, *table(profile).head]:
            assert row.backward_seconds / row.forward_seconds == pytest.approx(2, rel=1e-3)


def test_a40_expert_seconds_by_hand(profiles: dict[str, Profile]) -> None:
    """65536 tokens x 6 x 4096 x 14336 flops at 0.6 x 149.7 TFLOP/s is 257 ms; traffic adds some per cent."""
    point = next(p for p in table(profiles["A40"]).expert if p.tokens == 65536)
    products = 65536 * 6 * 4096 * 14336 / (0.6 * 149.7e12)
    assert products < point.forward_seconds < 1.05 * products


def test_every_profile_says_that_it_is_modelled(profiles: dict[str, Profile]) -> None:
    for name, profile in profiles.items():
        assert (profile.device, profile.source, profile.accelerator) == (name, "modelled", "cuda")
        assert all(t.precision == "fp16" for t in profile.tables)
        assert {t.shape for t in profile.tables} == {m.shape for n, m in NAMED_MODELS.items() if "mixtral" in n}
        text = (derive_profiles.PROFILES / f"{name}.yaml").read_text()
        assert text.startswith(f"# {name}: MODELLED")


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("ethernet-100g", 12.5), ("ethernet-200g", 25), ("pcie3-x16", 15.75), ("pcie4-x16", 31.5), ("nvlink-a100", 300)],
)
def test_links_stay_below_their_line_rate(name: str, gigabytes: float) -> None:
    record = load(LinkRecord, derive_profiles.PROFILES / "links" / f"{name}.yaml")
    assert (record.name, record.source) == (name, "modelled")
    assert 0.7 * gigabytes < record.link.bandwidth_gigabytes_per_second < gigabytes


def test_committed_files_are_up_to_date() -> None:
    assert derive_profiles.main(["--check"]) == 0


def test_check_finds_a_changed_and_a_missing_file_but_ignores_the_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", str(tmp_path)]
    assert derive_profiles.main(arguments) == 0
    link, profile = tmp_path / "links" / "pcie3-x16.yaml", tmp_path / "T4.yaml"
    link.write_text(link.read_text().replace(f"date: '{load(LinkRecord, link).date}'", "date: '2001-01-01'"))
    assert "2001-01-01" in link.read_text()
    assert derive_profiles.main([*arguments, "--check"]) == 0
    profile.write_text(profile.read_text().replace("sequences: 8", "sequences: 9", 1))
    link.unlink()
    capsys.readouterr()
    assert derive_profiles.main([*arguments, "--check"]) == 1
    stale = [line for line in capsys.readouterr().out.splitlines() if line.startswith("STALE")]
    assert stale == [f"STALE: {profile}", f"STALE: {link}"]
    assert not link.exists()


def test_saved_bytes_formulas_match_the_measurement() -> None:
    """fp32 on the CPU, which has no fused RMSNorm; the design asks for 15 %."""
    config = NAMED_MODELS["tiny"].model_copy(update={"experts": 8})  # what the formula assumes for an unnamed shape
    config = config.model_copy(update={"ffn_size": 160, "attention_heads": 6, "head_size": 8})
    sizes = Sizes(sequence_lengths=(32, 96), sequences=(1, 3), tokens=(16, 80))
    measured = profile_kernels(config, "fp32", torch.device("cpu"), sizes, Effort(visits=2, visit_runs=1))
    shape = config.shape
    for point in measured.attention:
        expected = roofline.attention_saved_bytes(shape, point.sequence_length, point.sequences, 4, fused_norm=False)
        assert point.saved_bytes == pytest.approx(expected, rel=0.02)
    for expert in measured.expert:
        assert expert.saved_bytes == roofline.expert_saved_bytes(shape, expert.tokens, 4)
    for head in measured.head:
        expected = roofline.head_saved_bytes(shape, head.tokens, 4, fused_norm=False)
        assert head.saved_bytes == pytest.approx(expected, rel=0.02)

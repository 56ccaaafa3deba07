"""What the rivals get is what the engine trains on, and what fails says so in one line. Nothing is installed here."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import bench_rivals
import rivals_environment
import rivals_kernels
import rivals_runs
from hetermoe_cli.errors import UserError
from hetermoe_cli.model.data.corpus import Batches, load_corpus
from hetermoe_cli.model.layers.moe import ExpertGroup
from hetermoe_cli.model.transformer import Transformer, initialise
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.named_models import load_model
from hetermoe_cli.spec.train import TrainSpec

MODEL, TRAIN = load_model(str(bench_rivals.MODEL)), load(TrainSpec, bench_rivals.TRAIN)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return rivals_runs.mixtral_weights(MODEL, TRAIN.seed)


def test_every_weight_is_handed_over_once(weights: dict[str, Tensor]) -> None:
    reference = Transformer(MODEL)
    assert sum(t.numel() for t in weights.values()) == sum(p.numel() for p in reference.parameters())
    assert len({t.data_ptr() for t in weights.values()}) == len(weights)
    assert weights["model.layers.3.mlp.experts.gate_up_proj"].shape == (8, 1024, 256)
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (64, 256)


def test_experts_compute_the_same_in_the_rivals_layout(weights: dict[str, Tensor]) -> None:
    """Mixtral's own formula: down(silu(gate x) * up x), gate before up."""
    reference = Transformer(MODEL)
    initialise(reference, MODEL, TRAIN.seed)
    group = reference.experts[2]
    assert isinstance(group, ExpertGroup)
    rows, expert = torch.randn(5, MODEL.hidden_size), 6
    gate, up = weights["model.layers.2.mlp.experts.gate_up_proj"][expert].chunk(2)
    inner = functional.silu(rows @ gate.T) * (rows @ up.T)
    theirs = inner @ weights["model.layers.2.mlp.experts.down_proj"][expert].T
    ours = group(rows, [5 if e == expert else 0 for e in range(MODEL.experts)])
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-5)


def test_tokens_are_the_engine_s_batches() -> None:
    table = rivals_runs.token_table(TRAIN, 2)
    assert table.shape == (2, TRAIN.global_batch_sequences, TRAIN.sequence_length + 1)
    corpus = load_corpus(None)
    batches = Batches(corpus.train, TRAIN.sequence_length, TRAIN.global_batch_sequences, TRAIN.seed)
    tokens, targets = batches.sequences(1, 0, TRAIN.global_batch_sequences)
    assert np.array_equal(table[1, :, :-1], tokens.numpy())
    assert np.array_equal(table[1, :, 1:], targets.numpy())


def steps(seconds: float, loss: float) -> list[rivals_runs.Steps]:
    """Rounds of equal steps after slow first ones."""
    warm_up, timed = bench_rivals.WARM_UP, bench_rivals.STEPS - bench_rivals.WARM_UP
    one = rivals_runs.Steps([loss] * bench_rivals.STEPS, [*[9.0] * warm_up, *[seconds] * timed])
    return [one] * bench_rivals.ROUNDS


def test_bars_follow_from_ratios_and_losses() -> None:
    found = {
        ("engine", "fp32"): steps(0.6, 5.0),
        ("engine", "bf16"): steps(0.5, 5.01),
        ("deepspeed", "fp32"): steps(1.0, 5.00001),
        ("deepspeed", "bf16"): steps(0.9, 5.02),
        ("hugging_face", "fp32"): steps(0.8, 5.1),
        ("hugging_face", "bf16"): steps(0.85, 5.1),
        ("kernels", "fp32"): steps(0.4, 0.0),
        ("kernels", "bf16"): steps(0.2, 0.0),
    }
    result, ratios = bench_rivals.judge(found)
    assert ratios["engine over deepspeed, in fp32"]["median"] == pytest.approx(0.6)
    assert ratios["engine over deepspeed, each in its faster precision"]["median"] == pytest.approx(5 / 9)
    assert ratios["engine over hugging_face, in fp32"]["high"] == pytest.approx(0.75)
    assert ratios["engine over hugging_face, each in its faster precision"]["high"] == pytest.approx(0.625)
    assert ratios["kernels over hugging_face, in fp32"]["median"] == pytest.approx(0.5)
    assert [bar["holds"] for bar in result] == [*[True] * 6, False, False, True, True, False, False]


def test_kernels_are_those_of_a_ranks_part_of_a_step() -> None:
    """Of an even load: three products of each weight, with all tokens in the dense part and k times in experts."""
    torch.set_num_threads(1)
    kernels = rivals_kernels.Kernels(MODEL, TRAIN, "fp32", 2)
    tokens = TRAIN.global_batch_sequences * TRAIN.sequence_length // 2
    weights = MODEL.layers * (256 * (256 + 2 * 64) + 256 * 256 + MODEL.top_k * 3 * 256 * 512) + 256 * 1024
    with FlopCounterMode(display=False) as flops:  # of products; it knows no attention kernel of a CPU
        kernels.seconds(1)
    assert sum(flops.get_flop_counts()["Global"].values()) == 3 * 2 * tokens * weights
    with profile(activities=[ProfilerActivity.CPU]) as traced:
        kernels.seconds(1)
    calls = {event.key: event.count for event in traced.key_averages()}
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert calls[attention] == calls[f"{attention}_backward"] == MODEL.layers
    assert calls["aten::_fused_adamw_"] == 1
    assert len(kernels.seconds(2)) == 2


@pytest.mark.long
def test_a_failed_installation_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot install the rivals.*ERROR: .*nowhere") as caught:
        rivals_environment.environment(tmp_path / "venv", (str(tmp_path / "nowhere.whl"),))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "venv" / "pinned.txt").exists()


def test_a_rank_that_ends_is_told_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import sys; sys.exit('no such model')")
    monkeypatch.setattr(rivals_runs, "WORKER", worker)
    job = {"rival": "deepspeed", "variant": {"precision": "fp32", "zero": 0}}
    with (
        rivals_runs.Rival(Path(sys.executable), tmp_path / "run", job) as rival,
        pytest.raises(UserError, match=r"deepspeed .*: rank 0 has ended: no such model; log: "),
    ):
        rival.wait_ready()

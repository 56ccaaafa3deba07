"""RoPE frequencies and their scaling: transformers' values, and what each kind of scaling is for."""

import math

import pytest
import torch
from pydantic import TypeAdapter

from hetermoe_cli.model.kernels.rope import frequencies, rope_table
from hetermoe_cli.spec.rope import Llama3Scaling, RopeScaling, YarnScaling

LLAMA3 = Llama3Scaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=512)
YARN = YarnScaling(factor=40, original_max_position_embeddings=512)
# (rope_parameters, frequencies of a head of 16 with theta 10000, attention factor): what ROPE_INIT_FUNCTIONS of
# transformers 5.2.0 return for a MixtralConfig, in fp32.
TRANSFORMERS = [
    (
        {"rope_type": "linear", "factor": 4.0},
        [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05],
        1.0,
    ),
    (
        LLAMA3.model_dump(),
        [1.0, 0.3162278, 0.1, 0.01849668, 0.00125, 0.0003952847, 0.000125, 3.952847e-05],
        1.0,
    ),
    (
        YARN.model_dump(),
        [1.0, 0.2391472, 0.05125, 0.008498622, 0.00025, 7.905695e-05, 2.5e-05, 7.905694e-06],
        1.3688879454113936,
    ),
    (
        YARN.model_dump() | {"mscale": 1.0, "mscale_all_dim": 0.707, "beta_fast": 16.0, "truncate": False},
        [1.0, 0.3162278, 0.07627279, 0.01131678, 0.00025, 7.905695e-05, 2.5e-05, 7.905694e-06],
        1.0857263992561355,
    ),
    (YARN.model_dump() | {"attention_factor": 1.5}, [1.0], 1.5),
]


@pytest.mark.parametrize(("parameters", "expected", "factor"), TRANSFORMERS)
def test_scaled_frequencies_are_those_of_transformers(
    parameters: dict[str, object], expected: list[float], factor: float
) -> None:
    scaling: RopeScaling = TypeAdapter(RopeScaling).validate_python(parameters)
    found, scale = frequencies(16, 1e4, scaling)
    assert found.tolist()[: len(expected)] == pytest.approx(expected, rel=1e-6)
    assert scale == pytest.approx(factor, rel=1e-12)


def test_llama3_by_hand() -> None:
    """A frequency that makes more than 4 turns in 512 positions is kept, one that makes less than 1 divided by 8."""
    found, _ = frequencies(64, 1e4, LLAMA3)
    for index, frequency in enumerate(found.tolist()):
        plain = 1e4 ** (-index / 32)
        turns = 512 * plain / (2 * math.pi)
        share = min(max((turns - 1) / 3, 0), 1)
        assert frequency == pytest.approx(share * plain + (1 - share) * plain / 8, rel=1e-12)
    assert found[0] == 1
    assert found[-1] == pytest.approx(1e4 ** (-31 / 32) / 8)


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN])
def test_the_table_holds_cos_and_sin_of_every_position(scaling: RopeScaling | None) -> None:
    cos, sin = rope_table(9, 16, 1e4, torch.device("cpu"), torch.float64, scaling)
    frequency, factor = frequencies(16, 1e4, scaling)
    assert cos.shape == sin.shape == (9, 8)
    assert cos[7, 3].item() == pytest.approx(factor * math.cos(7 * frequency[3].item()), rel=1e-14)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, factor**2), rtol=1e-14, atol=0)

"""Growth: fits find the polynomial they were made from, weigh points by relative distance, are drawn with points."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import engine_growth
from engine_growth import BASE, GROWTH, draw, fit, fits, in_words, shape

FOUND = {name: [{"at": size, "seconds": 0.02 + 0.001 * size} for size in sizes] for name, sizes in GROWTH.items()}


def test_a_polynomial_is_found_again() -> None:
    sizes = [32.0, 64.0, 128.0, 256.0]
    found = fit(sizes, [0.01 + 2e-4 * size + 3e-7 * size**2 for size in sizes], 2)
    assert found.coefficients == pytest.approx([0.01, 2e-4, 3e-7])
    assert found.worst == pytest.approx(0.0, abs=1e-9)
    assert found(100.0) == pytest.approx(0.033)
    assert in_words(found) == "10 ms + 0.2 ms n + 0.0003 ms n² (±0%)"


def test_the_worst_distance_is_relative() -> None:
    found = fit([1.0, 2.0, 3.0], [1.0, 1.0, 1.3], 0)
    assert found.worst == pytest.approx(max(abs(found(0) / seconds - 1) for seconds in (1.0, 1.3)))
    assert found(0) < 1.1  # least squares of absolute distances would say 1.1


def test_every_point_is_a_layout() -> None:
    for name, sizes in GROWTH.items():
        for size in sizes:
            one = shape(*(BASE | {name: size}).values())
            assert one.layout.world_size == (size if name == "ranks" else BASE["ranks"])
            assert one.train.global_batch_sequences == engine_growth.SEQUENCES * engine_growth.MICRO_BATCHES
            assert one.layout.experts == one.model.experts


def test_points_and_fits_are_drawn(tmp_path: Path) -> None:
    draw(FOUND, fits(FOUND), tmp_path / "one.svg")
    draw(FOUND, fits(FOUND), tmp_path / "two.svg")
    picture = (tmp_path / "one.svg").read_text()
    assert picture == (tmp_path / "two.svg").read_text()
    assert picture.count("20 ms + 1 ms n") == len(GROWTH)
    assert "n = ranks, sharing" in picture

"""The figures that the HeterMoE paper states, each with what computes ours, for reproduce_paper.py."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean

from paper_points import (
    AWS,
    GPUS,
    LENGTHS,
    MIXED,
    ON_PREMISE,
    Case,
    busy,
    eight_experts,
    point,
    ratio_point,
    run,
    speed_up,
)

TOLERANCE = 0.15
OLD: GPUS = (("V100", 4),)
NEW: GPUS = (("A40", 4),)
NEWEST: GPUS = (("A100-80", 2),)

Place = tuple[str, str]  # (set-up, model)
Ours = Callable[[Case], float | None]  # None where no point fits


@dataclass(frozen=True)
class Figure:
    """A stated figure, and what computes ours."""

    name: str
    paper: float
    ours: Ours


def gains(case: Case, over: str, where: Iterable[Place] = ON_PREMISE, lengths: Iterable[int] = LENGTHS) -> list[float]:
    """Speed-ups at all points that fit."""
    points = [point(case, setup, model, length) for setup, model in where for length in lengths]
    return [gain for at in points if (gain := speed_up(at, over)) is not None]


def average(over: str, where: Iterable[Place] = ON_PREMISE, lengths: Iterable[int] = LENGTHS) -> Ours:
    """Mean of speed-ups."""
    return lambda case: mean(found) if (found := gains(case, over, where, lengths)) else None


def inverse(over: str, where: Iterable[Place] = ON_PREMISE, lengths: Iterable[int] = LENGTHS) -> Ours:
    """1 / mean of throughput ratios, where the paper states that ratio."""
    return lambda case: 1 / mean(1 / gain for gain in found) if (found := gains(case, over, where, lengths)) else None


def extreme(
    of: Callable[[list[float]], float], over: str, where: Iterable[Place], lengths: Iterable[int] = LENGTHS
) -> Ours:
    """Least or largest speed-up."""
    return lambda case: of(found) if (found := gains(case, over, where, lengths)) else None


def at(setup: str, model: str, kilotokens: int, over: str) -> Ours:
    """The speed-up at one point. Over "no_asym" it is what Asym-EA gains."""
    return lambda case: speed_up(point(case, setup, model, kilotokens), over)


def ratio(old: int, kilotokens: int) -> Ours:
    """Over EP (Ideal), D1 on 4 A40 and `old` V100."""
    return lambda case: speed_up(ratio_point(case, old, kilotokens), "ep_ideal")


def homogeneous(other: GPUS, lengths: Iterable[int] = LENGTHS) -> Ours:
    """Mean throughput of 2 A40 + 2 V100 over that of EP on equal GPUs, D1 with 8 experts."""

    def ours(case: Case) -> float | None:
        ratios = []
        for length in lengths:
            mixed, equal = (
                run(eight_experts(case, MIXED, length), "hetermoe"),
                run(eight_experts(case, other, length), "ep"),
            )
            if mixed.layout and equal.layout:
                ratios.append(equal.seconds / mixed.seconds)
        return mean(ratios) if ratios else None

    return ours


def newest(case: Case) -> float | None:
    """Throughput of 2 A100 over that of 2 A40 + 2 V100."""
    found = homogeneous(NEWEST)(case)
    return 1 / found if found else None


def utilisation(kilotokens: int, method: str, gpu: str) -> Ours:
    """Busy share of the GPUs of one type, D1 on O1."""
    place = ("A40", "V100").index(gpu)
    return lambda case: busy(point(case, "O1", "D1", kilotokens), method)[place]


def _utilisations() -> Iterable[Figure]:
    stated = {(8, "no_asym"): (0.55, 0.89), (8, "hetermoe"): (0.83, 0.78)}
    stated |= {(16, "no_asym"): (0.77, 0.89), (16, "hetermoe"): (0.86, 0.84)}
    for (length, method), shares in stated.items():
        for gpu, share in zip(("A40", "V100"), shares, strict=True):
            how = "with" if method == "hetermoe" else "without"
            name = f"utilisation of {gpu}, D1 on O1, {length}K, {how} Asym-EA"
            yield Figure(name, share, utilisation(length, method, gpu))


# "HeterMoE's speed-ups over EP reach 2.05x and 2.29x for 32K sequences", D1 and D2
D1_AT_32K = extreme(max, "ep", [("O1", "D1"), ("O2", "D1")], [32])

FIGURES = [
    Figure("over EP, on-premise, 4K, mean", 1 / 0.82, inverse("ep", lengths=[4])),
    Figure("over EP, W2 on O2, 4K", 1 / 0.91, at("O2", "W2", 4, "ep")),
    Figure("over EP, on-premise, 16K, mean", 1.67, average("ep", lengths=[16])),
    Figure("over EP, on-premise, 32K, mean", 1.89, average("ep", lengths=[32])),
    Figure("over EP, D1, 32K (best)", 2.05, D1_AT_32K),
    Figure("over EP, D2, 32K", 2.29, at("O3", "D2", 32, "ep")),
    Figure("over DistEP, on-premise, mean", 1 / 0.55, inverse("dist_ep")),
    Figure("over DistEP, on-premise, 4K", 1 / 0.56, inverse("dist_ep", lengths=[4])),
    Figure("over DistEP, on-premise, 32K", 1 / 0.59, inverse("dist_ep", lengths=[32])),
    Figure("over EP (Ideal), on-premise, mean", 1.18, average("ep_ideal")),
    Figure("over EP (Ideal), D1 on O1, 20K (best)", 1.38, at("O1", "D1", 20, "ep_ideal")),
    Figure("over EP (Ideal), W2 on O2, 4K (worst)", 0.97, at("O2", "W2", 4, "ep_ideal")),
    Figure("over EP (Ideal), AWS, mean", 1.17, average("ep_ideal", AWS)),
    Figure("over EP (Ideal), AWS, best", 1.25, extreme(max, "ep_ideal", AWS)),
    Figure("over EP, AWS, mean", 2.89, average("ep", AWS)),
    Figure("over DistEP, AWS, mean", 1.96, average("dist_ep", AWS)),
    Figure("over PP, on-premise, mean", 1.28, average("pp")),
    Figure("over PP, on-premise, best", 1.47, extreme(max, "pp", ON_PREMISE)),
    Figure("over PP, on-premise, 4K, least", 1.07, extreme(min, "pp", ON_PREMISE, [4])),
    Figure("over PP, on-premise, 4K, most", 1.21, extreme(max, "pp", ON_PREMISE, [4])),
    Figure("over EP (Ideal), D1 on 4 A40 + 5 V100, 12K", 1.22, ratio(5, 12)),
    Figure("over EP (Ideal), D1 on 4 A40 + 7 V100, 4K", 1.10, ratio(7, 4)),
    Figure("over EP (Ideal), D1 on 4 A40 + 3 V100, 4K", 0.76, ratio(3, 4)),
    Figure("2 A40 + 2 V100 over 4 A40, mean", 0.95, homogeneous(NEW)),
    Figure("2 A40 + 2 V100 over 4 A40, 12K to 20K", 0.985, homogeneous(NEW, [12, 16, 20])),
    Figure("2 A40 + 2 V100 over 4 V100, mean", 1.66, homogeneous(OLD)),
    Figure("2 A100 over 2 A40 + 2 V100, mean", 1.14, newest),
    Figure("Asym-EA on over off, W1 on O1, 4K", 1.20, at("O1", "W1", 4, "no_asym")),
    Figure("Asym-EA on over off, D1 on O1, 4K", 1.14, at("O1", "D1", 4, "no_asym")),
    Figure("Asym-EA on over off, W1 on O1, 24K", 1.04, at("O1", "W1", 24, "no_asym")),
    *_utilisations(),
]

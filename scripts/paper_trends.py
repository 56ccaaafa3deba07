"""The directions, orders and crossovers that the HeterMoE paper states, for reproduce_paper.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from paper_figures import D1_AT_32K, NEW, Ours, Place, at, average, gains, homogeneous, newest, ratio, utilisation
from paper_points import AWS, LENGTHS, ON_PREMISE, Case, attention_over_experts, moved, point

OLD_COUNTS = range(3, 9)  # V100 beside 4 A40
EVERYWHERE = (*ON_PREMISE, *AWS)


@dataclass(frozen=True)
class Trend:
    """A statement, and whether ours agree."""

    name: str
    holds: Callable[[Case], bool]


def rising(*ours: Ours | float) -> Callable[[Case], bool]:
    """Each is larger than the one before; false if one is missing."""

    def holds(case: Case) -> bool:
        values = [one if isinstance(one, float) else one(case) for one in ours]
        return all(a is not None and b is not None and a < b for a, b in pairwise(values))

    return holds


def both(*parts: Callable[[Case], bool]) -> Callable[[Case], bool]:
    """All of them."""
    return lambda case: all(part(case) for part in parts)


def always_faster(over: str) -> Callable[[Case], bool]:
    """At every point of every set-up."""
    return lambda case: min(gains(case, over, EVERYWHERE)) > 1


def extreme_at(
    of: Callable[[list[float]], float], place: Place, over: str, kilotokens: int, lengths: Sequence[int] = LENGTHS
) -> Callable[[Case], bool]:
    """Whether the least or largest on-premise speed-up of some lengths is at one point."""
    return lambda case: gains(case, over, [place], [kilotokens]) == [of(gains(case, over, lengths=lengths))]


def optimum(kilotokens: int) -> Callable[[Case], int]:
    """V100 beside 4 A40 that give the largest speed-up over EP (Ideal)."""
    return lambda case: max(OLD_COUNTS, key=lambda old: ratio(old, kilotokens)(case) or 0.0)


def moves_none(model: str, above: int) -> Callable[[Case], bool]:
    """On O1, Asym-EA runs no experts on attention GPUs above a length."""
    return lambda case: not any(moved(point(case, "O1", model, length)) for length in LENGTHS if length > above)


def attention_share(kilotokens: int) -> Ours:
    """Forward time of attention on A40 over that of experts on V100, D1 on O1."""
    return lambda case: attention_over_experts(point(case, "O1", "D1", kilotokens))


def change(kilotokens: int) -> Ours:
    """What Asym-EA adds to the utilisation of A40."""
    shares = [utilisation(kilotokens, method, "A40") for method in ("no_asym", "hetermoe")]

    def ours(case: Case) -> float | None:
        off, on = (share(case) for share in shares)
        return None if off is None or on is None else on - off

    return ours


TRENDS = [
    Trend(
        "the speed-up over EP grows with the sequence length (means at 4K, 16K, 32K)",
        rising(*(average("ep", lengths=[length]) for length in (4, 16, 32))),
    ),
    Trend("faster than EP at every point", always_faster("ep")),
    Trend("faster than DistEP at every point", always_faster("dist_ep")),
    Trend("faster than PP at every point", always_faster("pp")),
    Trend("at 4K the speed-up over EP is least for W2 on O2", extreme_at(min, ("O2", "W2"), "ep", 4, [4])),
    Trend(
        "at 32K the speed-up over EP is larger for D2 than for D1",
        rising(D1_AT_32K, at("O3", "D2", 32, "ep")),
    ),
    Trend(
        "at 32K the speed-up over EP is larger for D1 than in the mean",
        rising(average("ep", lengths=[32]), D1_AT_32K),
    ),
    Trend("the speed-up over EP is larger on AWS than on-premise", rising(average("ep"), average("ep", AWS))),
    Trend("faster than EP (Ideal) in the mean, on-premise", rising(1.0, average("ep_ideal"))),
    Trend("faster than EP (Ideal) in the mean, AWS", rising(1.0, average("ep_ideal", AWS))),
    Trend("slower than EP (Ideal) for W2 on O2 at 4K", rising(at("O2", "W2", 4, "ep_ideal"), 1.0)),
    Trend(
        "D1 on O1 gains more over EP (Ideal) at 20K than at 4K",
        rising(at("O1", "D1", 4, "ep_ideal"), at("O1", "D1", 20, "ep_ideal")),
    ),
    Trend(
        "the best on-premise point over EP (Ideal) is D1 on O1 at 20K", extreme_at(max, ("O1", "D1"), "ep_ideal", 20)
    ),
    Trend("the worst on-premise point over EP (Ideal) is W2 on O2 at 4K", extreme_at(min, ("O2", "W2"), "ep_ideal", 4)),
    Trend("the speed-up over PP is smaller at 4K than in the mean", rising(average("pp", lengths=[4]), average("pp"))),
    Trend("the best ratio of D1 at 12K is 4 A40 : 5 V100", lambda case: optimum(12)(case) == 5),
    Trend("the best ratio of D1 at 4K is 4 A40 : 7 V100", lambda case: optimum(4)(case) == 7),
    Trend("4 A40 : 3 V100 at 4K is slower than EP (Ideal)", rising(ratio(3, 4), 1.0)),
    Trend("2 A40 + 2 V100 reach 90 % of 4 A40 in the mean", rising(0.9, homogeneous(NEW))),
    Trend(
        "2 A40 + 2 V100 come nearer to 4 A40 at 12K to 20K than in the mean",
        rising(homogeneous(NEW), homogeneous(NEW, [12, 16, 20])),
    ),
    Trend("2 A100 are faster than 2 A40 + 2 V100", rising(1.0, newest)),
    Trend(
        "Asym-EA gains at 4K, on W1 more than on D1",
        rising(1.0, at("O1", "D1", 4, "no_asym"), at("O1", "W1", 4, "no_asym")),
    ),
    Trend(
        "Asym-EA gains less at 24K than at 4K (W1 on O1)",
        rising(at("O1", "W1", 24, "no_asym"), at("O1", "W1", 4, "no_asym")),
    ),
    Trend("Asym-EA moves no experts of D1 on O1 above 20K", moves_none("D1", 20)),
    Trend("Asym-EA moves no experts of W1 on O1 above 28K", moves_none("W1", 28)),
    Trend(
        "attention on A40 becomes slower than experts on V100 between 20K and 24K (D1 on O1)",
        rising(attention_share(20), 1.0, attention_share(24)),
    ),
    Trend("Asym-EA still moves experts of W1 on O1 at 28K", lambda case: moved(point(case, "O1", "W1", 28)) > 0),
    Trend(
        "Asym-EA makes A40 busier and V100 less busy at 8K (D1 on O1)",
        both(
            rising(*(utilisation(8, method, "A40") for method in ("no_asym", "hetermoe"))),
            rising(*(utilisation(8, method, "V100") for method in ("hetermoe", "no_asym"))),
        ),
    ),
    Trend("Asym-EA changes the utilisation of A40 less at 16K than at 8K (D1 on O1)", rising(change(16), change(8))),
]

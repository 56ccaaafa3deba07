"""Reproduce the figures that the HeterMoE paper states (arXiv 2504.03871), beside its own, on the modelled profiles.

    python scripts/reproduce_paper.py              table on stdout, bars on stderr
    python scripts/reproduce_paper.py --json       one JSON object instead
    python scripts/reproduce_paper.py --markdown   also rewrite the tables in docs/paper.md

HeterMoE here is the paper's method: attention on the newer type, zebra order, its greedy Asym-EA, R tuned. Everything
is simulated, nothing was measured, and nothing is fitted to the figures below (docs/paper.md: assumptions, residuals).
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import bars
from hetermoe_cli.spec.files import write_atomic
from paper_figures import FIGURES, TOLERANCE, Figure, ratio
from paper_points import AWS, LENGTHS, ON_PREMISE, Case, moved, point, speed_up
from paper_trends import OLD_COUNTS, TRENDS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "paper.md"
ASSUMED = Case()
OTHERS = {  # the same with one assumption changed
    "8 sequences per attention GPU": Case(per_attention_gpu=8),
    "nothing of EP overlaps": Case(overlap="none"),
    "EP overlaps micro-batches": Case(overlap="micro_batches"),
}
SHARE_WITHIN = 0.8
COLUMNS = {"ep": "EP", "dist_ep": "DistEP", "ep_ideal": "EP (Ideal)", "ep_ideal_charged": "charged", "pp": "PP"}

Row = dict[str, Any]


def within(figure: Figure, ours: float | None) -> bool:
    """Whether ours lies within the tolerance."""
    return ours is not None and abs(ours / figure.paper - 1) <= TOLERANCE


def figures() -> list[Row]:
    """Every stated figure: the paper's, ours, relative error; and ours in the other cases."""
    rows = []
    for figure in FIGURES:
        ours, others = figure.ours(ASSUMED), {name: figure.ours(case) for name, case in OTHERS.items()}
        rows.append(
            {
                "name": figure.name,
                "paper": figure.paper,
                "ours": ours,
                "error": None if ours is None else ours / figure.paper - 1,
                "within": within(figure, ours),
                "others": others,
                "others_within": {name: within(figure, value) for name, value in others.items()},
            }
        )
    return rows


def trends() -> list[Row]:
    """Every trend: whether it holds, also in the other cases."""
    return [
        {
            "name": trend.name,
            "holds": trend.holds(ASSUMED),
            "others": {name: trend.holds(case) for name, case in OTHERS.items()},
        }
        for trend in TRENDS
    ]


def grid() -> list[Row]:
    """Speed-ups of HeterMoE at every point of the set-ups."""
    rows = []
    for setup, model in (*ON_PREMISE, *AWS):
        for length in LENGTHS:
            at = point(ASSUMED, setup, model, length)
            over = {method: speed_up(at, method) for method in (*COLUMNS, "no_asym")}
            rows.append({"setup": setup, "model": model, "kilotokens": length, "over": over, "moved": moved(at)})
    return rows


def ratios() -> list[Row]:
    """Speed-ups over EP (Ideal) of D1 on 4 A40 and some V100."""
    return [{"old": old, "over_ep_ideal": {str(k): ratio(old, k)(ASSUMED) for k in (4, 12)}} for old in OLD_COUNTS]


def measure() -> dict[str, Any]:
    """All figures, trends and points."""
    began = time.monotonic()
    found: dict[str, Any] = {"figures": figures(), "trends": trends(), "grid": grid(), "ratios": ratios()}
    return found | {"seconds": time.monotonic() - began}


def judge(found: dict[str, Any]) -> list[bars.Bar]:
    """The bars."""
    inside = [row["within"] for row in found["figures"]]
    return [
        bars.at_least("share of the paper's figures within 15 %", sum(inside) / len(inside), SHARE_WITHIN),
        *(bars.is_true(row["name"], row["holds"]) for row in found["trends"]),
        bars.at_most("seconds of the reproduction", found["seconds"], 300),
    ]


def number(value: float | None) -> str:
    """Two decimals, or a dash where nothing fits."""
    return "-" if value is None else f"{value:.2f}"


def yes(value: bool) -> str:
    """yes or no."""
    return "yes" if value else "no"


def tables(found: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows)."""
    yield (
        "Stated figures",
        ["figure", "paper", "ours", "error", "within 15 %", *OTHERS],
        [
            [
                row["name"],
                number(row["paper"]),
                number(row["ours"]),
                "-" if row["error"] is None else f"{row['error']:+.0%}",
                yes(row["within"]),
                *(number(value) for value in row["others"].values()),
            ]
            for row in found["figures"]
        ],
    )
    yield (
        "Trends and crossovers",
        ["trend", "ours", *OTHERS],
        [[row["name"], yes(row["holds"]), *map(yes, row["others"].values())] for row in found["trends"]],
    )
    yield (
        "Speed-ups of HeterMoE at every point",
        ["set-up", "model", "length", *COLUMNS.values(), "no Asym-EA", "experts moved"],
        [
            [
                row["setup"],
                row["model"],
                f"{row['kilotokens']}K",
                *(number(row["over"][method]) for method in (*COLUMNS, "no_asym")),
                f"{row['moved']:.1f}",
            ]
            for row in found["grid"]
        ],
    )
    yield (
        "D1 on 4 A40 and some V100, over EP (Ideal)",
        ["V100", "4K", "12K"],
        [[str(row["old"]), *(number(value) for value in row["over_ep_ideal"].values())] for row in found["ratios"]],
    )


def summary(found: dict[str, Any]) -> list[str]:
    """How much agrees, case by case."""
    rows, directions = found["figures"], found["trends"]
    lines = [f"{sum(r['within'] for r in rows)} of {len(rows)} figures lie within 15 %, "]
    lines[0] += f"{sum(r['holds'] for r in directions)} of {len(directions)} trends and crossovers are right."
    for name in OTHERS:
        close, right = sum(r["others_within"][name] for r in rows), sum(r["others"][name] for r in directions)
        lines.append(f"{name}: {close} and {right}.")
    return lines


def markdown(found: dict[str, Any]) -> str:
    """The tables of the page."""
    parts = ["\n".join(f"- {line}" for line in summary(found))]
    for title, header, rows in tables(found):
        lines = [header, ["---"] * len(header), *rows]
        parts.append(f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def rewrite(page: str, text: str) -> str:
    """The page with `text` between its two marks."""
    changed, count = re.subn(
        r"(<!-- tables -->\n).*?(<!-- end of tables -->)", lambda m: m[1] + text + "\n" + m[2], page, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{PAGE}: must have the marks <!-- tables --> and <!-- end of tables --> once")
    return changed


def main() -> None:
    """Measure, print, and rewrite the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--markdown", action="store_true", help=f"rewrite the tables in docs/{PAGE.name}")
    arguments = parser.parse_args()
    found = measure()
    checked = judge(found)
    if arguments.markdown:
        write_atomic(PAGE, rewrite(PAGE.read_text(), markdown(found)))
    if arguments.json:
        print(json.dumps({"bars": checked, "samples": found}))
    else:
        console = Console()
        for title, header, rows in tables(found):
            table = Table(*header, title=title)
            for row in rows:
                table.add_row(*row)
            console.print(table)
        for line in summary(found):
            console.print(line, highlight=False)
    bars.show(checked)


if __name__ == "__main__":
    main()

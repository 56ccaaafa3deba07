"""Run every bench_*.py and reproduce_paper.py, keep the results in runs/bench/, fail if a bar fails or is missing.

Benchmarks whose device is not here are skipped.
"""

import json
import subprocess
import sys
from pathlib import Path

import bars
from hetermoe_cli.spec.files import write_atomic

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Exit 1 unless every bar holds."""
    good = True
    for script in [*sorted(HERE.glob("bench_*.py")), HERE / "reproduce_paper.py"]:
        if script.name == Path(__file__).name:
            continue
        print(f"== {script.name}", file=sys.stderr)
        done = subprocess.run([sys.executable, str(script), "--json"], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode == bars.SKIPPED:
            print(f"skip {script.name}", file=sys.stderr)
            continue
        if done.returncode:
            print(f"FAIL {script.name} exited with {done.returncode}", file=sys.stderr)
            good = False
            continue
        write_atomic(HERE.parent / "runs" / "bench" / f"{script.stem}.json", done.stdout)
        found: list[bars.Bar] = json.loads(done.stdout)["bars"]
        good = good and all(bar["holds"] for bar in found)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

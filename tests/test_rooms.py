"""docs/architecture.md, "Rooms": a file imports from lower floors or its own; in the planner, from earlier rooms."""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src/hetermoe_cli"
FLOORS = (
    {"errors", "spec"},
    {"schedule", "dataflow", "trace"},
    {"cost", "simulator", "turns", "planner"},
    {"model"},
    {"profiler", "runtime"},
    {"launch", "report"},
    {"cli"},
)
PLANNER = (
    "arrays", "solver", "allowed", "instance", "replay", "orders", "bounds", "milp", "search", "pipeline_search",
    "baselines", "reasons", "by_name", "cluster", "pipelines", "rebalancing", "plan", "what_if", "replan",
)  # fmt: skip


def imports(file: Path) -> Iterator[tuple[str, ...]]:
    """Modules of the package that a file imports, anywhere in it, as parts of their names."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hetermoe_cli."):
            for name in node.names:
                yield (*node.module.split(".")[1:], name.name)


def floor(room: str) -> int:
    """On which a room is; one that is new must be given one above."""
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def is_above(there: tuple[str, ...], own: tuple[str, ...]) -> bool:
    """Whether a module is on a higher floor than the file that imports it, or in a later room of the planner."""
    if own[0] == there[0] == "planner" and own[1] != "__init__":
        return PLANNER.index(there[1]) > PLANNER.index(own[1])
    return floor(there[0]) > floor(own[0])


def test_files_import_from_lower_floors_or_their_own() -> None:
    files = {file.relative_to(SOURCE).with_suffix("").parts: file for file in SOURCE.rglob("*.py")}
    found = [(own, there) for own, file in files.items() for there in imports(file) if is_above(there, own)]
    assert not found
    assert len(files) > 200


def test_what_is_above_is_told() -> None:
    assert is_above(("runtime", "engine"), ("model", "gate"))
    assert is_above(("planner", "plan"), ("planner", "search", "outer"))
    assert not is_above(("planner", "search", "outer"), ("planner", "plan"))

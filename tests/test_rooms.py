"""docs/architecture.md, "Rooms": a file imports from lower floors or its own, there from earlier rooms."""

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
ROOMS = {
    "model": ("copies", "seed", "data", "kernels", "layers", "transformer", "optimizer", "weights", "warm_up"),
    "planner": (
        "arrays", "solver", "allowed", "instance", "replay", "orders", "bounds", "milp", "search", "pipeline_search",
        "baselines", "reasons", "by_name", "cluster", "pipelines", "rebalancing", "plan", "what_if", "replan",
    ),
    "runtime": ("machine", "modules", "transfers", "clocks", "step", "run", "worker"),
}  # fmt: skip


def imports(file: Path) -> Iterator[tuple[str, ...]]:
    """Modules of the package that a file imports, anywhere in it, as parts of their names."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hetermoe_cli."):
            for name in node.names:
                yield (*node.module.split(".")[1:], name.name)


def floor(package: str) -> int:
    """On which a package is; one that is new must be given one above."""
    return next(number for number, packages in enumerate(FLOORS) if package in packages)


def is_above(there: tuple[str, ...], own: tuple[str, ...]) -> bool:
    """Whether a module is on a higher floor than the file that imports it, or in a later room of the same package."""
    if own[0] == there[0] and own[0] in ROOMS:
        rooms = ROOMS[own[0]]
        return rooms.index(there[1]) > rooms.index(own[1])
    return floor(there[0]) > floor(own[0])


def test_files_import_from_lower_floors_or_their_own() -> None:
    files = {file.relative_to(SOURCE).with_suffix("").parts: file for file in SOURCE.rglob("*.py")}
    found = [(own, there) for own, file in files.items() for there in imports(file) if is_above(there, own)]
    assert not found
    assert len(files) > 200


def test_rooms_are_those_that_are_there() -> None:
    for package, rooms in ROOMS.items():
        files = (SOURCE / package).rglob("*.py")
        assert {file.relative_to(SOURCE / package).with_suffix("").parts[0] for file in files} == {"__init__", *rooms}


def test_what_is_above_is_told() -> None:
    assert is_above(("runtime", "step", "engine"), ("model", "layers", "gate"))
    assert is_above(("planner", "plan"), ("planner", "search", "outer"))
    assert is_above(("runtime", "step", "trainer"), ("runtime", "modules", "parts"))
    assert not is_above(("planner", "search", "outer"), ("planner", "plan"))

"""Plans that tests compare must not depend on how fast the machine is."""

from collections.abc import Iterator

import pytest

from hetermoe_cli.planner.search import incumbent, outer


@pytest.fixture(autouse=True, scope="module")
def untimed() -> Iterator[None]:
    """Heuristics in other orders run to their end, shaken placements are few; the MILPs there, which get what time is
    left, do not run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outer, "MORE", 0.0)
        patch.setattr(incumbent, "REORDER", 1)
        patch.setattr(incumbent, "SHAKE", 1)
        patch.setattr(incumbent, "AS_LONG", 1e9)
        patch.setattr(incumbent, "CLIMBS", 4)
        yield


@pytest.fixture
def within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds, brute force and MILPs are of: every attending rank attends to all micro-batches, and computes the
    head of what it attends to."""
    monkeypatch.setattr(incumbent, "with_shifts", lambda *_: iter(()))
    monkeypatch.setattr(incumbent, "with_heads", lambda *_: iter(()))

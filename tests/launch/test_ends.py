"""What is reported of a run that ended on several nodes."""

import pytest

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.ends import GONE, End, PeerFailure, end_of, explains, verdict

DONE = End(0)
SAVED = End(130, "interrupted: saved at step 3")
LOST = End(6, "worker of rank 0 died: lost a peer", follows=True)
DIED = End(6, "worker of rank 2 died")


def test_ends_of_errors() -> None:
    assert end_of(None) == DONE
    assert end_of(UserError("no text", ExitCode.BAD_INPUT)) == End(3, "no text")
    assert end_of(PeerFailure("gone", ExitCode.WORKER_DIED)) == End(6, "gone", follows=True)
    assert end_of(KeyboardInterrupt()) == End(130, "interrupted")
    assert end_of(ValueError("odd")) == End(6, "ValueError: odd")


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({0: DONE, 1: DONE}, DONE),
        ({0: SAVED, 1: DONE}, SAVED),
        ({0: SAVED, 1: End(130, "interrupted")}, SAVED),
        ({0: DONE}, DONE),
        ({0: LOST, 1: DIED}, End(6, "node 1: worker of rank 2 died")),
        ({0: SAVED, 1: End(3, "interrupted, and not saved")}, End(3, "node 1: interrupted, and not saved")),
        ({0: LOST, 1: End(130, "interrupted")}, End(130, "interrupted")),
        ({0: LOST}, End(6, f"node 1: {GONE}")),
        ({0: LOST, 1: LOST}, End(6, LOST.line)),
    ],
)
def test_the_failure_that_followed_no_other_is_reported(ends: dict[int, End], expected: End) -> None:
    assert verdict(2, ends) == expected
    assert explains(ends) == (DIED in ends.values() or expected.code == 3)

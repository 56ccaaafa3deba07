"""How a run ended on each of its nodes, and what a launcher says about it."""

from collections.abc import Mapping
from dataclasses import dataclass

from hetermoe_cli.errors import ExitCode, UserError

GONE = "its launcher or its machine is gone"


class PeerFailure(UserError):
    """What ended here did so only because something failed on another node, or another worker did."""


class OtherPlan(UserError):
    """The leader was started with another plan, which this names."""

    def __init__(self, message: str, plan: str, host: str) -> None:
        super().__init__(message)
        self.plan, self.host = plan, host  # and where the leader is


@dataclass(frozen=True)
class End:
    """How a node's part of a run ended: exit code, line for the user, whether it only followed another's failure."""

    code: int
    line: str = ""
    follows: bool = False

    @property
    def failed(self) -> bool:
        """Neither finished nor interrupted."""
        return self.code not in (ExitCode.DONE, ExitCode.INTERRUPTED)


def end_of(error: BaseException | None) -> End:
    """The end of a node whose launcher met `error`."""
    if error is None:
        return End(ExitCode.DONE)
    if isinstance(error, UserError):
        return End(error.code, str(error), isinstance(error, PeerFailure))
    if isinstance(error, KeyboardInterrupt):
        return End(ExitCode.INTERRUPTED, "interrupted")
    return End(ExitCode.WORKER_DIED, f"{type(error).__name__}: {error}")


def explains(ends: Mapping[int, End]) -> bool:
    """Whether one of them is a failure that followed no other."""
    return any(end.failed and not end.follows for end in ends.values())


def verdict(nodes: int, ends: Mapping[int, End], leader: int = 0) -> End:
    """What all nodes report that have no failure of their own, given the ends that the leader knows, its own with them:
    the first failure that followed no other, else who was interrupted, or a node that is gone. Of a run that did not
    fail the leader knows whether it finished, and where it was saved."""
    failed = sorted((end.follows, node) for node, end in ends.items() if end.failed)
    if not failed:
        return ends[leader]
    follows, first = failed[0]
    interrupted = next((end for _, end in sorted(ends.items()) if end.code == ExitCode.INTERRUPTED), None)
    if follows and interrupted:
        return interrupted
    missing = [node for node in range(nodes) if node not in ends]
    if follows and missing:
        return End(ExitCode.WORKER_DIED, f"node {missing[0]}: {GONE}")
    return End(ends[first].code, ends[first].line if follows else f"node {first}: {ends[first].line}")

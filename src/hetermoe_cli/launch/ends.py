"""How a run ended on each of its nodes, and what a launcher says about it."""

from collections.abc import Mapping
from dataclasses import dataclass

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.place import Place

GONE = "its launcher or its machine is gone"


class PeerFailure(UserError):
    """What ended here did so only because something failed on another node, or another worker did."""


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


def reported(place: Place, ends: Mapping[int, End]) -> End:
    """What a launcher reports, given the ends that it has heard of, its own with them: its own failure, else the first
    one that followed no other. Of a run that did not fail node 0 knows whether it finished, and where it was saved."""
    own = ends[place.node]
    if own.failed and not own.follows:
        return own
    failed = {node: end for node, end in ends.items() if end.failed and not end.follows}
    if failed:
        first = min(failed)
        return End(failed[first].code, f"node {first}: {failed[first].line}")
    missing = [node for node in range(place.nodes) if node not in ends]
    if own.failed and missing:
        return End(ExitCode.WORKER_DIED, f"node {missing[0]}: {GONE} ({own.line})")
    if own.failed or place.node == 0:
        return own
    return ends.get(0) or End(ExitCode.WORKER_DIED, f"node 0: {GONE}")

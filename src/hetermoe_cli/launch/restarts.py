"""Begin again after workers have died, or without nodes that are gone: the launcher becomes the command that a user
would type then, so that nothing of the start that failed is left in it."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.arguments import without
from hetermoe_cli.launch.ends import OtherPlan
from hetermoe_cli.launch.local import claimed, trace
from hetermoe_cli.spec.base import sha256
from hetermoe_cli.spec.files import dump
from hetermoe_cli.spec.plan import Plan

_LOCK_SECONDS = 120.0  # for a file system to let go of what a machine had that died: NFS takes 90 s
_TAKES_A_PATH = {"--data", "--weights", "--executed"}
_REPLACED = {"--resume": 0, "--run-folder": 1, "--max-restarts": 1}  # with the number of their values


@dataclass(frozen=True)
class Restarts:
    """Of `--max-restarts` those that are `left`, `--replan-after`, and what a start needs to begin again.

    `replan_after`: seconds that nodes may take to come, or come back, before a plan is made without them; None: the run
    does not go on without them.
    """

    left: int
    replan_after: float | None
    arguments: Sequence[str]  # of this command
    environment: Mapping[str, str]  # as this command found it: a run changes it

    @contextmanager
    def after_deaths(self, plan: Path, folder: Path) -> Iterator[None]:
        """If the block ends with a worker's death or a lost node: the same start from the newest checkpoint, with one
        restart less. Any other error, or one too many, goes on."""
        try:
            yield
        except OtherPlan as error:
            if not self.left:
                raise
            print(f"hetermoe: {error}; goes on by {error.plan}", file=sys.stderr)
            self.with_plan(plan, Path(error.plan), folder, error.host)
        except UserError as error:
            if error.code is not ExitCode.WORKER_DIED or not self.left:
                raise
            print(f"hetermoe: {error}; begins again, restarts left: {self.left - 1}", file=sys.stderr)
            self._become(again(self.arguments, plan, plan, folder, self.left - 1))

    def with_plan(self, old: Path, new: Path, folder: Path, host: str | None = None) -> NoReturn:
        """The same start under another plan, from the newest checkpoint; `host`: the address of its node 0, where that
        is another one."""
        self._become(again(self.arguments, old, new, folder, self.left, host))

    def _become(self, arguments: Sequence[str]) -> NoReturn:
        program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [*program, *arguments], dict(self.environment))


class Replanned(NamedTuple):
    """Where a plan without lost nodes is, and which node, as counted anew before, is its first one."""

    path: str
    first: int


def write_replan(plan: Plan, lost: Sequence[int], folder: Path, check: Callable[[], object]) -> Replanned:
    """Write a plan without the nodes `lost` into the run's folder.

    UserError where nothing fits, the run goes on without this node, or its own `check` finds something.
    """
    from hetermoe_cli.launch.started import started_plan
    from hetermoe_cli.planner.replan import without_nodes

    check()
    before, found = trace(folder), without_nodes(plan, lost)
    path = folder.resolve() / f"replanned-{sha256(found)[:8]}.yaml"  # others may still go by an earlier one
    with claimed(path.parent, _LOCK_SECONDS, before):
        dump(found, path, "Made by `hetermoe train`, as nodes did not come; predictions are simulated.")
    first = started_plan(found).inputs.node_numbers[0]
    return Replanned(str(path), plan.inputs.node_numbers.index(first))


def again(
    arguments: Sequence[str], old: Path, new: Path, folder: Path, left: int, host: str | None = None
) -> list[str]:
    """The arguments of `hetermoe train OLD` as those of a start that goes on in `folder` under the plan `new`; `host`:
    the address of node 0, where that is another one."""
    command, *rest = without(arguments, _REPLACED | ({"--master-addr": 1} if host else {}))
    places = [place for place, argument in enumerate(rest) if Path(argument) == old]
    alone = [place for place in places if place == 0 or rest[place - 1] not in _TAKES_A_PATH]  # not an option's value
    rest[(alone or places)[-1]] = str(new)
    moved = ["--master-addr", host] if host else []
    return [command, "--run-folder", str(folder), "--resume", "--max-restarts", str(left), *moved, *rest]

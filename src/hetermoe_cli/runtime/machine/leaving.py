"""How a worker's process ends before its work is done."""

import os
import sys
import threading
import time
import traceback
from typing import NoReturn

from hetermoe_cli.errors import ExitCode
from hetermoe_cli.runtime.machine.peers import PeerLost
from hetermoe_cli.spec.run import LAUNCHER

_GRACE_SECONDS = 0.5
_PARENT_POLL_SECONDS = 1.0


def leave(message: str, code: int) -> NoReturn:
    """At once: a thread may be blocked in a message."""
    print(message, file=sys.stderr, flush=True)
    os._exit(int(code))


def leave_after(lost: PeerLost) -> NoReturn:
    """Another rank is gone; the launcher is to see first the worker that really failed."""
    if lost.__cause__:
        traceback.print_exception(lost.__cause__)  # which call it was
    time.sleep(_GRACE_SECONDS)
    leave(f"hetermoe: error: {lost}", ExitCode.WORKER_DIED)


def follow_parent() -> None:
    """End when the launcher is gone, however it ended, and be it before this process had looked for it."""
    parent = int(os.environ.get(LAUNCHER, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_SECONDS)
        leave("hetermoe: error: the launcher is gone", ExitCode.WORKER_DIED)

    threading.Thread(target=watch, daemon=True).start()

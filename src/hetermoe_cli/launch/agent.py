"""torch's elastic agent of one node's workers, with an eye on the other nodes until the last worker has ended."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

from hetermoe_cli.errors import UserError
from hetermoe_cli.launch.meeting import FAILURE_SECONDS, Meeting
from hetermoe_cli.launch.rendezvous import StaticRendezvous
from hetermoe_cli.runtime.machine.peers import DISK_TIMEOUT, TIMEOUT

# After Ctrl-C: the step in progress, which a lost peer ends, and the checkpoint, which is lost if its writer is killed.
_SHUTDOWN_SECONDS = int((TIMEOUT + DISK_TIMEOUT).total_seconds())
_EXIT_BARRIER_SECONDS = 0.1  # of torch's agents; the launchers wait for each other themselves
_POLL_SECONDS = 0.5


class Agent(LocalElasticAgent):
    """Its workers are killed when another node or one of them has ended, which they may not notice; `killed`: which
    were."""

    def __init__(self, command: list[str], workers: int, meeting: Meeting, logs: Path) -> None:
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):  # its warnings repeat what is said by launch.local
                logging.getLogger(name).setLevel(logging.CRITICAL)
        self._meeting = meeting
        self.killed: set[int] = set()  # process ids
        python, *arguments = command
        spec = WorkerSpec(
            role="worker",
            local_world_size=workers,
            rdzv_handler=StaticRendezvous(meeting.place, meeting.store, self._watch),
            entrypoint=python,
            args=tuple(arguments),
            max_restarts=0,
        )
        super().__init__(
            spec,
            DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
            exit_barrier_timeout=_EXIT_BARRIER_SECONDS,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )

    def _watch(self) -> None:
        try:
            self._meeting.watch()
        except UserError:
            self._kill()
            raise

    def _kill(self) -> None:
        for worker in self.get_worker_group().workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.id, signal.SIGKILL)
                self.killed.add(worker.id)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Once one has failed, torch's asks the others to end and waits 30 s for them; here they have less. Some do not
        hear it: gloo, which wakes who waits for a message when a peer dies, forgets who has just begun to send it one.
        """
        with self._watched(FAILURE_SECONDS):
            result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """torch's waits for the workers, for hours where they save."""
        with self._watched():
            super()._shutdown(death_sig, timeout)

    @contextlib.contextmanager
    def _watched(self, patience: float = inf) -> Iterator[None]:
        """Around what waits for workers to end, and looks at nothing else meanwhile; once one has, for so many seconds
        in all."""
        over = threading.Event()
        threading.Thread(target=self._watch_until, args=(over, patience), daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _watch_until(self, over: threading.Event, patience: float) -> None:
        began = time.monotonic()
        with contextlib.suppress(UserError):
            while not over.wait(_POLL_SECONDS):
                self._watch()
                if time.monotonic() - began > patience and any(_ended(w.id) for w in self.get_worker_group().workers):
                    self._kill()
                    return


def _ended(process: int) -> bool:
    """Whether a child has ended, reaped or not; it is left to be reaped."""
    try:
        return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True

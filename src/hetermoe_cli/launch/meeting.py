"""Meeting: what the launchers of a run, one a node, tell each other through node 0's store."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from types import TracebackType

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.ends import GONE, End, PeerFailure, end_of, explains, reported
from hetermoe_cli.launch.place import Place
from hetermoe_cli.launch.rendezvous import open_store

_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 600.0  # for others to be started and to have checked everything
_BEAT_SECONDS = 2.0
_SILENCE_SECONDS = 40.0  # without a beat: that launcher or its machine is gone
_FAILURE_SECONDS = 5.0  # for workers here to leave by themselves once those of another node have failed
_END_SECONDS = 60.0  # the same once those of another node have come to their end: files are still written
_HEARD_SECONDS = 10.0
_LATE_SECONDS = 5.0  # the same for nodes that have not come yet


class Meeting:
    """Context manager: the launchers of all nodes, from before their checks to their last word.

    However the block ends, the others are told; it raises what is to be reported, which may be another node's error.
    """

    def __init__(self, place: Place) -> None:
        """Opens the store: node 0 listens, another node waits for it. UserError if it cannot."""
        self.place = place
        self.store: TCPStore = open_store(place)
        self._keys = PrefixStore("launchers", self.store)
        self._watched: dict[int, tuple[int, float]] = {}  # the last beat of a node, and when it was first seen
        self._ended: dict[int, float] = {}  # when a node's end was first seen
        self._next_watch = 0.0
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)

    @property
    def others(self) -> list[int]:
        """The other nodes."""
        return [node for node in range(self.place.nodes) if node != self.place.node]

    def __enter__(self) -> "Meeting":
        if self.others:
            with self._node_0():
                if self._keys.add(f"came/{self.place.node}", 1) > 1:
                    raise UserError(f"node {self.place.node} has been started twice: give every node its --node-rank")
            self._beats.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        own = end_of(error)
        final = self._conclude(own) if self.others else own
        self._over.set()
        if final != own and final.code != ExitCode.DONE:
            raise UserError(final.line, ExitCode(final.code)) from error
        return final.code == ExitCode.DONE  # also where the run was at its end when this node was interrupted

    def gather(self, key: str, value: str = "") -> list[str]:
        """`value` of every node, once all have come here; PeerFailure if one of them has failed, UserError if late."""
        with self._node_0():
            self._keys.set(f"{key}/{self.place.node}", value or "-")
            deadline, keys = time.monotonic() + _PATIENCE_SECONDS, [f"{key}/{n}" for n in range(self.place.nodes)]
            while not self._keys.check(keys):
                self._refuse_ends()
                if time.monotonic() > deadline:
                    late = [str(n) for n, name in enumerate(keys) if not self._keys.check([name])]
                    raise UserError(
                        f"no word from node {', '.join(late)} in {_PATIENCE_SECONDS:.0f} s: run the same command there"
                    )
                time.sleep(_POLL_SECONDS)
            return [self._keys.get(name).decode() for name in keys]

    def watch(self) -> None:
        """While workers run: PeerFailure if they have to end, as another node has come to its end, or is gone."""
        now = time.monotonic()
        if not self.others or now < self._next_watch:
            return
        self._next_watch = now + 5 * _POLL_SECONDS
        with self._node_0():
            for node in self.others:
                if (end := self._end_of(node)) is not None:
                    seen = self._ended.setdefault(node, now)
                    if now - seen > (_FAILURE_SECONDS if end.failed else _END_SECONDS):
                        what = end.line or "it has ended, workers here have not"
                        raise PeerFailure(f"node {node}: {what}", ExitCode(end.code or ExitCode.WORKER_DIED))
                else:
                    self._check_beat(node, now)

    def _check_beat(self, node: int, now: float) -> None:
        beat = self._keys.add(f"beat/{node}", 0)
        last, since = self._watched.get(node, (-1, now))
        self._watched[node] = (beat, now if beat != last else since)
        if now - self._watched[node][1] > _SILENCE_SECONDS:
            raise PeerFailure(f"node {node}: {GONE}", ExitCode.WORKER_DIED)

    def _refuse_ends(self) -> None:
        for node in self.others:
            if (end := self._end_of(node)) is not None:
                raise PeerFailure(f"node {node}: {end.line}", ExitCode(end.code or ExitCode.WORKER_DIED))

    def _end_of(self, node: int) -> End | None:
        if not self._keys.check([f"end/{node}"]):
            return None
        return End(**json.loads(self._keys.get(f"end/{node}").decode()))

    def _conclude(self, own: End) -> End:
        """Tell the others, hear them, and choose what to report: the first failure that followed no other."""
        ends: dict[int, End] = {self.place.node: own}
        with contextlib.suppress(PeerFailure), self._node_0():
            self._keys.set(f"end/{self.place.node}", json.dumps(asdict(own)))
            deadline = time.monotonic() + (2 * _FAILURE_SECONDS if own.failed else _END_SECONDS)
            while not explains(ends) and self._awaited(ends) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
                ends |= {node: end for node in self.others if (end := self._end_of(node)) is not None}
            self._part()
        return reported(self.place, ends)

    def _awaited(self, ends: Mapping[int, End]) -> bool:
        """Whether a node has come and not ended."""
        return any(node not in ends and self._keys.check([f"came/{node}"]) for node in self.others)

    def _part(self) -> None:
        """Node 0, and with it the store, stays until the others have heard."""
        self._keys.set(f"heard/{self.place.node}", "-")
        began = time.monotonic()
        while self.place.node == 0 and (waited := time.monotonic() - began) < _HEARD_SECONDS:
            absent = [node for node in self.others if not self._keys.check([f"heard/{node}"])]
            here = any(self._keys.check([f"came/{node}"]) for node in absent)
            if not absent or (not here and waited > _LATE_SECONDS):
                return
            time.sleep(_POLL_SECONDS)

    def _beat(self) -> None:
        with contextlib.suppress(PeerFailure), self._node_0():
            while not self._over.wait(_BEAT_SECONDS):
                self._keys.add(f"beat/{self.place.node}", 1)

    @contextlib.contextmanager
    def _node_0(self) -> Iterator[None]:
        """Around calls of the store: their failure means that node 0's launcher is gone."""
        try:
            yield
        except RuntimeError as error:
            raise PeerFailure(f"node 0: {GONE}", ExitCode.WORKER_DIED) from error

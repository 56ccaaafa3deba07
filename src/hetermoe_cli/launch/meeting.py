"""Meeting: what the launchers of a run, one a node, tell each other through the leader's store.

The leader is node 0, or the node that has taken its place (succession.py).
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from types import TracebackType

from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.ends import GONE, End, OtherPlan, PeerFailure, end_of, explains, verdict
from hetermoe_cli.launch.interfaces import own_address
from hetermoe_cli.launch.place import Place
from hetermoe_cli.launch.rendezvous import open_store
from hetermoe_cli.launch.succession import Succession

_POLL_SECONDS = 0.1
_WATCH_SECONDS = 0.5
_PATIENCE_SECONDS = 600.0  # for others to be started; what they check may take any time, as long as they beat
_BEAT_SECONDS = 1.0
_SILENCE_SECONDS = 30.0  # without a beat: that launcher is gone, so workers here are ended
_SHORT_SILENCE_SECONDS = 6.0  # the same where there is only an end to wait for
FAILURE_SECONDS = 5.0  # for workers to leave by themselves once one has failed, here or on another node
_END_SECONDS = 20.0  # the same once they have come to a good end: the last files are still written
_VERDICT_SECONDS = 60.0
_HEARD_SECONDS = 10.0
_LATE_SECONDS = 5.0  # for nodes that have not come yet, to hear of a failure
_FOLLOW_SECONDS = 60.0  # for the others to find who has taken node 0's place: all have waited for that one before
_LEAVE_SECONDS = 60.0  # for a meeting that has ended, or must soon: its node was there before, and fell silent


class Meeting:
    """Context manager: the launchers of all nodes, from before their checks to their last word.

    However the block ends, the others are told, and the leader gives the verdict; what is raised may be another node's
    error. Calls of all nodes go to one store, so each asks for few keys. `returns`: a launcher may be started anew and
    find the meeting that it fell out of; after a worker's death it leaves this one for a next one.
    """

    def __init__(
        self, place: Place, plan: str = "", *, returns: bool = False, succession: Succession | None = None
    ) -> None:
        """Opens the store: node 0 listens, another node waits for it, or takes its place as the `succession` says.
        UserError if it cannot. `plan`: the file."""
        self._plan, self._returns = plan, returns
        self.kept = contextlib.ExitStack()  # what this node has until the end
        self.place, self.store = open_store(place, succession)
        self._keys = PrefixStore("launchers", self.store)
        self._heard_of: dict[int, tuple[bytes, float]] = {}  # a node's last beat, and when it was first seen
        self._first_end: float | None = None
        self._next_watch = 0.0
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Meeting":
        if self.place.nodes > 1:
            with self._leader():
                self._check_in()
            self._beats.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        self.kept.close()
        own = end_of(error)
        final = self._conclude(own) if self.place.nodes > 1 else own
        self._over.set()
        if self._returns and final.code == ExitCode.WORKER_DIED:
            self.leave()
        if final != own and final.code != ExitCode.DONE:
            raise UserError(final.line, ExitCode(final.code)) from error
        return final.code == ExitCode.DONE  # also where the run was at its end when this node was interrupted

    def _check_in(self) -> None:
        """UserError if this node has been started already, OtherPlan if its plan has other nodes; those that it meets
        do not hear of it."""
        node, nodes = self.place.node, self.place.nodes
        if self.place.leads:
            self._keys.set("nodes", json.dumps([nodes, self.place.used, self._plan, node, own_address(self.place)]))
        found, used, plan, leader, host = json.loads(self._keys.get("nodes"))  # waits until the leader has said so
        where = f"node {node}: the run at {self.place.host}:{self.place.port} has"
        if found != nodes:
            raise OtherPlan(f"{where} {found} nodes, not {nodes}", plan, host)
        if used and self.place.used and used != list(self.place.used):
            known = f"nodes {_listed(used)} of the cluster file, not {_listed(self.place.used)}"
            raise OtherPlan(f"{where} {known}", plan, host)
        self.place = replace(self.place, leader=leader)  # at node 0's address, where nodes share one
        self._keys.set(self._own("address"), own_address(self.place))
        if self._keys.add(self._own("came"), 1) > 1:
            if self._returns and self.leave():
                raise self._gone()
            raise UserError(f"node {node} has been started twice: give every node its --node-rank")

    def leave(self) -> bool:
        """Wait until the leader has closed this meeting, so that the next one is not taken for it; whether it has."""
        deadline = time.monotonic() + _LEAVE_SECONDS
        try:
            while not self.place.leads and time.monotonic() < deadline:
                self._keys.check(["nodes"])
                time.sleep(_POLL_SECONDS)
        except RuntimeError:
            return True
        return False

    def absent(self, seconds: float | None) -> list[int]:
        """The nodes that have not come within `seconds`, as the leader has seen it; none where it waits for all (None).
        This one may be among them."""
        found: list[int] = json.loads(
            self.word("absent", lambda: json.dumps([] if seconds is None else self._late(seconds)))
        )
        return found

    def word(self, key: str, say: Callable[[], str]) -> str:
        """What the leader says, to those that have come; PeerFailure if it has ended or is gone before."""
        if self.place.leads:
            text = say()
            with self._leader():
                self._keys.set(key, text)
            return text
        with self._leader():
            while True:
                ended = self._ended()  # looked up first: who ends between two looks may have said it by the second
                if self._keys.check([key]):
                    return str(self._keys.get(key).decode())
                if ended is not None:
                    raise ended[1]
                time.sleep(_POLL_SECONDS)

    def _late(self, seconds: float) -> list[int]:
        deadline = time.monotonic() + (min(seconds, _FOLLOW_SECONDS) if self.place.leader else seconds)
        with self._leader():
            while len(came := self._came()) < self.place.nodes - 1 and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        return [node for node in self.place.led if node not in came]

    def addresses(self) -> dict[int, str]:
        """Where the leader and those that have come are reached, by node; for the leader to ask."""
        with self._leader():
            there = sorted([self.place.leader, *self._came()])
            told = self._keys.multi_get([f"address/{node}" for node in there])
        return {node: address.decode() for node, address in zip(there, told, strict=True)}

    def gather(self, key: str, value: str = "-") -> str:
        """The leader's `value`, once all have come here: after hours where it reads through a large checkpoint.

        PeerFailure if a node has ended or is gone, UserError if one is not started in time.
        """
        with self._leader():
            self._keys.set(self._own(key), value)
            names, deadline = self._of_all(key), time.monotonic() + _PATIENCE_SECONDS
            while True:
                ended = self._ended()  # looked up first: who ends between two looks may have passed here by the second
                if self._keys.check(names):
                    return str(self._keys.get(names[self.place.leader]).decode())
                if ended is not None:
                    raise ended[1]
                self._refuse_silent()
                if time.monotonic() > deadline:
                    self._refuse_absent()
                time.sleep(_POLL_SECONDS)

    def watch(self) -> None:
        """While workers run: PeerFailure if they have to be ended, as another node has ended or is gone."""
        now = time.monotonic()
        if self.place.nodes == 1 or now < self._next_watch:
            return
        self._next_watch = now + _WATCH_SECONDS
        with self._leader():
            if (ended := self._ended()) is not None:
                failed, error = ended
                self._first_end = self._first_end or now
                if now - self._first_end > (FAILURE_SECONDS if failed else _END_SECONDS):
                    raise error
            self._refuse_silent()

    def _refuse_silent(self) -> None:
        """The leader looks after all; its own end the others see by the store."""
        if self.place.leads and (silent := self._silent(_SILENCE_SECONDS)):
            raise PeerFailure(f"node {silent[0]}: {GONE}", ExitCode.WORKER_DIED)

    def _refuse_absent(self) -> None:
        """UserError if a node has not been started. Those that came are at work, or the leader finds them silent;
        without it there is no store."""
        came = self._came()
        if absent := [str(node) for node in self.place.led if node not in came]:
            raise UserError(
                f"no word from node {', '.join(absent)} in {_PATIENCE_SECONDS:.0f} s: run the same command there",
                ExitCode.WORKER_DIED if self._returns else ExitCode.BAD_INPUT,
            )

    def _ended(self) -> tuple[bool, PeerFailure] | None:
        """Whether a node that has ended has failed, and what that means for this one; None if all go on."""
        key = next((key for key in ("failed", "done") if self._keys.check([key])), None)
        if key is None:
            return None
        node, end = json.loads(self._keys.get(key).decode())
        line = end["line"] or "it has ended"
        return key == "failed", PeerFailure(f"node {node}: {line}", ExitCode(end["code"] or ExitCode.WORKER_DIED))

    def _conclude(self, own: End) -> End:
        """Tell the others; what this node reports: a failure of its own, else the verdict."""
        mine, found = own.failed and not own.follows, End(ExitCode.WORKER_DIED, str(self._gone()))
        with contextlib.suppress(PeerFailure), self._leader():
            told = json.dumps([self.place.node, asdict(own)])
            self._keys.set(self._own("end"), told)
            self._keys.set("failed" if own.failed else "done", told)
            if self.place.leads:
                found = verdict(self.place.nodes, self._all_ends(own), self.place.leader)
                self._keys.set("verdict", json.dumps(asdict(found)))
                self._see_off(_LATE_SECONDS if own.failed else 0)
            elif not mine:
                deadline = time.monotonic() + _VERDICT_SECONDS
                while not self._keys.check(["verdict"]) and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
                if self._keys.check(["verdict"]):
                    found = End(**json.loads(self._keys.get("verdict").decode()))
            self._keys.set(self._own("heard"), "-")
        return own if mine else found

    def _all_ends(self, own: End) -> dict[int, End]:
        """The leader's own end and those of others that came and are not gone, or fewer if one explains a failure."""
        ends, patience = {self.place.leader: own}, 2 * FAILURE_SECONDS if own.failed else _END_SECONDS
        deadline = time.monotonic() + patience
        while True:
            came = self._came()
            for node in came:
                if node not in ends and self._keys.check([f"end/{node}"]):
                    ends[node] = End(**json.loads(self._keys.get(f"end/{node}").decode())[1])
            there = set(came) - set(ends) - set(self._silent(_SHORT_SILENCE_SECONDS))
            if explains(ends) or not there or time.monotonic() > deadline:
                return ends
            time.sleep(_POLL_SECONDS)

    def _see_off(self, late_seconds: float) -> None:
        """The leader, and with it the store, stays until the others have heard; for those to come `late_seconds`."""
        began = time.monotonic()
        while (waited := time.monotonic() - began) < _HEARD_SECONDS:
            came, silent = self._came(), self._silent(_SHORT_SILENCE_SECONDS)
            here = [node for node in came if node not in silent and not self._keys.check([f"heard/{node}"])]
            if not here and (len(came) == self.place.nodes - 1 or waited >= late_seconds):
                return
            time.sleep(_POLL_SECONDS)

    def _came(self) -> list[int]:
        """The other nodes that have been started."""
        return [node for node in self.place.led if self._keys.check([f"came/{node}"])]

    def _silent(self, seconds: float) -> list[int]:
        """Other nodes that came and have not beaten for so long, as far as this one, the leader, has looked."""
        now, silent = time.monotonic(), []
        came = self._came()
        beats = self._keys.multi_get([f"came/{node}" for node in came]) if came else []
        for node, beat in zip(came, beats, strict=True):
            last, since = self._heard_of.get(node, (b"", now))
            self._heard_of[node] = (beat, since if beat == last else now)
            if now - self._heard_of[node][1] > seconds:
                silent.append(node)
        return silent

    def _beat(self) -> None:
        """A beat counts a node's `came` up."""
        with contextlib.suppress(PeerFailure), self._leader():
            while not self._over.wait(_BEAT_SECONDS):
                self._keys.add(self._own("came"), 1)

    def _own(self, key: str) -> str:
        return f"{key}/{self.place.node}"

    def _of_all(self, key: str) -> list[str]:
        return [f"{key}/{node}" for node in range(self.place.nodes)]

    @contextlib.contextmanager
    def _leader(self) -> Iterator[None]:
        """Around calls of the store: their failure means that the leader's launcher is gone."""
        try:
            yield
        except RuntimeError as error:
            raise self._gone() from error

    def _gone(self) -> PeerFailure:
        return PeerFailure(f"node {self.place.leader}: {GONE}", ExitCode.WORKER_DIED)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))

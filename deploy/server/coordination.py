"""How several workers switch together: pure decisions, no processes, no clock.

    supervisor            every worker
    load N         ──►    loads and warms N beside the live version
                   ◄──    loaded N | failed N
    close N        ──►    gives no more answer of the version before N
                   ◄──    closed N                    (all of them: nobody can answer from before N)
    flip N         ──►    answers from N

N is an epoch, not a version: it only grows, also when a roll-back makes an earlier version live. So no
answer of an epoch is given after one of a later epoch, whoever gave it. A worker that dies is waited for
no longer: it cannot answer. One that cannot load what another could is told to leave, which it does
after its last answer and before the others flip. If nobody can load it, the epoch is dropped and all go
on as they were.
"""

from dataclasses import dataclass, field
from typing import Literal

Verb = Literal["load", "close", "flip", "drop", "leave"]


@dataclass(frozen=True)
class Order:
    """What one worker is told; ``epoch`` is what it is about."""

    worker: int
    verb: Verb
    epoch: int


@dataclass
class _Worker:
    """``serving``: it may answer, from epoch ``live`` or not at all while closed."""

    live: int | None = None
    loaded: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    has_closed: int | None = None
    is_leaving: bool = False

    @property
    def is_serving(self) -> bool:
        return self.live is not None


class Coordination:
    """Who has loaded what, and what follows; every method returns the orders to send."""

    def __init__(self) -> None:
        self.agreed: int | None = None  # the epoch that answers
        self.proposed: int | None = None  # the epoch that is being brought in
        self.dropped: set[int] = set()  # the last one: earlier ones only those know of who are leaving
        self.is_closing = False  # answers from before `proposed` are being held
        self._workers: dict[int, _Worker] = {}

    def add(self, worker: int) -> list[Order]:
        """A worker has started; it loads what is agreed and what is on its way."""
        self._workers[worker] = _Worker()
        wanted = [epoch for epoch in (self.agreed, self.proposed) if epoch is not None]
        return [Order(worker, "load", epoch) for epoch in wanted]

    def propose(self, epoch: int) -> list[Order]:
        """Bring in another version, under a new epoch; one at a time."""
        if self.proposed is not None or (self.agreed is not None and epoch <= self.agreed):
            raise ValueError(f"epoch {epoch} cannot follow {self.agreed} while {self.proposed} is on its way")
        self.proposed = epoch
        return [Order(worker, "load", epoch) for worker in self._staying()]

    def loaded(self, worker: int, epoch: int) -> list[Order]:
        """A worker is ready to answer from an epoch."""
        if worker not in self._workers:
            return []
        if epoch in self.dropped:
            return [Order(worker, "drop", epoch)]
        self._workers[worker].loaded.add(epoch)
        return self._next()

    def failed(self, worker: int, epoch: int) -> list[Order]:
        """A worker cannot load an epoch."""
        if worker not in self._workers or epoch in self.dropped:
            return []
        state = self._workers[worker]
        state.failed.add(epoch)
        if epoch == self.agreed and not state.is_serving:
            return self._send_away(worker)  # a fresh one may have more luck
        return self._next()

    def closed(self, worker: int, epoch: int) -> list[Order]:
        """A worker gives no more answers from before an epoch."""
        if worker in self._workers:
            self._workers[worker].has_closed = epoch
        return self._next()

    def died(self, worker: int) -> list[Order]:
        """A worker's process has ended, or never came up."""
        self._workers.pop(worker, None)
        return self._next()

    def awaited(self) -> list[int]:
        """Return the workers that the proposed epoch waits for."""
        if self.proposed is None:
            return []
        if self.is_closing:
            return [w for w, s in self._workers.items() if s.is_serving and s.has_closed != self.proposed]
        known = {w for w, s in self._workers.items() if self.proposed in s.loaded | s.failed}
        return [w for w, s in self._workers.items() if s.is_leaving or (s.is_serving and w not in known)]

    @property
    def has_leaving(self) -> bool:
        """Whether a worker was sent away that may be giving its last answers still."""
        return any(state.is_leaving for state in self._workers.values())

    def _next(self) -> list[Order]:
        """Go on as far as the reports allow."""
        orders = self._advance() if self.proposed is not None else []
        return orders + self._welcome()

    def _advance(self) -> list[Order]:
        epoch = self.proposed
        if epoch is None:
            return []
        if self.is_closing:
            return [] if self.awaited() else self._flip(epoch)
        undecided = [w for w in self._staying() if epoch not in self._state(w).loaded | self._state(w).failed]
        able = [w for w in self._staying() if epoch in self._state(w).loaded]
        if any(self._state(w).is_serving for w in undecided) or (undecided and not able):
            return []
        if not able:
            return self._drop(epoch)
        unable = [w for w in self._staying() if epoch in self._state(w).failed]
        orders = [order for worker in unable for order in self._send_away(worker)]
        if self.has_leaving:
            return orders  # they may be answering still
        self.is_closing = True
        serving = [w for w in able if self._state(w).is_serving]
        orders += [Order(worker, "close", epoch) for worker in serving]
        return orders if serving else orders + self._flip(epoch)

    def _flip(self, epoch: int) -> list[Order]:
        self.agreed, self.proposed, self.is_closing = epoch, None, False
        for state in self._workers.values():  # nobody asks about earlier ones any more
            state.loaded = {each for each in state.loaded if each >= epoch}
            state.failed = {each for each in state.failed if each >= epoch}
        return []  # _welcome tells everybody who has it

    def _drop(self, epoch: int) -> list[Order]:
        self.proposed, self.dropped = None, {epoch}
        for state in self._workers.values():
            state.failed.discard(epoch)
        return []

    def _welcome(self) -> list[Order]:
        """Let those answer from what is agreed who have loaded it, and those leave who cannot."""
        if self.agreed is None or self.is_closing:
            return []
        orders = []
        for worker in self._staying():
            state = self._state(worker)
            if state.live == self.agreed:
                continue
            if self.agreed in state.loaded:
                state.live = self.agreed
                orders.append(Order(worker, "flip", self.agreed))
            elif self.agreed in state.failed:  # it was not waited for, and cannot follow
                orders += self._send_away(worker)
        return orders

    def _send_away(self, worker: int) -> list[Order]:
        self._state(worker).is_leaving = True
        return [Order(worker, "leave", self.proposed or self.agreed or 0)]

    def _staying(self) -> list[int]:
        return [worker for worker, state in self._workers.items() if not state.is_leaving]

    def _state(self, worker: int) -> _Worker:
        return self._workers[worker]

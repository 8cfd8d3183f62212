"""Workers switch together: the promise is kept under every order of messages, failures and deaths."""

from collections import deque

import hypothesis.strategies as st
from hypothesis import given, settings

from deploy.server.coordination import Coordination, Order


class Fleet:
    """Workers that do as they are told, one message at a time, in any order between workers."""

    def __init__(self, workers: int) -> None:
        self.coordination = Coordination()
        self.orders: dict[int, deque[Order]] = {}
        self.reports: dict[int, deque[tuple[str, int]]] = {}
        self.answers_from: dict[int, int | None] = {}  # None: gives no answer
        self.loaded: dict[int, set[int]] = {}
        self.newest_answer = 0
        self.count = 0
        for _ in range(workers):
            self.start()

    def start(self) -> None:
        """Start one more worker."""
        self.count += 1
        worker = self.count
        self.orders[worker], self.reports[worker] = deque(), deque()
        self.answers_from[worker], self.loaded[worker] = None, set()
        self.send(self.coordination.add(worker))

    def send(self, orders: list[Order]) -> None:
        """Put orders on their way."""
        for order in orders:
            if order.worker in self.orders:
                self.orders[order.worker].append(order)

    def obey(self, worker: int, *, can_load: bool) -> None:
        """One worker carries out its next order."""
        order = self.orders[worker].popleft()
        if order.verb == "load":
            if can_load:
                self.loaded[worker].add(order.epoch)
            self.reports[worker].append(("loaded" if can_load else "failed", order.epoch))
        elif order.verb == "close":
            self.answers_from[worker] = None
            self.reports[worker].append(("closed", order.epoch))
        elif order.verb == "flip":
            assert order.epoch in self.loaded[worker], "told to answer from what it has not loaded"
            self.answers_from[worker] = order.epoch
        elif order.verb == "leave":
            self.end(worker)

    def hear(self, worker: int) -> None:
        """The supervisor reads one worker's next report."""
        event, epoch = self.reports[worker].popleft()
        self.send(getattr(self.coordination, event)(worker, epoch))

    def end(self, worker: int) -> None:
        """A worker ends, and its last words are lost."""
        del self.orders[worker], self.reports[worker], self.answers_from[worker]
        self.send(self.coordination.died(worker))

    def answer(self, worker: int) -> None:
        """A client asks one worker."""
        epoch = self.answers_from[worker]
        if epoch is not None:
            assert epoch >= self.newest_answer, f"{epoch} after {self.newest_answer}"
            self.newest_answer = epoch

    def settle(self) -> None:
        """Deliver everything; all that is loaded now succeeds."""
        while busy := [w for w in self.orders if self.orders[w] or self.reports[w]]:
            for worker in busy:
                if self.orders.get(worker):
                    self.obey(worker, can_load=True)
                if self.reports.get(worker):
                    self.hear(worker)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["obey", "obey", "hear", "hear", "answer", "answer", "fail", "end", "start", "propose"]
        ),
        st.integers(0, 7),
    ),
    max_size=120,
)


@settings(max_examples=400, deadline=None)
@given(workers=st.integers(1, 4), steps=STEPS)
def test_no_answer_is_older_than_one_already_given(workers: int, steps: list[tuple[str, int]]) -> None:
    """And once all messages are delivered, whoever is left answers from the agreed epoch."""
    fleet = Fleet(workers)
    epoch = 1
    fleet.send(fleet.coordination.propose(epoch))
    for step, choice in steps:
        alive = sorted(fleet.orders)
        if step == "start" and len(alive) < 5:
            fleet.start()
        elif step == "propose" and fleet.coordination.proposed is None and fleet.coordination.agreed:
            epoch += 1
            fleet.send(fleet.coordination.propose(epoch))
        if not alive or step in ("start", "propose"):
            continue
        worker = alive[choice % len(alive)]
        if step in ("obey", "fail") and fleet.orders[worker]:
            fleet.obey(worker, can_load=step == "obey")
        elif step == "hear" and fleet.reports[worker]:
            fleet.hear(worker)
        elif step == "answer":
            fleet.answer(worker)
        elif step == "end":
            fleet.end(worker)
    fleet.settle()
    for worker in list(fleet.orders):
        fleet.answer(worker)

    coordination = fleet.coordination
    if fleet.orders:
        assert coordination.proposed is None, "the switch never came to an end"
        assert set(fleet.answers_from.values()) == {coordination.agreed}


def test_nobody_answers_anew_before_all_have_closed() -> None:
    """One worker that is slow to close holds the switch up, and nothing else."""
    fleet = Fleet(2)
    fleet.send(fleet.coordination.propose(1))
    fleet.settle()
    fleet.send(fleet.coordination.propose(2))
    for worker in (1, 2):
        fleet.obey(worker, can_load=True)
        fleet.hear(worker)
    fleet.obey(1, can_load=True)  # closes
    fleet.hear(1)

    assert fleet.coordination.awaited() == [2]
    assert fleet.answers_from == {1: None, 2: 1}
    fleet.end(2)  # killed for being slow
    fleet.settle()
    assert fleet.answers_from == {1: 2}


def test_an_epoch_that_nobody_can_load_is_dropped() -> None:
    """All go on from the one before."""
    fleet = Fleet(2)
    fleet.send(fleet.coordination.propose(1))
    fleet.settle()
    fleet.send(fleet.coordination.propose(2))
    for worker in (1, 2):
        fleet.obey(worker, can_load=False)
        fleet.hear(worker)

    assert (fleet.coordination.agreed, fleet.coordination.proposed) == (1, None)
    assert fleet.coordination.dropped == {2}
    assert fleet.answers_from == {1: 1, 2: 1}


def test_a_worker_that_cannot_load_what_others_can_leaves_first() -> None:
    """It is gone before anybody answers from the new epoch."""
    fleet = Fleet(2)
    fleet.send(fleet.coordination.propose(1))
    fleet.settle()
    fleet.send(fleet.coordination.propose(2))
    fleet.obey(1, can_load=False)
    fleet.obey(2, can_load=True)
    fleet.hear(1)
    fleet.hear(2)

    assert [order.verb for order in fleet.orders[1]] == ["leave"]
    assert not fleet.orders[2], "the other one goes on answering from epoch 1 meanwhile"
    fleet.settle()
    assert fleet.answers_from == {2: 2}

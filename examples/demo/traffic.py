"""A client that asks all the time, and what it saw: answers, failures, versions, gaps.

Knows the client and nothing of inboxes or learning. The figures are computed from the list of
requests by plain functions.
"""

import itertools
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from deploy.client import Client

PAUSE_SECONDS = 0.03  # between two requests: busy, and yet the learner gets its cores
SETTLE_SECONDS = 1.0  # a swap is over this long after its version's first answer


class Request(NamedTuple):
    """One question to the client. Times are in seconds of the monotonic clock."""

    sent: float
    finished: float
    published: int  # the version that `current` named when the request was sent
    answered: int | None  # the version that answered; None if the request failed
    error: str | None = None


class Swap(NamedTuple):
    """What happened while one version replaced another."""

    version: int
    pickup_seconds: float  # from `current` naming the version to its first answer
    requests: int
    longest_gap_seconds: float  # without a finished request


class Traffic(threading.Thread):
    """Classifies one image after the other until stopped.

    Args:
        client: what is asked.
        serving: the store it follows.
        images: <domain>/<class>/*.jpg; the class names are what it may answer, known to the model or not.
    """

    def __init__(self, client: Client, serving: Path, images: Path) -> None:
        super().__init__(name="traffic", daemon=True)
        self._client = client
        self._current = serving / "current"
        self._images = sorted(images.glob("*/*/*.jpg"))
        self._labels = sorted({path.parent.name for path in self._images})
        self._stopping = threading.Event()
        self.requests: list[Request] = []

    def run(self) -> None:
        """Ask; a failure is recorded and the next image asked about."""
        for image in itertools.cycle(self._images):
            if self._stopping.wait(PAUSE_SECONDS):
                return
            published = int(self._current.readlink().name)
            sent = time.monotonic()
            answered, error = None, None
            try:
                answered = self._client.classify([image], self._labels, top=1)[0].version
            except Exception as problem:  # noqa: BLE001 - every failure, whatever it is, is a finding
                error = f"{type(problem).__name__}: {problem}"
            self.requests.append(Request(sent, time.monotonic(), published, answered, error))

    def stop(self) -> None:
        """Finish the request at hand and end."""
        self._stopping.set()
        self.join()


def swaps(requests: Sequence[Request]) -> list[Swap]:
    """One entry for every version that answered after another one did, in the order of first answers.

    A swap lasts from the moment the version was published, as far as the requests can tell, until
    SETTLE_SECONDS after its first answer. A gap counts if any part of it lies in that time.
    """
    first_answers: dict[int, Request] = {}
    for request in requests:
        if request.answered is not None:
            first_answers.setdefault(request.answered, request)
    return [_swap(requests, first) for first in list(first_answers.values())[1:]]


def _swap(requests: Sequence[Request], first: Request) -> Swap:
    assert first.answered is not None
    start = min((r.sent for r in requests if r.published == first.answered), default=first.sent)
    start = min(start, first.sent)
    end = first.finished + SETTLE_SECONDS
    served = [request for request in requests if request.answered is not None]
    gaps = [
        after.finished - before.finished
        for before, after in itertools.pairwise(served)
        if after.finished >= start and before.finished <= end
    ]
    return Swap(
        version=first.answered,
        pickup_seconds=first.finished - start,
        requests=sum(start <= request.finished <= end for request in served),
        longest_gap_seconds=max(gaps, default=end - start),
    )

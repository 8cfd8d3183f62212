"""Since when the oldest drop waits that is not learnt yet: the figure that says whether learning keeps up.

A drop waits from the moment it lies in the inbox until it is published, held or failed.
"""

from collections.abc import Iterable
from datetime import datetime

from daemon.errors import BatchError
from daemon.inbox import Item
from daemon.spool import CLAIM_FILE, Spool


class Waits:
    """Looks at the spool of one home; a batch's record is read once."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._received: dict[str, float] = {}  # batch id → seconds since the epoch

    def oldest_at(self, items: Iterable[Item] = ()) -> float | None:
        """Seconds since the epoch; None where nothing waits.

        Args:
            items: what lies in the inbox; empty folders do not count.
        """
        # The first of each state came first: numbers are given in order of arrival.
        waiting = [*self._spool.ids("work")[:1], *self._spool.ids("queued")[:1]]
        received = {name: self._received_at(name) for name in waiting}
        # What could not be read now may be readable the next time: only what is known is remembered.
        self._received = {name: moment for name, moment in received.items() if moment}
        moments = list(self._received.values())
        moments += [item.arrived_ns / 1e9 for item in items if item.kind != "empty"]
        moments += [self._claimed_at(name) for name in self._spool.ids("incoming")]
        return min((moment for moment in moments if moment), default=None)

    def _received_at(self, batch_id: str) -> float:
        """When a batch was taken in; 0 where its record cannot be read, which the lifecycle tells."""
        if (known := self._received.get(batch_id)) is not None:
            return known
        try:
            return datetime.fromisoformat(self._spool.load(batch_id).received_at).timestamp()
        except (BatchError, OSError, ValueError):
            return 0.0

    def _claimed_at(self, batch_id: str) -> float:
        try:
            return (self._spool.state_dir("incoming") / batch_id / CLAIM_FILE).stat().st_mtime
        except OSError:
            return 0.0

"""One part of the daemon's work: its trouble is told once, tried again later, and stops no other part.

Knows nothing of what the part does. The clock comes from outside.
"""

import logging
from collections.abc import Callable
from typing import Any

from daemon import logs
from daemon.errors import DaemonError
from deploy.errors import DeployError

TROUBLE_SECONDS = 10.0  # how long to leave a full or broken disk alone before the next try
TROUBLE_SECONDS_AT_MOST = 320.0  # the wait doubles up to this while the same trouble comes back


class Part:
    """Work that is called again and again, and rests after trouble.

    Args:
        explain: makes a sentence of an error.
        about: fields for the log line that tells of trouble.
        at_most_seconds: the longest rest.

    Attributes:
        trouble: why this part does not go on at the moment, in a sentence; None when all is well.
    """

    def __init__(
        self,
        explain: Callable[[Exception], str] = str,
        about: Callable[[], dict[str, Any]] = dict,
        *,
        at_most_seconds: float = TROUBLE_SECONDS_AT_MOST,
    ) -> None:
        self._explain, self._about, self._at_most_seconds = explain, about, at_most_seconds
        self._rests_until = 0.0
        self._rest_seconds = TROUBLE_SECONDS
        self._last: str | None = None  # kept when the trouble seems over, until something else happens
        self.trouble: str | None = None

    def attempt(self, work: Callable[[], object], now: float) -> bool:
        """Do the work, unless it rests; says whether the work said so. An error makes it rest.

        Trouble with the disk or the home is expected; nothing is lost by it. Other errors pass.
        """
        if self._rests_until - self._rest_seconds <= now < self._rests_until:  # else the clock was set back
            return False
        try:
            result = work()
        except (OSError, DaemonError, DeployError) as error:
            self.rest(error, now)
            return False
        self.trouble = None
        return bool(result)

    def rest(self, error: Exception, now: float) -> None:
        """Leave the work alone for a while: twice as long each time the same trouble comes back."""
        why = self._explain(error)
        if why == self._last:
            self._rest_seconds = min(2 * self._rest_seconds, self._at_most_seconds)
        else:
            self._rest_seconds = TROUBLE_SECONDS
            wait = self._rest_seconds
            logs.log("trouble", level=logging.ERROR, **self._about(), why=why, next_try_seconds=wait)
        self._rests_until = now + self._rest_seconds
        self.trouble = self._last = why

    def wake(self) -> None:
        """What was in the way may be out of it: the next attempt is made at once."""
        self._rests_until = 0.0

    def forget(self) -> None:
        """Something else happened: the same trouble is told anew."""
        self._last = None

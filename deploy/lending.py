"""A loaded version that is lent to requests, and closed when the last one has given it back.

Each version counts its own requests under its own lock, so that bringing in the next version needs none: it
is one assignment, however busy the callers are and whichever of them the machine has put to sleep.
"""

import threading

from deploy.runtime import LoadedVersion
from deploy.target import Target


class LentVersion:
    """A loaded version and how many requests are using it.

    Attributes:
        loaded: usable from a `borrow` that returned True until the `give_back` that belongs to it.
        target: where it was loaded from.
    """

    def __init__(self, loaded: LoadedVersion, target: Target) -> None:
        self.loaded, self.target = loaded, target
        self._users = 0
        self._is_over = False  # nobody may borrow it any more
        self._idle = threading.Condition()  # guards both

    def borrow(self) -> bool:
        """Count one more user; False where it came too late and the version is being closed."""
        with self._idle:
            if not self._is_over:
                self._users += 1
            return not self._is_over

    def give_back(self) -> bool:
        """Count one user less; return whether that was the last one."""
        with self._idle:
            self._users -= 1
            assert self._users >= 0, self._users
            if self._users == 0:
                self._idle.notify_all()
            return self._users == 0

    def close_if_idle(self) -> bool:
        """Close it unless somebody uses it; return whether it is closed now."""
        with self._idle:
            if self._users:
                return False
            self._is_over = True
        self.loaded.close()
        return True

    def close_when_idle(self) -> None:
        """Wait for its users, then close it."""
        with self._idle:
            self._idle.wait_for(lambda: self._users == 0)
            self._is_over = True
        self.loaded.close()

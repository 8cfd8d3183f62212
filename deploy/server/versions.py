"""The version that answers, the one before it, and the rule that no answer goes back in time.

    live      answers every request that names no version
    previous  still loaded; answers the requests that name it
    closed    for a moment while several workers switch together: answers are held, none is given, and
              nothing is said of versions

All methods run on the event loop's thread, so a version is never half switched.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from deploy.runtime import LoadedVersion
from deploy.server.problems import Problem

Result = TypeVar("Result")


@dataclass(eq=False)
class Slot:
    """A loaded version, how to let go of it, and how many requests are using it."""

    loaded: LoadedVersion
    release: Callable[[], None]
    users: int = 0
    is_retired: bool = False

    @property
    def version(self) -> int:
        """The version's number."""
        return self.loaded.version


class Versions:
    """Lends the loaded versions to requests; frees one off the event loop once nobody uses it."""

    def __init__(self) -> None:
        self._live: Slot | None = None
        self._previous: Slot | None = None
        self._open = asyncio.Event()
        self._flipped = asyncio.Event()  # set at the next flip, and replaced by another
        self._releases: set[asyncio.Future[None]] = set()

    @property
    def live(self) -> Slot:
        """The version that answers.

        Raises:
            Problem: none is loaded yet.
        """
        if self._live is None:
            raise Problem(503, "no version is loaded yet; try again in a moment")
        return self._live

    @property
    def loaded(self) -> list[Slot]:
        """The live version and then the previous one, as far as they are there."""
        return [slot for slot in (self._live, self._previous) if slot is not None]

    @property
    def is_open(self) -> bool:
        """Tell whether answers are given: a version is live and no switch is going on."""
        return self._open.is_set()

    def close(self) -> None:
        """Give no answer of the live version from now on, until ``flip``."""
        self._open.clear()

    async def until_open(self) -> None:
        """Wait while a switch goes on: another worker may have answered from the next version already."""
        while self._live is not None and not self._open.is_set():
            await self._open.wait()

    def flip(self, slot: Slot) -> None:
        """Make another version live, keep the old one for requests that name it, retire the one before."""
        retired, self._previous, self._live = self._previous, self._live, slot
        self._retire(retired)
        self._open.set()
        self.wake()

    async def until_flip(self) -> None:
        """Wait until another version is live, or ``wake`` is called."""
        await self._flipped.wait()

    def wake(self) -> None:
        """End all waiting for a flip."""
        self._flipped.set()
        self._flipped = asyncio.Event()

    def keep_previous(self, slot: Slot) -> None:
        """Take over a previous version that others serve already."""
        retired, self._previous = self._previous, slot
        self._retire(retired)

    async def named(self, version: int | None) -> Slot:
        """Return the slot of a version that a request names; None names the live one.

        Raises:
            Problem: it is not loaded, and a switch that is going on has not brought it.
        """
        if version is None:
            return self.live
        if version not in [slot.version for slot in self.loaded]:
            await self.until_open()
        for slot in self.loaded:
            if slot.version == version:
                return slot
        there = ", ".join(str(slot.version) for slot in self.loaded)
        raise Problem(404, f"version {version} is not loaded here; there are: {there}")

    async def answer(
        self, compute: Callable[[Slot], Awaitable[Result]], version: int | None = None
    ) -> tuple[int, Result]:
        """Return the version that answers and what it computed.

        A named version answers, or nothing does. Without a name, a result that a switch has overtaken is
        thrown away and computed again: a version is only told while it is the live one. The caller must
        send the answer without waiting for anything in between, so that this stays true.

        Raises:
            Problem: the named version is not loaded, or none is.
        """
        if version is not None:
            slot = self._take(await self.named(version))
            try:
                return version, await compute(slot)
            finally:
                self._give_back(slot)
        while True:
            if not self._open.is_set():
                await self._open.wait()
            slot = self._take(self.live)
            try:
                result = await compute(slot)
                if not self._open.is_set():
                    await self._open.wait()
                if slot is self._live:
                    return slot.version, result
            finally:
                self._give_back(slot)

    async def shut(self) -> None:
        """Let go of everything; no request may be running."""
        slots, self._live, self._previous = self.loaded, None, None
        self._open.clear()
        for slot in slots:
            self._retire(slot)
        await asyncio.gather(*self._releases)

    def _take(self, slot: Slot) -> Slot:
        slot.users += 1
        return slot

    def _give_back(self, slot: Slot) -> None:
        slot.users -= 1
        if slot.is_retired and slot.users == 0:
            self._free(slot)

    def _retire(self, slot: Slot | None) -> None:
        if slot is not None:
            slot.is_retired = True
            if slot.users == 0:
                self._free(slot)

    def _free(self, slot: Slot) -> None:
        """Freeing sessions takes milliseconds: not on the event loop."""
        release = asyncio.get_running_loop().run_in_executor(None, slot.release)
        self._releases.add(release)
        release.add_done_callback(self._releases.discard)

"""A load generator: connections in closed loops, each sending its next request when it has its answer.

HTTP/1.1 over kept connections, with the requests' bytes made beforehand and only the answers' heads read,
so that the generator takes as little as possible of the machine it shares with the server.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvloop

_LENGTH = b"content-length:"
_CONNECT_SECONDS = 10
_LEAST_REQUESTS = 100  # fewer say nothing of a p99: then it takes longer,
_LONGEST = 2  # but at most so many times as long


@dataclass(frozen=True)
class Target:
    """Where to send what. ``requests`` are whole HTTP requests, sent in turn."""

    port: int
    requests: Sequence[bytes]


@dataclass
class Tally:
    """What came back: when each answer was complete (perf_counter) and how many seconds it took."""

    ended: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def request(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Return one POST request as it goes over the wire."""
    head = {"Host": "127.0.0.1", "Content-Length": str(len(body))} | headers
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


class _Caller(asyncio.Protocol):
    """One connection."""

    def __init__(self, target: Target, first: int, tally: Tally) -> None:
        self._target, self._next, self._tally = target, first, tally
        self._transport: Any = None
        self._got = bytearray()
        self._needed = 0  # bytes of the whole answer, 0 while its head is not complete
        self._started = 0.0
        self.is_stopping = False
        self.gone = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        """Send the first request."""
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._got.clear()
        self._needed = 0
        self._started = time.perf_counter()
        self._transport.write(self._target.requests[self._next % len(self._target.requests)])
        self._next += 1

    def data_received(self, data: bytes) -> None:
        """Collect an answer; when it is complete, note it and ask again."""
        self._got += data
        if not self._needed:
            end = self._got.find(b"\r\n\r\n")
            if end < 0:
                return
            self._needed = end + 4 + _body_length(bytes(self._got[:end]))
        if len(self._got) < self._needed:
            return
        now = time.perf_counter()
        if self._got[9:12] == b"200":
            self._tally.ended.append(now)
            self._tally.seconds.append(now - self._started)
        else:
            self._tally.failed.append(self._got[:400].decode("latin-1"))
        if self.is_stopping:
            self._transport.close()
        else:
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        """A server that hangs up early fails the request that waits."""
        if not self.is_stopping:
            self._tally.failed.append(f"connection lost: {error}")
        if not self.gone.done():
            self.gone.set_result(None)


def _body_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line.lower().startswith(_LENGTH):
            return int(line[len(_LENGTH) :])
    raise ValueError(f"an answer without Content-Length: {head!r}")


async def _drive(target: Target, callers: int, begin: float, seconds: float) -> tuple[Tally, float]:
    """Return what came back and when measuring ended."""
    loop, tally = asyncio.get_running_loop(), Tally()
    made = [_Caller(target, index, tally) for index in range(callers)]
    for caller in made:
        async with asyncio.timeout(_CONNECT_SECONDS):
            await loop.create_connection(lambda caller=caller: caller, "127.0.0.1", target.port)
    await asyncio.sleep(max(0.0, begin - time.perf_counter()))
    settled = len(tally.ended)
    for _ in range(_LONGEST):
        await asyncio.sleep(seconds)
        if len(tally.ended) - settled >= _LEAST_REQUESTS:
            break
    end = time.perf_counter()
    for caller in made:
        caller.is_stopping = True
    await asyncio.wait([caller.gone for caller in made])
    return tally, end


def drive(target: Target, callers: int, *, settle_seconds: float, seconds: float) -> dict[str, Any]:
    """Ask with so many callers and return throughput and latencies of the time after settling.

    Raises:
        RuntimeError: a request failed, or none was answered; says how the answer began.
    """
    begin = time.perf_counter() + settle_seconds
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        tally, end = runner.run(_drive(target, callers, begin, seconds))
    if tally.failed:
        raise RuntimeError(f"{len(tally.failed)} requests failed, the first: {tally.failed[0]}")
    ended, taken = np.array(tally.ended), np.array(tally.seconds)
    taken = taken[(ended >= begin) & (ended < end)]
    if not len(taken):
        raise RuntimeError(f"no answer in {end - begin:.0f} seconds")
    return {
        "callers": callers,
        "requests": len(taken),
        "per_second": len(taken) / (end - begin),
        "p50": float(np.percentile(taken, 50)),
        "p99": float(np.percentile(taken, 99)),
    }

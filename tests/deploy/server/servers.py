"""What the server's tests share: real server processes, asked over real sockets."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.deploy.swaps import wait_for

ROOT = Path(__file__).resolve().parents[3]


class Server:
    """A `dynlora serve` process; ``url`` is where it says it listens."""

    def __init__(
        self, serving_dir: Path, *options: str, prefix: Sequence[str] = (), inherits: int | None = None
    ) -> None:
        command = [*prefix, sys.executable, "-m", "daemon.cli", "serve", "--store", str(serving_dir)]
        port = () if "--uds" in options or inherits is not None else ("--port", "0")
        drain = () if "--drain" in options else ("--drain", "0")  # nobody is to be sent elsewhere first
        self.process = subprocess.Popen(
            [*command, *port, *drain, *options],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=() if inherits is None else (inherits,),
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        wait_for(lambda: self._announced() or self.process.poll() is not None)
        found = self._announced()
        assert found, f"the server did not start:\n{self.log}"
        self.url = found[1]
        self.client = httpx.Client(base_url=self.url if found[1].startswith("http") else "http://localhost",
                                   timeout=60, transport=_transport(self.url))  # fmt: skip

    @property
    def log(self) -> str:
        """What the process wrote so far."""
        return "".join(self.lines)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        """End the process, whatever state it is in."""
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._reader.join(30)

    def version(self) -> int:
        """The version that answers now."""
        return int(self.client.get("/version").json()["model_version"])

    def workers(self) -> list[int]:
        """The process ids of the workers."""
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        return [int(pid) for pid in Path(path).read_text().split()]

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def _announced(self) -> re.Match[str] | None:
        return re.search(r"dynlora serves version \d+ on (\S+)", self.log)


def _transport(url: str) -> httpx.HTTPTransport | None:
    return httpx.HTTPTransport(uds=url.removeprefix("unix:")) if url.startswith("unix:") else None


@contextlib.contextmanager
def serving_process(serving_dir: Path, *options: str) -> Iterator[Server]:
    """A server for the length of a block."""
    server = Server(serving_dir, *options)
    try:
        yield server
    finally:
        server.close()


def pixels(rows: int, seed: int = 0, edge: int = 64) -> np.ndarray:
    """Random pixel values (rows, 3, edge, edge)."""
    return np.random.default_rng(seed).standard_normal((rows, 3, edge, edge)).astype(np.float32)


def jpeg(seed: int = 0, size: tuple[int, int] = (90, 70)) -> bytes:
    """A picture file."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def tensor(name: str, datatype: str, shape: Sequence[int], data: Any) -> dict[str, Any]:
    """An input as JSON writes it."""
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": data}


def ask_pixels(client: httpx.Client, values: np.ndarray, version: str = "") -> httpx.Response:
    """One raw binary request to the vision model."""
    where = f"/versions/{version}" if version else ""
    return client.post(
        f"/v2/models/vision{where}/infer",
        content=values.tobytes(),
        headers={"Inference-Header-Content-Length": "0"},
    )


def binary_outputs(response: httpx.Response) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Header and float32 outputs of a binary answer."""
    import json

    length = int(response.headers["inference-header-content-length"])
    header = json.loads(response.content[:length])
    arrays, offset = [], length
    for output in header["outputs"]:
        size = output["parameters"]["binary_data_size"]
        raw = response.content[offset : offset + size]
        arrays.append(np.frombuffer(raw, np.float32).reshape(output["shape"]))
        offset += size
    return header, arrays

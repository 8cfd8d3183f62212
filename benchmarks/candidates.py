"""The servers that are compared, each as a process on the cores given to it, and what they are asked.

All get the same pictures, one a request: `pixels` as float32 values, `jpeg` as files. `dynlora serve`
gets pixels in the Open Inference Protocol's binary form with its JSON header; the rivals get the bare
values, which is less to read.
"""

import contextlib
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.load import Target, request
from benchmarks.rivals.installing import python_of
from deploy.runtime import LoadedVersion

ROOT = Path(__file__).resolve().parents[1]
PICTURES = 16
JPEG_SIZE = (500, 375)  # about the average of ImageNet's
MAX_BATCH = 16
BATCH_SECONDS = 0.002
NAMES = ("dynlora", "mlserver", "litserve")
_START_SECONDS = 120


@dataclass(frozen=True)
class Setting:
    """One comparison: whose version, which payload, on which cores."""

    serving_dir: Path
    payload: str  # pixels | jpeg
    cores: frozenset[int]
    scratch: Path
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)  # what the rivals run before they are asked

    @property
    def version_dir(self) -> Path:
        """The live version."""
        return (self.serving_dir / "current").resolve()


@contextlib.contextmanager
def on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Run a block, and the processes started in it, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pictures() -> list[bytes]:
    """Sample images as JPEG files of the size that pictures have."""
    found = sorted((ROOT / "examples/demo/images/heldout").rglob("*.jpg"))
    files = []
    for path in found[:: max(1, len(found) // PICTURES)][:PICTURES]:
        buffer = io.BytesIO()
        with Image.open(path) as image:
            image.convert("RGB").resize(JPEG_SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def bodies(setting: Setting, loaded: LoadedVersion) -> list[bytes]:
    """What is sent, without headers."""
    files = pictures()
    if setting.payload == "jpeg":
        return files
    return [loaded.preprocessing([Image.open(io.BytesIO(file))]).tobytes() for file in files]


@contextlib.contextmanager
def serving(name: str, setting: Setting, loaded: LoadedVersion) -> Iterator[Target]:
    """Start a candidate, wait until it answers rightly, and end it after the block.

    Raises:
        RuntimeError: it does not start, or answers something else than it should.
    """
    port = _free_port()
    log_path = setting.scratch / f"{name}-{setting.payload}.log"
    given = bodies(setting, loaded)
    target = Target(port, [_request(name, setting, body, loaded) for body in given])
    with log_path.open("wb") as log, on_cores(setting.cores):
        process = subprocess.Popen(
            _command(name, setting, port),
            cwd=setting.scratch,
            env=_environment(setting, port),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_right(process, target, given[0], _Expected(setting, loaded))
        yield target
    except BaseException:
        print(f"{name} wrote: {log_path.read_text(errors='replace')[-2000:]}")
        raise
    finally:
        _end(process)


def _command(name: str, setting: Setting, port: int) -> list[str]:
    if name == "dynlora":
        store = ("--store", str(setting.serving_dir))
        limits = ("--port", str(port), "--max-batch", str(MAX_BATCH))
        return [sys.executable, "-m", "daemon.cli", "serve", *store, *limits]
    python = str(python_of(name))
    if name == "litserve":
        return [python, "-m", "benchmarks.rivals.lit"]
    settings = {
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": _free_port(),
        "metrics_port": _free_port(),
        "parallel_workers": 0,
        "debug": False,
    }
    model = {
        "name": "vision",
        "implementation": "benchmarks.rivals.ml.Vision",
        "max_batch_size": MAX_BATCH,
        "max_batch_time": BATCH_SECONDS,
    }
    folder = setting.scratch / "mlserver"
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [python, "-c", "from mlserver.cli import main; main()", "start", str(folder)]


def _environment(setting: Setting, port: int) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "BENCH_VERSION": str(setting.version_dir),
        "BENCH_PAYLOAD": setting.payload,
        "BENCH_PORT": str(port),
        "BENCH_CORES": str(len(setting.cores)),
        "BENCH_BATCH_SECONDS": str(BATCH_SECONDS),
        "BENCH_BATCHES": " ".join(map(str, setting.batches)),
    }


def _request(name: str, setting: Setting, body: bytes, loaded: LoadedVersion) -> bytes:
    kind = {"Content-Type": "application/octet-stream"}
    if name != "dynlora":
        return request({"mlserver": "/raw", "litserve": "/predict"}[name], body, kind)
    if setting.payload == "jpeg":
        return request("/classify", body, {"Content-Type": "image/jpeg"})
    header = json.dumps({
        "inputs": [{
            "name": "pixel_values", "datatype": "FP32", "shape": [1, 3, *loaded.preprocessing.size],
            "parameters": {"binary_data_size": len(body)},
        }],
        "outputs": [{"name": "image_embeds", "parameters": {"binary_data": True}}],
    }).encode()  # fmt: skip
    length = {"Inference-Header-Content-Length": str(len(header))}
    return request("/v2/models/vision/infer", header + body, kind | length)


class _Expected:
    """Tells whether an answer to the first picture is the right one."""

    def __init__(self, setting: Setting, loaded: LoadedVersion) -> None:
        self._setting, self._loaded = setting, loaded

    def check(self, body: bytes, answer: bytes) -> None:
        """Compare with what this process computes.

        Raises:
            RuntimeError: it is another one.
        """
        loaded = self._loaded
        if self._setting.payload == "jpeg":
            wanted = [best.label for best in loaded.classify([body])[0]]
            found: Any = [best["label"] for best in json.loads(answer)["predictions"][0]]
            is_right = found == wanted
        else:
            values = np.frombuffer(body, np.float32).reshape(1, 3, *loaded.preprocessing.size)
            embeds = loaded.encode_pixels(values)[0]
            found = np.frombuffer(answer[-embeds.nbytes :], np.float32)
            is_right = bool(np.abs(found - embeds).max() < 1e-4)
        if not is_right:
            raise RuntimeError(f"a wrong answer: {answer[:300]!r}")


def _wait_until_right(
    process: subprocess.Popen[bytes], target: Target, body: bytes, expected: _Expected
) -> None:
    limit = time.monotonic() + _START_SECONDS
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            answer = _ask_once(target)
            if answer is not None:
                expected.check(body, answer)
                return
        time.sleep(0.1)  # polling, no synchronisation: nobody tells when a rival is ready
    raise RuntimeError(f"the server does not answer within {_START_SECONDS} seconds")


def _ask_once(target: Target) -> bytes | None:
    with socket.create_connection(("127.0.0.1", target.port), timeout=60) as connection:
        connection.sendall(target.requests[0])
        response = http.client.HTTPResponse(connection, method="POST")
        response.begin()
        body = response.read()
        return body if response.status == 200 else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes it started; they are one session, which is ours."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 15)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

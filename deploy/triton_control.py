"""Telling a Triton server, through its model repository API, to load what was written for it.

With `--model-control-mode=explicit` Triton looks into its repository only when asked, so it never sees a
half-written one. A load that fails leaves the loaded versions in service; Triton says why, and so do we.
"""

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from deploy.errors import ShareError
from deploy.store_reader import StoreReader
from deploy.triton import DEFAULT_PREFIX, Repository, TritonReport

_TIMEOUT_SECONDS = 600.0  # a load answers when the model is warm
_ATTEMPTS = 3
_PAUSE_SECONDS = 1.0  # before the second try; doubles
_MAX_ANSWER_BYTES = 1 << 16


def sync(store: StoreReader, folder: Path, *, prefix: str = DEFAULT_PREFIX, server: str = "") -> TritonReport:
    """Write the versions to serve, have Triton load them, then remove those it has let go of.

    Args:
        server: Triton's HTTP address, such as http://localhost:8000; empty: nobody is told.

    Raises:
        ShareError: as Repository.write, or Triton did not load a model; what it had loaded still serves,
            and its folders are still there.
        StoreError, OSError: as Repository.write.
    """
    repository = Repository(folder, prefix)
    report = repository.write(store)
    if server:
        load(server, repository.models.values(), report.live)
    removed = repository.tidy(report.served)
    return TritonReport(report.live, report.served, report.added, removed, report.is_shared)


def load(server: str, models: Iterable[str], version: int) -> None:
    """Have every model loaded, and make sure that the version is ready in each.

    Raises:
        ShareError: names the model and what Triton said.
    """
    for model in models:
        quoted = urllib.parse.quote(model)
        _ask(server, f"v2/repository/models/{quoted}/load", body={}, what=f"load {model}")
        _ask(server, f"v2/models/{quoted}/versions/{version}/ready", what=f"have {model} {version} ready")


def _ask(server: str, path: str, *, what: str, body: object = None) -> None:
    """Send one request, again after errors that may pass.

    Raises:
        ShareError: it was refused, or the server cannot be reached.
    """
    if not server.startswith(("http://", "https://")):
        raise ShareError(f"{server!r} is no address of Triton: expected http://host:8000")
    url = f"{server.rstrip('/')}/{path}"
    data = None if body is None else json.dumps(body).encode()
    why = ""
    for attempt in range(1, _ATTEMPTS + 1):
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data, header)  # noqa: S310 - checked above
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):  # noqa: S310 - checked above
                return
        except urllib.error.HTTPError as error:
            why = f"{error.code}: {_message(error.read(_MAX_ANSWER_BYTES))}"
            error.close()
        except (OSError, http.client.HTTPException) as error:
            why = str(error)
        if attempt < _ATTEMPTS:
            time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
    raise ShareError(
        f"Triton at {server} did not {what}, asked {_ATTEMPTS} times ({why}). What it had loaded still "
        "serves. Is it started with --model-control-mode=explicit, and does it see the same repository?"
    )


def _message(answer: bytes) -> str:
    """What Triton says is wrong: {"error": "…"}, or whatever came."""
    try:
        return str(json.loads(answer)["error"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return answer[:200].decode(errors="replace") or "no reason given"

"""The worker's side of standing by: get ready for an order that may never come, then wait for it.

What is done here is lost where no order comes, and done again by a worker that did not stand by: so nothing
in it may fail loudly. Runs in the worker only.
"""

import contextlib
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from daemon.supervisor import EXIT_STOPPED
from deploy import disk

if TYPE_CHECKING:
    from daemon.live import Live


def stand_by(home: Path | None) -> "tuple[list[str], Live | None]":
    """Get ready and wait for an order; returns the arguments in it, and the live version if it was opened.

    Args:
        home: whose live version is opened ahead; None leaves it to the order.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which then ends us
    live = None
    # What cannot be imported is told by the worker that needs it.
    with contextlib.suppress(ModuleNotFoundError):
        _get_ready()
        live = _open_ahead(home) if home is not None else None
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):  # the daemon has no work for us any more
        sys.exit(EXIT_STOPPED)
    order = json.loads(line)
    log = disk.open_file(Path(order["log"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 2)
    os.close(log)
    return [str(argument) for argument in order["arguments"]], live


def _get_ready() -> None:
    """Import what is heavy, and make what most models have in common: CLIP's tokenizer, Pillow's readers."""
    import onnx  # noqa: F401 - the checks of a new version use it

    import daemon.adaptation
    import daemon.revising  # noqa: F401
    from daemon.founding import plain_tokenizer_json
    from deploy.decode import formats
    from deploy.opening import keep_tokenizer
    from dynlora.clip import plain_tokenizer, vocabulary

    keep_tokenizer(plain_tokenizer_json(plain_tokenizer(vocabulary().context_length)))
    formats()


def _open_ahead(home: Path) -> "Live | None":
    """The live version, or a line in the log that says why not: the order then opens what it names."""
    from daemon.live import open_ahead

    try:
        return open_ahead(home, is_wanted=lambda: not _has_order())
    except Exception as error:  # noqa: BLE001 - whatever it is, the order meets it again and says so
        sys.stderr.write(f"the live version was not opened ahead: {error}\n")
        return None


def _has_order() -> bool:
    """Whether there is an order, or no daemon any more."""
    return bool(select.select([sys.stdin], [], [], 0)[0])

"""An operator's command is carried out: through the running daemon, or here under the home's lock."""

import contextlib
import logging
import threading
from pathlib import Path
from typing import Any

from daemon import logs
from daemon.config import Config
from daemon.events import EventLog
from daemon.lifecycle import Launch
from daemon.operations import apply
from daemon.progress import View
from daemon.publish import Publisher
from daemon.requests import Answer, Request, run_or_request
from daemon.revision import LONG_COMMANDS, Reviser
from daemon.run_notes import note_of, write_note
from daemon.sharing import signer
from daemon.spool import Spool
from daemon.status import read_status
from deploy.store import VersionStore

WAIT_SECONDS = 0.2


def carry_out(
    home: Path, request: Request, config: Config, *, config_path: Path | None = None, view: View | None = None
) -> Answer:
    """Carry a command out and return its answer, whatever that is.

    Args:
        config: counts where no daemon is running.
        view: shows what is under way, of a command that takes long.

    Raises:
        RequestError: a daemon runs but did not answer in time; the request was withdrawn.
    """

    def tell(event: str, level: int = logging.INFO, /, **fields: Any) -> None:
        logs.log(event, level=level, **fields)
        EventLog(home).record(event, **fields)
        if (note := note_of(config.mlflow, event, fields)) is not None:  # the next daemon logs it
            with contextlib.suppress(OSError):
                write_note(home, note)

    publisher = Publisher(
        home, config, Spool(home), VersionStore(home / "serving", sign=signer(config)), tell
    )
    wake = threading.Event()

    def show(working: dict[str, Any]) -> None:
        if view is not None:
            view.update(**{key: value for key, value in working.items() if key != "request"})

    def wait(working: dict[str, Any]) -> None:
        show(working)
        wake.wait(WAIT_SECONDS)
        wake.clear()

    def execute(wanted: Request) -> Answer:
        if wanted.command not in LONG_COMMANDS:
            return apply(wanted, publisher)
        reviser = Reviser(publisher, Launch(config_path=config_path, wake=wake.set))
        return reviser.run_alone(wanted, wait)

    def is_under_way(name: str) -> bool:
        working = read_status(home).get("revising")
        if not isinstance(working, dict) or working.get("request") != name:
            return False
        show(working)
        return True

    return run_or_request(home, request, execute, is_under_way=is_under_way)

"""A process of its own that takes in one large drop: unpacks, reads, moves and flushes what may be a hundred
thousand files, while the daemon goes round.

    python -m daemon.intake_process --home HOME [--config FILE] --batch ID

`daemon.lane` starts and hears it. It does what the daemon does with a small drop (taking.py), and keeps the
same promises: killed anywhere, it is done again. Once all files are read it says so and waits for a line on
stdin: how images are split depends on every batch before, so nothing else may be decided meanwhile.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from daemon.child import Outlet, StopFlag, alone, die_with_parent
from daemon.config_sources import load_config
from daemon.errors import ConfigError, NoSpaceError, Stopped
from daemon.ledger import Ledger
from daemon.reception import Knowledge
from daemon.spool import Spool
from daemon.status import describe
from daemon.supervisor import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from daemon.taking import Taker
from deploy.errors import DeployError
from deploy.store import VersionStore

LOCK_NAME = "intake.lock"


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the drop in; returns the exit code."""
    options = _options(arguments)
    die_with_parent(options.parent_pid)
    outlet, stop = Outlet(), StopFlag(is_looked_at=True)
    try:
        with alone(options.home, LOCK_NAME):
            _take_in(options, outlet, stop)
    except Stopped:
        return EXIT_STOPPED
    except NoSpaceError as error:
        outlet.say("waits", why=str(error))
    except (ConfigError, DeployError) as error:
        outlet.say("error", message=str(error))
        return EXIT_FAILED
    except OSError as error:
        outlet.say("error", message=describe(error, options.home))
        return EXIT_FAILED
    return EXIT_DONE


def _take_in(options: argparse.Namespace, outlet: Outlet, stop: StopFlag) -> None:
    spool = Spool(options.home)
    last_phase = ""

    def tell(phase: str, done: int, count: int) -> None:
        nonlocal last_phase
        if phase != last_phase:
            outlet.phase(phase)
            last_phase = phase
        if count:
            outlet.step(step=done, steps=count)

    def ask_leave() -> None:
        outlet.say("examined")
        if not sys.stdin.buffer.readline():
            raise Stopped("the daemon is gone")
        tell("decide", 0, 0)

    taker = Taker(
        load_config(options.config, options.home),
        spool,
        Ledger(spool),
        known=Knowledge(VersionStore(options.home / "serving")),
        should_stop=lambda: stop.is_set,
        before_deciding=ask_leave,
        told=tell,
    )
    tell("gather", 0, 0)
    for event in taker.finish(options.batch):
        outlet.say(
            "told", **{"name" if key == "event" else key: value for key, value in asdict(event).items()}
        )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m daemon.intake_process", description=__doc__)
    parser.add_argument("--parent-pid", type=int, default=os.getppid(), help="exit when this process ends")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--config", type=lambda text: Path(text) if text else None)
    parser.add_argument("--batch", required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

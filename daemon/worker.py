"""The worker: a child process that does one piece of long work and then ends: learn a batch, found a version
store, make a version with or without one batch, or rebuild one.

The only way into torch from the daemon. It can be killed or run out of memory without touching the daemon,
and it dies with its parent. What it says goes to stdout as JSON lines (`daemon.supervisor` reads them); what
it leaves is in the batch's directory and in the store's staging directory.

    python -m daemon.worker init  --home HOME --model bundled|ARCH [--pretrained TAG|FILE] [--classes FILE]
                                [--images DIR]
    python -m daemon.worker adapt --home HOME [--config FILE] --batch ID --parent N
    python -m daemon.worker promote|revert --home HOME [--config FILE] --batch ID --parent N
    python -m daemon.worker rebuild --home HOME --version N
    python -m daemon.worker analyze --home HOME --source ID|PATH --ranks N,… --steps N --out DIR
    python -m daemon.worker standby [--home HOME]
                                imports what is heavy, opens HOME's live version, then waits for one of the
                                above on stdin
"""

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from daemon.child import Outlet, StopFlag, alone, die_with_parent
from daemon.standing_by import stand_by
from daemon.status import describe, is_full_disk
from daemon.supervisor import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED

if TYPE_CHECKING:
    from daemon.live import Live
    from daemon.tasks import Order

LOCK_NAME = "worker.lock"
REBUILD_LOCK_NAME = "rebuild.lock"  # a rebuild needs little memory and goes on beside the others
ANALYSIS_LOCK_NAME = "analysis.lock"  # an analysis only reads the home: learning need not wait for it
NO_MEMORY = "the worker ran out of memory; make the batch smaller, or give the daemon more memory"
# Of torch, of C++, and of oneDNN, which has no other words for it.
_NO_MEMORY_WORDS = ("can't allocate memory", "bad_alloc", "could not create a primitive")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with the protocol's code."""
    options = _parser().parse_args(arguments)
    die_with_parent(options.parent_pid)
    ahead = None
    if options.command == "standby":
        arguments, ahead = stand_by(options.home)
        options = _parser().parse_args(arguments)
    outlet, stop = Outlet(), StopFlag()
    try:
        if options.command == "rebuild":
            with alone(options.home, REBUILD_LOCK_NAME):
                code = _rebuild(options, outlet)
        else:
            lock = ANALYSIS_LOCK_NAME if options.command == "analyze" else LOCK_NAME
            with alone(options.home, lock):
                code = _run(options, outlet, stop, ahead)
    except ModuleNotFoundError as error:
        why = f"{error.name} is not installed; pip install 'dynlora[daemon]'"
        outlet.say("error", message=why, retry=True, fault="home")
        code = EXIT_FAILED
    except (MemoryError, OSError, RuntimeError) as error:
        if is_refused_memory(error):
            outlet.say("error", message=NO_MEMORY, retry=True)
        elif isinstance(error, OSError):
            _blame(outlet, error, describe(error, options.home), retry=True)
        else:
            raise
        code = EXIT_FAILED
    sys.exit(code)


def is_refused_memory(error: BaseException) -> bool:
    """Whether this is how Python, the system, or torch and its parts say that there is no more memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY_WORDS)


def _run(options: argparse.Namespace, outlet: Outlet, stop: StopFlag, ahead: "Live | None") -> int:
    """Import what is heavy only now: the lock is ours and the parent knows that we are alive.

    Args:
        ahead: what was opened before there was an order.
    """
    outlet.phase("load")
    from daemon.errors import ConfigError, DaemonError, WorkerError
    from deploy.errors import DeployError, ManifestError, StoreError, VerifyError, WeightsError
    from dynlora.errors import DynloraError, Interrupted, ModelError

    try:
        if options.command == "init":
            from daemon.founding import found_store

            found_store(
                options.home,
                options.model,
                options.pretrained,
                options.classes,
                images=options.images,
                outlet=outlet,
            )
        elif options.command in ("promote", "revert"):
            _revise(options, outlet, ahead)
            return EXIT_DONE
        elif options.command == "analyze":
            _analyze(options, outlet)
            return EXIT_DONE
        elif options.command == "regraph":
            from daemon.regraphing import stage_regraph

            outlet.say("result", draft=stage_regraph(options.home, options.parent, outlet=outlet))
            return EXIT_DONE
        else:
            from daemon.adaptation import adapt_batch

            adapt_batch(_order(options), outlet=outlet, stop=stop, ahead=ahead)
    except Interrupted:
        return EXIT_STOPPED
    except (ConfigError, StoreError, ManifestError, WeightsError, VerifyError, ModelError) as error:
        # The configuration, or what is published, cannot be used: no batch is to blame. Before there is a
        # home it is what was typed.
        is_usage = options.command == "init" and isinstance(error, ConfigError | ModelError)
        outlet.say("error", message=str(error), retry=True, fault="usage" if is_usage else "home")
        return EXIT_FAILED
    except WorkerError as error:  # what was made of the batch is damaged: it can be made again
        _blame(outlet, error, str(error), retry=True)
        return EXIT_FAILED
    except (DaemonError, DeployError, DynloraError) as error:
        _blame(outlet, error, str(error), retry=False)
        return EXIT_FAILED
    outlet.say("result")
    return EXIT_DONE


def _order(options: argparse.Namespace) -> "Order":
    from daemon.config_sources import load_config
    from daemon.tasks import Order

    config = load_config(options.config, options.home)
    return Order(options.home, options.batch, options.parent, config)


def _revise(options: argparse.Namespace, outlet: Outlet, ahead: "Live | None") -> None:
    from daemon.revising import revise

    report = revise(options.command, _order(options), outlet=outlet, ahead=ahead)
    outlet.say("result", report=report.model_dump(mode="json"))


def _analyze(options: argparse.Namespace, outlet: Outlet) -> None:
    from daemon.analysing import Wanted, analyze_batch
    from daemon.config_sources import load_config

    ranks = [int(rank) for rank in options.ranks.split(",")]
    wanted = Wanted(options.source, options.probe, ranks, options.steps, options.out)
    config = load_config(options.config, options.home)
    files = analyze_batch(options.home, wanted, config, outlet=outlet)
    trials = json.loads(files[0].read_text(encoding="utf-8"))["trials"]
    outlet.say("result", trials=trials, files=[str(file) for file in files])


def _rebuild(options: argparse.Namespace, outlet: Outlet) -> int:
    """Needs no torch, and loads none."""
    from deploy.errors import DeployError
    from deploy.rebuild import stage_rebuild
    from deploy.store import VersionStore

    outlet.phase("fold")
    try:
        files = stage_rebuild(VersionStore(options.home / "serving"), options.version, told=outlet.tensors)
    except DeployError as error:
        outlet.say("error", message=str(error))
        return EXIT_FAILED
    outlet.say("result", files=files)
    return EXIT_DONE


def _end(code: int) -> NoReturn:
    """Leave without tidying up: everything is on disk, and torch takes a while to be taken down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _blame(outlet: Outlet, error: Exception, why: str, *, retry: bool) -> None:
    """Say what went wrong; no batch is to blame for a disk that is full."""
    if is_full_disk(error):
        outlet.say("error", message=why, retry=True, fault="home")
    else:
        outlet.say("error", message=why, retry=retry)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m daemon.worker", description=__doc__)
    parser.add_argument("--parent-pid", type=int, default=os.getppid(), help="exit when this process ends")
    commands = parser.add_subparsers(dest="command", required=True)
    init = commands.add_parser("init")
    init.add_argument("--home", type=Path, required=True)
    init.add_argument("--model", default="bundled")
    init.add_argument("--pretrained")
    init.add_argument("--classes", type=Path)
    init.add_argument("--images", type=Path)
    for name in ("adapt", "promote", "revert"):
        of_batch = commands.add_parser(name)
        of_batch.add_argument("--home", type=Path, required=True)
        of_batch.add_argument("--config", type=lambda text: Path(text) if text else None)
        of_batch.add_argument("--batch", required=True)
        of_batch.add_argument("--parent", type=int, required=True)
    rebuild = commands.add_parser("rebuild")
    rebuild.add_argument("--home", type=Path, required=True)
    rebuild.add_argument("--version", type=int, required=True)
    regraph = commands.add_parser("regraph")
    regraph.add_argument("--home", type=Path, required=True)
    regraph.add_argument("--parent", type=int, required=True)
    analyze = commands.add_parser("analyze")
    analyze.add_argument("--home", type=Path, required=True)
    analyze.add_argument("--config", type=lambda text: Path(text) if text else None)
    analyze.add_argument("--source", required=True)
    analyze.add_argument("--probe", type=Path)
    analyze.add_argument("--ranks", required=True)
    analyze.add_argument("--steps", type=int, required=True)
    analyze.add_argument("--out", type=Path, required=True)
    standby = commands.add_parser("standby")
    standby.add_argument("--home", type=Path)
    return parser


if __name__ == "__main__":
    try:
        main()
    except SystemExit as ended:
        _end(ended.code if isinstance(ended.code, int) else EXIT_FAILED)

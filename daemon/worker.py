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
    python -m daemon.worker standby     imports what is heavy, then waits for one of the above on stdin
"""

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from daemon.child import Outlet, StopFlag, alone, die_with_parent
from daemon.status import describe, is_full_disk
from daemon.supervisor import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from deploy import disk

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
    if options.command == "standby":
        options = _parser().parse_args(_stand_by())
    outlet, stop = Outlet(), StopFlag()
    try:
        if options.command == "rebuild":
            with alone(options.home, REBUILD_LOCK_NAME):
                code = _rebuild(options, outlet)
        else:
            lock = ANALYSIS_LOCK_NAME if options.command == "analyze" else LOCK_NAME
            with alone(options.home, lock):
                code = _run(options, outlet, stop)
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


def _run(options: argparse.Namespace, outlet: Outlet, stop: StopFlag) -> int:
    """Import what is heavy only now: the lock is ours and the parent knows that we are alive."""
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
            _revise(options, outlet)
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
            from daemon.config_sources import load_config

            config = load_config(options.config, options.home)
            adapt_batch(options.home, options.batch, options.parent, config, outlet=outlet, stop=stop)
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


def _revise(options: argparse.Namespace, outlet: Outlet) -> None:
    from daemon.config_sources import load_config
    from daemon.revising import revise

    config = load_config(options.config, options.home)
    report = revise(options.home, options.command, options.batch, options.parent, config, outlet=outlet)
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


def _stand_by() -> list[str]:
    """Get ready and wait for an order; returns the arguments in it.

    Nothing of a home is read before: what a version or a configuration says may have changed by then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which then ends us
    # What cannot be imported is told by the worker that needs it.
    with contextlib.suppress(ModuleNotFoundError):
        _get_ready()
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):  # the daemon has no work for us any more
        sys.exit(EXIT_STOPPED)
    order = json.loads(line)
    log = disk.open_file(Path(order["log"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 2)
    os.close(log)
    return [str(argument) for argument in order["arguments"]]


def _get_ready() -> None:
    """Import what is heavy, and make what most models have in common: CLIP's tokenizer, Pillow's readers."""
    import onnx  # noqa: F401 - the checks of a new version use it

    import daemon.adaptation  # noqa: F401
    from daemon.founding import plain_tokenizer_json
    from deploy.decode import formats
    from deploy.opening import keep_tokenizer
    from dynlora.clip import plain_tokenizer, vocabulary

    keep_tokenizer(plain_tokenizer_json(plain_tokenizer(vocabulary().context_length)))
    formats()


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
    commands.add_parser("standby")
    return parser


if __name__ == "__main__":
    try:
        main()
    except SystemExit as ended:
        _end(ended.code if isinstance(ended.code, int) else EXIT_FAILED)

"""The program `dynlora`: its commands, their exit codes, and how errors are told.

    0 done    1 the work failed    2 usage or configuration    3 held

Every command takes --home, --config and --json before or after its name. With --json stdout is exactly one
JSON document, `{"error": …}` when it went wrong; what people watch goes to stderr in any case.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from daemon import (
    cli_analyze,
    cli_feed,
    cli_history,
    cli_look,
    cli_migrate,
    cli_report,
    cli_serve,
    cli_share,
    cli_steer,
    cli_systemd,
)
from daemon.errors import DaemonError
from daemon.output import Options, common_options
from daemon.status import describe
from deploy.errors import DeployError

COMMANDS = (
    cli_systemd.systemd,
    *(cli_feed.init, cli_feed.run, cli_feed.submit),
    *(cli_look.status, cli_look.versions, cli_look.show, cli_look.classes, cli_look.verify),
    *(cli_share.mirror, cli_share.pull, cli_share.triton, cli_share.sign),
    cli_report.report,
    cli_migrate.migrate,
    cli_serve.serve,
    *(cli_steer.rollback, cli_steer.unpin, cli_steer.pause, cli_steer.resume),
    *(cli_steer.classify, cli_look.check_config),
    cli_analyze.analyze,
    *(cli_history.promote, cli_history.revert, cli_history.forget),
    *(cli_history.retry, cli_history.discard),
    *(cli_history.thin, cli_history.rebuild, cli_history.prune),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dynlora", prog_name="dynlora")
@common_options
def program() -> None:
    """Drop class folders into an inbox; a live CLIP learns them and is swapped into ONNX serving."""


for _command in COMMANDS:
    program.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit; what users can cause ends in one sentence, never in a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(given))


def _run(arguments: list[str]) -> int:
    try:
        result: Any = program.main(arguments, prog_name="dynlora", standalone_mode=False, obj=Options())
    except click.ClickException as error:
        usage = f"{error.ctx.get_usage()}\n" if isinstance(error, click.UsageError) and error.ctx else ""
        return _fail(arguments, error.format_message(), error.exit_code, before=usage)
    except DaemonError as error:
        return _fail(arguments, str(error), error.exit_code)
    except DeployError as error:
        return _fail(arguments, str(error), 1)
    except ModuleNotFoundError as error:
        hint = "this command needs the daemon's packages: pip install 'dynlora[daemon]'"
        return _fail(arguments, f"{error.name} is not installed; {hint}", 1)
    except BrokenPipeError:
        # Whoever read our output has seen enough; say nothing at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(arguments, describe(error), 1)
    except (KeyboardInterrupt, click.Abort):
        return _fail(arguments, "interrupted", 1)
    return result if isinstance(result, int) else 0


def _fail(arguments: list[str], message: str, code: int, *, before: str = "") -> int:
    click.echo(f"{before}Error: {message}", err=True)
    if "--json" in arguments:
        click.echo(json.dumps({"error": message}, ensure_ascii=False))
    return code


if __name__ == "__main__":
    main()

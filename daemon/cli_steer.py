"""Commands that steer the daemon or ask the live version: rollback, unpin, pause, resume, classify."""

import sys
from pathlib import Path
from typing import Any

import click

from daemon.errors import RequestError
from daemon.output import Options, common_options, pass_options

FAILED = 1


@click.command()
@click.option(
    "--to", type=click.IntRange(min=0), help="The version to go back to. [default: the live one's parent]"
)
@click.option("--why", default="", help="A reason, kept in pin.json and told by `dynlora status`.")
@common_options
@pass_options
def rollback(options: Options, *, to: int | None, why: str) -> None:
    """Make an earlier version live and pin it; batches queue until `dynlora unpin`."""
    from daemon.operations import rollback_target
    from daemon.requests import Request

    store = options.store()
    # Resolved here: a request names its effect, and doing it twice must not go back twice.
    target = rollback_target(store) if to is None else to
    result = _carry_out(options, Request(command="rollback", to=target, why=why))
    sentence = (
        f"version {result['live']} is live and pinned; `dynlora unpin` lets new versions be published again"
    )
    options.show(result, lambda: click.echo(sentence))


@click.command()
@common_options
@pass_options
def unpin(options: Options) -> None:
    """Release the pin; batches go on from the version that is live."""
    from daemon.operations import pinned_version
    from daemon.requests import Request

    # Named here, as for a roll-back: done twice, it must not release a pin that came later.
    result = _carry_out(options, Request(command="unpin", to=pinned_version(options.store())))
    sentence = f"released; version {result['live']} is live and the next one is built on it"
    options.show(result, lambda: click.echo(sentence))


@click.command()
@click.option("--why", default="", help="A reason, told by `dynlora status` and the log.")
@common_options
@pass_options
def pause(options: Options, *, why: str) -> None:
    """Learn nothing until `resume`: batches queue, one at work stops at a checkpoint. Serving goes on."""
    from daemon.requests import Request

    result = _carry_out(options, Request(command="pause", why=why))
    options.show(result, lambda: click.echo("paused; what is dropped queues until `dynlora resume`"))


@click.command()
@common_options
@pass_options
def resume(options: Options) -> None:
    """End a pause; a batch at work goes on from its checkpoint."""
    from daemon.requests import Request

    result = _carry_out(options, Request(command="resume"))
    sentence = "learning goes on" if result["was_paused"] else "nothing was paused"
    options.show(result, lambda: click.echo(sentence))


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--labels", help="Names to choose from, separated by commas. [default: the known classes]")
@click.option(
    "--top", default=5, show_default=True, type=click.IntRange(min=1), help="How many labels to show."
)
@common_options
@pass_options
def classify(options: Options, images: tuple[Path, ...], *, labels: str | None, top: int) -> None:
    """Ask the live version what is on some images."""
    from daemon.progress import showing
    from deploy.runtime import LoadedVersion

    store = options.store()
    names = [name.strip() for name in labels.split(",") if name.strip()] if labels is not None else None
    with showing("warning") as view:
        view.update("load")
        with LoadedVersion(store.path(store.current())) as version:
            number, answers = version.version, [_ask(version, path, names, top=top) for path in images]
    options.show({"version": number, "images": answers}, lambda: _say_answers(answers))
    if any("error" in answer for answer in answers):
        sys.exit(FAILED)


def _carry_out(options: Options, request: Any) -> dict[str, Any]:
    """Through the running daemon, or here.

    Raises:
        RequestError: it could not be done; the message is the daemon's.
    """
    from daemon.config import Config
    from daemon.ordering import carry_out

    # No configuration takes part: a roll-back must also work where that is broken.
    answer = carry_out(options.existing_home(), request, Config())
    if answer.exit_code:
        raise RequestError(answer.error or "it could not be done")
    return answer.result


def _ask(version: Any, path: Path, names: list[str] | None, *, top: int) -> dict[str, Any]:
    """One image's answer, or why there is none: a bad file must not cost the others theirs."""
    from deploy.errors import ImageError

    try:
        [predictions] = version.classify([path], names, top=top)
    except (ImageError, OSError) as error:
        reason = error.reason if isinstance(error, ImageError) else error.strerror or str(error)
        return {"file": str(path), "error": reason}
    return {
        "file": str(path),
        "predictions": [{"label": p.label, "score": round(p.score, 6)} for p in predictions],
    }


def _say_answers(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        if "error" in answer:
            click.echo(f"{answer['file']}: {answer['error']}", err=True)
            continue
        best = ", ".join(f"{p['label']} {p['score']:.1%}" for p in answer["predictions"])
        click.echo(f"{answer['file']}: {best}")

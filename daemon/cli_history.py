"""Commands that change what the live version was learnt from, and what is kept of versions and images."""

import sys
from collections.abc import Mapping
from typing import Any

import click

from daemon.errors import RequestError
from daemon.output import Options, common_options, pass_options, table

FAILED, HELD = 1, 3
_why = click.option("--why", default="", help="A reason, kept with what was done.")


@click.command()
@click.argument("batch")
@_why
@common_options
@pass_options
def promote(options: Options, batch: str, *, why: str) -> None:
    """Publish a held batch on top of the live version; its exams are graded again and shown."""
    found = _order(options, command="promote", batch=batch, why=why)
    options.show(found, lambda: _say_published(found, f"{batch} was promoted"))


@click.command()
@click.argument("batch")
@click.option("--insist", is_flag=True, help="Publish even where the exams of other batches lose by it.")
@_why
@common_options
@pass_options
def revert(options: Options, batch: str, *, insist: bool, why: str) -> None:
    """Take one batch out of the live version, as if it had never been learnt; all others stay."""
    found = _order(options, command="revert", batch=batch, insist=insist, why=why)
    options.show(found, lambda: _say_published(found, f"{batch} was taken out"))
    if "version" not in found:
        sys.exit(HELD)


@click.command()
@click.argument("versions", nargs=-1, type=click.IntRange(min=0))
@_why
@common_options
@pass_options
def thin(options: Options, versions: tuple[int, ...], *, why: str) -> None:
    """Remove the weights of versions that can be rebuilt. [default: of all that need not be at hand]"""
    from deploy.space import thinnable

    # Named here: a request names its effect, and another version may be live when it is executed.
    wanted = versions or tuple(thinnable(options.store()))
    found = _order(options, command="thin", versions=wanted, why=why)
    options.show(found, lambda: _say_freed(found, "thinned", "`dynlora rebuild N` brings the weights back"))
    if versions and found["kept"]:  # not all that was asked for by name
        sys.exit(FAILED)


@click.command()
@click.argument("version", type=click.IntRange(min=0))
@_why
@common_options
@pass_options
def rebuild(options: Options, version: int, *, why: str) -> None:
    """Make a thinned, pruned or damaged version whole again, with the very bytes it was published with."""
    found = _order(options, command="rebuild", to=version, why=why)
    files = ", ".join(found["files"])
    sentence = f"rebuilt {files}; every byte is what was published" if files else "nothing was missing"
    state = "is whole" if found["is_full"] else "was thinned or pruned again meanwhile"
    options.show(found, lambda: click.echo(f"version {version} {state}: {sentence}"))


@click.command()
@click.option("--keep", type=click.IntRange(min=1), help="Full versions to keep. [default: store.keep_full]")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@_why
@common_options
@pass_options
def prune(options: Options, *, keep: int | None, dry_run: bool, why: str) -> None:
    """Free the disk of old versions' large files; deltas and records stay, so that they can be rebuilt."""
    from deploy.prune import large_files
    from deploy.space import prunable

    store = options.store()
    planned = prunable(store, options.config().store.keep_full if keep is None else keep)
    if dry_run:
        sizes = {n: sum(path.stat().st_size for path in large_files(store.path(n))) for n in planned}
        found: dict[str, Any] = {"versions": planned, "bytes": sum(sizes.values()), "kept": {}}
        options.show(
            found | {"dry_run": True}, lambda: _say_freed(found, "would be pruned", "nothing was done")
        )
        return
    found = _order(options, command="prune", versions=tuple(planned), why=why)
    options.show(found, lambda: _say_freed(found, "pruned", "`dynlora rebuild N` makes one whole again"))


@click.command()
@click.argument("batch")
@_why
@common_options
@pass_options
def forget(options: Options, batch: str, *, why: str) -> None:
    """Remove the images of a batch everywhere, for good; what was learnt from them stays."""
    found = _order(options, command="forget", batch=batch, why=why)

    def text() -> None:
        counts = ", ".join(f"{count} in {place}" for place, count in found["images"].items() if count)
        click.echo(f"{batch} is forgotten; files removed: {counts or 'none, they were gone already'}")
        click.echo("What remains:")
        for sentence in found["remains"]:
            click.echo(f"  - {sentence}")

    options.show(found, text)


@click.command()
@click.argument("batch")
@_why
@common_options
@pass_options
def retry(options: Options, batch: str, *, why: str) -> None:
    """Put a failed or held batch back into the queue, with its attempts cleared."""
    found = _order(options, command="retry", batch=batch, why=why)
    is_queued = found["state"] == "queued"
    where = "is queued again; what was learnt of it before is gone" if is_queued else "is taken in again"
    options.show(found, lambda: click.echo(f"{batch} {where}"))


@click.command()
@click.argument("batch")
@_why
@common_options
@pass_options
def discard(options: Options, batch: str, *, why: str) -> None:
    """Remove the images of a batch that failed, was held or still waits; who, when and why are kept."""
    found = _order(options, command="discard", batch=batch, why=why)
    count = sum(found["images"].values())
    options.show(found, lambda: click.echo(f"{batch} is discarded; {count} files were removed"))


def _order(options: Options, **wanted: Any) -> dict[str, Any]:
    """The result of a command; that of a refused revert has an `error`.

    Raises:
        RequestError: it could not be done; the message is the daemon's.
    """
    from daemon.ordering import carry_out
    from daemon.progress import showing
    from daemon.requests import Request

    home, config = options.existing_home(), options.config()
    with showing(config.log.level) as view:
        answer = carry_out(home, Request(**wanted), config, config_path=options.config_path(), view=view)
    if answer.exit_code == HELD:
        return answer.result | {"error": answer.error}
    if answer.exit_code:
        raise RequestError(answer.error or "it could not be done")
    return answer.result


def _say_published(found: Mapping[str, Any], done: str) -> None:
    if found.get("already"):
        click.echo(f"nothing to do: that was done as version {found['version']}")
        return
    if rows := [row for row in found["exams"] if row["images"]]:
        table(["exam", "images", "before", "after", "gained", "lost"], [_exam_cells(row) for row in rows])
    for sentence in found["warnings"]:
        click.echo(sentence)
    for rule in found["decision"]["rules"]:
        click.echo(f"{'passed' if rule['passed'] else 'failed'}  {rule['rule']}: {rule['detail']}")
    click.echo(found["error"] if "error" in found else f"{done}; version {found['version']} is live")


def _exam_cells(row: Mapping[str, Any]) -> list[str]:
    shares = [f"{row[key] / row['images']:.1%}" for key in ("correct_before", "correct_after")]
    return [row["batch"], str(row["images"]), *shares, str(row["gained"]), str(row["lost"])]


def _say_freed(found: Mapping[str, Any], done: str, hint: str) -> None:
    versions = ", ".join(str(version) for version in found["versions"])
    if versions:
        click.echo(f"{done}: {versions}; {found['bytes'] / 1e6:,.1f} MB; {hint}")
    elif not found["kept"]:
        click.echo("nothing to free")
    for version, why in found["kept"].items():
        click.echo(f"version {version} stays as it is: {why}")

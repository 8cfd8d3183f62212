"""Commands that take versions elsewhere, or fetch them: mirror, pull, triton, sign."""

import dataclasses
import logging
import signal
import threading
from pathlib import Path
from typing import Any

import click

from daemon import logs
from daemon.output import Options, common_options, pass_options


@click.command()
@click.argument("url")
@click.option("--full", default=0, type=click.IntRange(min=0), help="Versions that keep their weights there.")
@click.option("--check", is_flag=True, help="Read everything there again and compare hashes.")
@common_options
@pass_options
def mirror(options: Options, url: str, *, full: int, check: bool) -> None:
    """Copy the versions to a folder or an object store (s3://…), deltas and the initial weights."""
    from deploy.mirror import mirror as copy_all
    from deploy.mirror import open_target

    report = copy_all(options.store(), open_target(url), full=full, check=check)
    sentence = (
        f"version {report.version} is live in {url}: {report.uploaded} files, "
        f"{report.uploaded_bytes / 1e6:,.1f} MB written, {report.removed} removed"
    )
    options.show(dataclasses.asdict(report), lambda: click.echo(sentence))


@click.command()
@click.argument("url")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--trust", type=click.Path(path_type=Path), help="Public keys (PEM); one must have signed.")
@click.option("--watch", type=click.FloatRange(min=0.1), metavar="SECONDS", help="Look again so often.")
@click.option("--forward-only", is_flag=True, help="Refuse to go back to an older version.")
@click.option("--max-bytes", type=click.IntRange(min=1), help="The largest weights file to accept.")
@click.option("--check", is_flag=True, help="Read the live version's files again, repair what is damaged.")
@common_options
@pass_options
def pull(options: Options, /, url: str, directory: Path, **given: Any) -> None:
    """Follow a store elsewhere (a path, http(s)://, s3://…) in DIRECTORY: deltas only, folded here."""
    from deploy.pull import PullOptions
    from deploy.remote import open_remote
    from deploy.signing import TrustedKeys

    trust = TrustedKeys.load(given["trust"]) if given["trust"] else None
    limits = {"max_bytes": given["max_bytes"]} if given["max_bytes"] else {}
    wanted = PullOptions(trust=trust, forward_only=given["forward_only"], check=given["check"], **limits)
    remote = open_remote(url)
    if given["watch"] is None:
        from deploy.pull import pull as fetch

        report = fetch(remote, directory, wanted)
        options.show(dataclasses.asdict(report), lambda: click.echo(_sentence(report, url)))
    else:
        _watch(remote, directory, wanted, seconds=given["watch"])


@click.command()
@click.argument("repository", type=click.Path(path_type=Path, file_okay=False))
@click.option("--prefix", default="dynlora", show_default=True, help="Beginning of the models' names.")
@click.option("--server", default="", metavar="URL", help="Have this Triton load them: http://host:8000.")
@common_options
@pass_options
def triton(options: Options, repository: Path, *, prefix: str, server: str) -> None:
    """Write the live and the previous version into a Triton model repository, and have them loaded."""
    from deploy.triton_control import sync

    report = sync(options.store(), repository, prefix=prefix, server=server)
    loaded = " and loaded" if server else ""
    served = ", ".join(map(str, report.served))
    sentence = f"{repository} serves version {served}: {len(report.added)} folders written{loaded}"
    options.show(dataclasses.asdict(report), lambda: click.echo(sentence))


@click.command()
@click.argument("version", required=False, type=click.IntRange(min=0))
@click.option("--key", type=click.Path(path_type=Path), help="A private key (PEM). [default: signing.key]")
@click.option("--all", "is_all", is_flag=True, help="Sign again what another key has signed, too.")
@common_options
@pass_options
def sign(options: Options, version: int | None, *, key: Path | None, is_all: bool) -> None:
    """Sign a version that is published already (default: every one that has no signature)."""
    from daemon.errors import ConfigError
    from deploy.signing import SigningKey

    if is_all and version is not None:
        raise click.UsageError(f"give --all or the version {version}, not both")
    path = key or Path(options.config().signing.key or ".")
    if not key and path == Path():
        raise ConfigError("there is no key to sign with: give --key FILE, or set signing.key in config.toml")
    store, signing_key = options.store(), SigningKey.load(path)
    if version is not None:
        chosen = [store.manifest(version).version]
    else:
        chosen = _to_sign(store, signing_key, is_all=is_all)
    for number in chosen:  # each by one rename, so that nobody ever finds none
        signing_key.sign_version(store.path(number))
    done = "every version is signed with this key already" if is_all else "every version is signed already"
    sentence = f"signed {', '.join(map(str, chosen))}" if chosen else done
    options.show({"signed": chosen}, lambda: click.echo(sentence))


def _to_sign(store: Any, key: Any, *, is_all: bool) -> list[int]:
    """The versions that nobody has signed, or that this key has not."""
    from deploy.manifest import SIGNATURE_NAME

    if is_all:
        return [number for number in store.versions() if not key.has_signed(store.path(number))]
    return [number for number in store.versions() if not (store.path(number) / SIGNATURE_NAME).exists()]


def _watch(remote: Any, directory: Path, wanted: Any, *, seconds: float) -> None:
    """Pull again and again until SIGTERM or Ctrl-C; trouble is told and passes.

    What is here is read again (``check``) until that went well once, not with every look.
    """
    from deploy.errors import DeployError
    from deploy.pull import pull as fetch

    logs.configure(logging.StreamHandler())
    should_stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: should_stop.set())
    told = ""
    while not should_stop.is_set():
        try:
            report = fetch(remote, directory, wanted)
        except (DeployError, OSError) as error:
            if str(error) != told:  # the same trouble is told once
                logs.log("trouble", level=logging.ERROR, why=str(error))
            told = str(error)
        else:
            told = ""
            wanted = dataclasses.replace(wanted, check=False)
            if report.repaired:
                logs.log("repaired", version=report.version, files=", ".join(report.repaired))
            if report.is_new:
                logs.log(
                    "pulled",
                    version=report.version,
                    bytes=report.bytes_moved,
                    seconds=round(report.seconds, 2),
                )
        should_stop.wait(seconds)


def _sentence(report: Any, url: str) -> str:
    repaired = ", ".join(report.repaired)
    if not report.is_new and repaired:
        return (
            f"version {report.version} was damaged here and is repaired: {repaired}; "
            f"{report.bytes_moved / 1e6:,.2f} MB moved, {report.deltas_folded} deltas folded"
        )
    if not report.is_new:
        checked = f"; all {report.checked} files here are as recorded" if report.checked else ""
        return f"version {report.version} is live here and in {url}{checked}"
    share = report.bytes_moved / report.weights_bytes
    sentence = (
        f"version {report.version} is live: {report.bytes_moved / 1e6:,.2f} MB moved, "
        f"{share:.1%} of its weights, {report.deltas_folded} deltas folded"
    )
    return f"{sentence}; damaged here and repaired: {repaired}" if repaired else sentence

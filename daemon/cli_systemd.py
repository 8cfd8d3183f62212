"""`dynlora systemd`: install daemon and server as services, take them away again."""

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from daemon.output import DEFAULT_HOME, Function, Options, common_options_with, pass_options
from daemon.unit_files import SYSTEM_HOME

_LINGERING_DIR = Path("/var/lib/systemd/linger")  # a file for each user whose systemd is always there


@click.group()
def systemd() -> None:
    """Run daemon and server as systemd services."""


def _target_options(*, user: str, dry_run: str) -> Callable[[Function], Function]:
    """The options that both commands have; they do opposite things, so each has words of its own."""
    is_user = click.option("--user", "is_user", is_flag=True, help=user)
    root = click.option("--root", type=click.Path(path_type=Path), default=Path("/"), hidden=True)
    dry = click.option("--dry-run", is_flag=True, help=dry_run)
    common = common_options_with(f"{SYSTEM_HOME}; with --user $DYNLORA_HOME or {DEFAULT_HOME}")
    return lambda command: is_user(root(dry(common(command))))


@systemd.command()
@_target_options(
    user="Into your own systemd, without root.", dry_run="Print what would be written; change nothing."
)
@pass_options
def install(options: Options, *, is_user: bool, root: Path, dry_run: bool) -> None:
    """Write units, users and inbox, and let systemd read them; nothing is started yet."""
    from daemon import systemd as units
    from daemon import unit_files

    target = _target(options, is_user=is_user, root=root)
    warnings = [*unit_files.cautions(target), *_missing_server(), *_ends_at_logout(is_user=is_user)]
    if dry_run:
        files = {str(path): content for path, content in unit_files.render(target).items()}
        options.show({"files": files, "warnings": warnings}, lambda: _say_files(files))
        return
    written = [str(path) for path in units.install(target, units.run_command)]
    start, serve = (
        " ".join(target.manager("enable", "--now", unit)) for unit in (unit_files.UNIT, unit_files.SERVE_UNIT)
    )
    document = {"written": written, "start": start, "serve": serve, "warnings": warnings}

    def text() -> None:
        for path in written:
            click.echo(f"wrote {path}")
        for sentence in warnings:
            click.echo(f"Warning: {sentence}", err=True)
        if not (target.home / "serving" / "current").exists():
            as_user = "" if is_user else "sudo -u dynlora "
            click.echo(f"make its home first: {as_user}{target.python} -m daemon.cli init {target.home}")
        click.echo(f"start it: {start}")
        click.echo(f"serve it over HTTP: {serve}")

    options.show(document, text)


@systemd.command()
@_target_options(
    user="From your own systemd, without root.", dry_run="Print what would be removed; change nothing."
)
@pass_options
def uninstall(options: Options, *, is_user: bool, root: Path, dry_run: bool) -> None:
    """Stop the services and remove their files. Home, users and groups stay: they hold what was learnt."""
    from daemon import systemd as units
    from daemon import unit_files

    target = _target(options, is_user=is_user, root=root)
    if dry_run:
        removed = [str(path) for path in unit_files.render(target) if path.exists()]
    else:
        removed = [str(path) for path in units.uninstall(target, units.run_command)]
    verb = "would remove" if dry_run else "removed"
    options.show({"removed": removed}, lambda: click.echo("\n".join(f"{verb} {path}" for path in removed)))


def _target(options: Options, *, is_user: bool, root: Path) -> Any:
    from daemon.systemd import systemd_version
    from daemon.unit_files import Target

    home = options.home.absolute() if is_user or options.home_option else SYSTEM_HOME
    return Target(home=home, is_user=is_user, root=root, version=systemd_version())


def _missing_server() -> list[str]:
    """A sentence, if the server's packages are not installed here."""
    from daemon.cli_serve import missing_packages

    missing = missing_packages()
    sentence = (
        f"dynlora-serve.service will not start before the server's packages are here ({', '.join(missing)}): "
        "pip install 'dynlora[server]'"
    )
    return [sentence] if missing else []


def _ends_at_logout(*, is_user: bool) -> list[str]:
    """A sentence, if the user's own systemd ends with the last login."""
    name = pwd.getpwuid(os.getuid()).pw_name
    if not is_user or (_LINGERING_DIR / name).exists():
        return []
    return [f"these services end when {name} logs out; `loginctl enable-linger {name}` lets them go on"]


def _say_files(files: dict[str, str]) -> None:
    for path, content in files.items():
        click.echo(f"# {path}\n{content}")

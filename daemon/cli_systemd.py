"""`dynlora systemd`: install the daemon as a service, take it away again."""

from pathlib import Path
from typing import Any

import click

from daemon.output import Options, common_options, pass_options


@click.group()
def systemd() -> None:
    """Run the daemon as a systemd service."""


def _target_options(command: Any) -> Any:
    user = click.option("--user", "is_user", is_flag=True, help="Into your own systemd, without root.")
    root = click.option("--root", type=click.Path(path_type=Path), default=Path("/"), hidden=True)
    dry = click.option("--dry-run", is_flag=True, help="Print what would be written; change nothing.")
    return user(root(dry(command)))


@systemd.command()
@_target_options
@common_options
@pass_options
def install(options: Options, *, is_user: bool, root: Path, dry_run: bool) -> None:
    """Write unit, user and inbox, and let systemd read them; nothing is started yet.

    The home is /var/lib/dynlora, or what --home says; with --user it is what every command uses.
    """
    from daemon import systemd as units

    target = _target(options, is_user=is_user, root=root)
    warnings = units.cautions(target)
    if dry_run:
        files = {str(path): content for path, content in units.render(target).items()}
        options.show({"files": files, "warnings": warnings}, lambda: _say_files(files))
        return
    written = [str(path) for path in units.install(target, units.run_command)]
    start = " ".join(target.manager("enable", "--now", units.UNIT))
    document = {"written": written, "start": start, "warnings": warnings}

    def text() -> None:
        for path in written:
            click.echo(f"wrote {path}")
        for sentence in warnings:
            click.echo(f"Warning: {sentence}", err=True)
        if not (target.home / "serving" / "current").exists():
            as_user = "" if is_user else "sudo -u dynlora "
            click.echo(f"make its home first: {as_user}{target.python} -m daemon.cli init {target.home}")
        click.echo(f"start it: {start}")

    options.show(document, text)


@systemd.command()
@_target_options
@common_options
@pass_options
def uninstall(options: Options, *, is_user: bool, root: Path, dry_run: bool) -> None:
    """Stop the service and remove its files. Home, user and group stay: they hold what was learnt."""
    from daemon import systemd as units

    target = _target(options, is_user=is_user, root=root)
    if dry_run:
        removed = [str(path) for path in units.render(target) if path.exists()]
    else:
        removed = [str(path) for path in units.uninstall(target, units.run_command)]
    verb = "would remove" if dry_run else "removed"
    options.show({"removed": removed}, lambda: click.echo("\n".join(f"{verb} {path}" for path in removed)))


def _target(options: Options, *, is_user: bool, root: Path) -> Any:
    from daemon import systemd as units

    home = options.home.absolute() if is_user or options.home_option else units.SYSTEM_HOME
    return units.Target(home=home, is_user=is_user, root=root, version=units.systemd_version())


def _say_files(files: dict[str, str]) -> None:
    for path, content in files.items():
        click.echo(f"# {path}\n{content}")

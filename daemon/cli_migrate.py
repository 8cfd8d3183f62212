"""The command that brings a home to the installed release."""

from typing import Any

import click

from daemon.output import Options, common_options, pass_options


@click.command()
@click.option("--check", "is_check", is_flag=True, help="Only say what would be done.")
@click.option("--why", default="", help="Reason, for the record.")
@common_options
@pass_options
def migrate(options: Options, *, is_check: bool, why: str) -> None:
    """After an upgrade: export the graphs anew if torch now writes other ones, as a version of its own.

    The weights and all answers stay; stop the daemon first. Nothing but this command changes graphs.
    """
    from daemon.migrate import migrate as bring_forward
    from daemon.progress import showing

    with showing() as view:
        found = bring_forward(options.existing_home(), options.config(), view, is_check=is_check, why=why)
    options.show(found, lambda: _say(found))


def _say(found: dict[str, Any]) -> None:
    click.echo(f"format {found['format']}: the one of this release")
    if found["is_current"]:
        click.echo(f"graphs: version {found['live']} has those that this release exports; nothing to do")
        return
    for name, (then, now) in found["software"].items():
        click.echo(f"{name}: {then or 'unknown'} then, {now} now")
    for name, (then, now) in found["graphs"].items():
        click.echo(f"{name}: {then[:12]} then, {now[:12]} now")
    if found["version"] is None:
        click.echo(f"would publish the weights of version {found['live']} under these graphs")
    else:
        click.echo(f"published version {found['version']}: the weights of {found['live']} under these graphs")

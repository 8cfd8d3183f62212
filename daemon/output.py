"""What all commands share: the common options, and one result as JSON or as text for people."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from daemon.config import Config
from daemon.config_sources import find_config, load_config
from daemon.home import check_home
from deploy.store import VersionStore

Function = TypeVar("Function", bound=Callable[..., Any])
DEFAULT_HOME = "./dynlora-home"


@dataclass
class Options:
    """The common options, from before or after the command's name; the later one wins."""

    home_option: Path | None = None
    config_option: Path | None = None
    as_json: bool = False

    @property
    def home(self) -> Path:
        """The home directory: --home, then DYNLORA_HOME, then ./dynlora-home."""
        return self.home_option or Path(os.environ.get("DYNLORA_HOME") or DEFAULT_HOME)

    def existing_home(self) -> Path:
        """The home, checked.

        Raises:
            ConfigError: there is none, or it belongs to another release.
        """
        check_home(self.home)
        return self.home

    def store(self) -> VersionStore:
        """The version store of the home."""
        return VersionStore(self.existing_home() / "serving")

    def config_path(self) -> Path | None:
        """The configuration file that counts; None for the defaults."""
        return find_config(self.home, self.config_option)

    def config(self) -> Config:
        """The configuration that counts."""
        return load_config(self.config_option, self.home)

    def show(self, document: Any, text: Callable[[], None]) -> None:
        """Print a command's result: the document with --json, else what `text` prints."""
        if self.as_json:
            click.echo(json.dumps(document, ensure_ascii=False, indent=2, default=str))
        else:
            text()


pass_options = click.make_pass_decorator(Options)


def common_options(function: Function) -> Function:
    """Add --home, --config and --json to a command."""
    return common_options_with(f"$DYNLORA_HOME or {DEFAULT_HOME}")(function)


def common_options_with(home_default: str) -> Callable[[Function], Function]:
    """As common_options, of a command with another home where none is named: `home_default` says which."""
    decorators = (
        click.option(
            "--home",
            "home_option",
            type=click.Path(path_type=Path, file_okay=False),
            help=f"Home directory. [default: {home_default}]",
            **_stored,
        ),
        click.option(
            "--config",
            "config_option",
            type=click.Path(path_type=Path),
            help="Configuration file. [default: $DYNLORA_CONFIG, HOME/config.toml, ./config.toml]",
            **_stored,
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document.", **_stored),
    )

    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def table(headers: list[str], rows: list[list[str]]) -> None:
    """Print aligned columns, or nothing but the headers where there are no rows."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        grid.add_column(header, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    # In a pipe nobody sees a width: cells are for grep then, and not to be folded.
    width = None if sys.stdout.isatty() else 240
    Console(highlight=False, markup=False, width=width).print(grid)


def percent(value: Any) -> str:
    """A fraction as a percentage; a dash where there is none."""
    return f"{value:.1%}" if isinstance(value, int | float) else "–"


def _store(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Remember an option that was given; one that was not must not undo an earlier one."""
    if value:
        setattr(context.find_root().ensure_object(Options), str(parameter.name), value)


_stored: dict[str, Any] = {"expose_value": False, "callback": _store, "is_eager": True}

"""The documentation cannot rot: its commands exist, its code runs, its links lead somewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

import daemon.cli
from daemon.home import create_home

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = ROOT / "README.md"
KNOWN_PROGRAMS = {"cp", "curl", "mkdir", "ls", "openssl", "python", "pip", "systemctl", "usermod"}
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(page: Path, *languages: str) -> list[str]:
    """The text of all code blocks of a page in one of the languages."""
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


def command_lines() -> list[tuple[str, str]]:
    """(page, command) for every line of every shell block of every page."""
    lines = [
        (page.relative_to(ROOT).as_posix(), line.strip().removeprefix("$ "))
        for page in PAGES
        for block in blocks(page, "console", "sh", "bash")
        for line in block.splitlines()
    ]
    return [(page, line) for page, line in lines if line and not line.startswith("#")]


def program() -> click.Group:
    """The click group behind `dynlora`."""
    group = daemon.cli.program
    assert isinstance(group, click.Group)
    return group


def options_of(command: click.Command) -> set[str]:
    """All spellings of all its options."""
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def check_dynlora(arguments: list[str]) -> None:
    """Parse one `dynlora` command as the program does, down to its subcommand's options."""
    group = program()
    with click.Context(group, info_name="dynlora") as context:
        parser = group.make_parser(context)
        _, rest, _ = parser.parse_args(list(arguments))
    assert rest, f"no subcommand in {arguments}"
    assert rest[0] in group.commands, f"dynlora has no command {rest[0]!r}"
    command = group.commands[rest[0]]
    if isinstance(command, click.Group) and len(rest) > 1:
        assert rest[1] in command.commands, f"dynlora {rest[0]} has no command {rest[1]!r}"
        command = command.commands[rest[1]]
    known = options_of(command) | {"--help"}
    used = {word.split("=")[0] for word in rest[1:] if word.startswith("-")}
    assert used <= known, f"dynlora {rest[0]} has no option {sorted(used - known)}"


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_every_command_in_the_docs_exists(page: str, line: str) -> None:
    """A reader can type what is printed: the program, the make target, the subcommand and its options."""
    words = shlex.split(line)
    if words[0] == "sudo":
        words = words[3:] if words[1] == "-u" else words[1:]
    name = Path(words[0]).name
    if name == "dynlora":
        check_dynlora(words[1:])
    elif name == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), page
    else:
        assert name in KNOWN_PROGRAMS, f"{page} uses {name}"


def test_shell_blocks_are_found() -> None:
    """The test above has something to check."""
    assert [line for _, line in command_lines()][:2] == ["make lint", "make test"]
    assert len(command_lines()) >= 8


def test_every_command_is_in_the_readme_and_has_help() -> None:
    """Nothing the program can do is a secret, and the table names nothing that is not there."""
    documented = set(re.findall(r"^\| `dynlora ([a-z-]+)", README.read_text(), re.MULTILINE))

    assert documented == set(program().commands)
    assert [name for name, command in program().commands.items() if not command.help] == []


def test_every_option_has_help() -> None:
    """Nor are any of its options, but for those that are hidden."""
    commands = dict(program().commands)
    for name, command in program().commands.items():
        if isinstance(command, click.Group):
            commands |= {f"{name} {part}": member for part, member in command.commands.items()}
    options = [
        (name, option)
        for name, command in commands.items()
        for option in command.params
        if isinstance(option, click.Option) and not option.hidden
    ]

    assert len(options) > 60
    assert [(name, option.opts) for name, option in options if not option.help] == []


def test_options_in_the_command_table_exist() -> None:
    """The table's options are real ones."""
    for name, row in re.findall(r"^\| `dynlora ([a-z-]+)(.*)$", README.read_text(), re.MULTILINE):
        command = program().commands[name]
        family = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
        used = set(re.findall(r"--[a-z-]+", row))
        assert used <= set().union(*(options_of(member) for member in family)), name


def test_the_readme_starts_with_two_commands() -> None:
    """A newcomer needs no more than these."""
    first, *_ = blocks(README, "console")

    assert first.split("\n")[:-1] == ["make demo", "make test"]


def test_the_tree_in_the_readme_is_the_tree() -> None:
    """Every line of the annotated tree names something that exists, every package is in it."""
    tree = next(block for block in blocks(README, "text") if block.startswith("dynlora/"))
    named = [line.split()[0] for line in tree.splitlines()]
    parents = ["dynlora/" if line.startswith("  ") else "" for line in tree.splitlines()]

    missing = [p + n for p, n in zip(parents, named, strict=True) if not (ROOT / p / n).exists()]

    assert missing == []
    assert {"dynlora/", "deploy/", "daemon/", "tests/", "docs/"} <= set(named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page: Path) -> None:
    """No link to a file that was moved."""
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]

    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_decision_is_listed() -> None:
    """The index of docs/adr names every record."""
    index = (ROOT / "docs/adr/README.md").read_text()

    assert [r.name for r in (ROOT / "docs/adr").glob("0*.md") if f"({r.name})" not in index] == []


def test_changelog_and_package_have_one_version() -> None:
    """The newest entry of the changelog that is released is the version that is installed."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## \[(\d.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert newest is not None
    assert newest[1] == version


def test_every_dependency_has_its_reason() -> None:
    """docs/adr/0005 names each requirement of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    required = {
        re.split(r"[<>=\[ ]", line)[0] for group in (project["dependencies"], *extras) for line in group
    }
    reasons = (ROOT / "docs/adr/0005-dependencies.md").read_text()

    assert sorted(name for name in required if name not in reasons) == []


def test_python_in_the_readme_runs(tmp_path: Path, version_maker: Any) -> None:
    """The snippets work as printed on a fresh home with the bundled model, in one go."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    create_home(tmp_path / "dynlora-home")
    shutil.rmtree(tmp_path / "dynlora-home" / "serving")
    version_maker.publish_first(tmp_path / "dynlora-home" / "serving", ("shoes", "hat", "dress"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    code = "\n".join(blocks(README, "python"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert re.match(r"0 \[\('(shoes|hat|dress)', 0\.\d+\)", done.stdout), done.stdout

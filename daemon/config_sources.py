"""Where the configuration comes from, a file and the environment, and complaints in the user's words."""

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from daemon.config import Config, valid_keys
from daemon.environment import Given, overlaid, variables
from daemon.errors import ConfigError

_OWN_FOLDERS = ("spool", "serving", "exams", "requests")


def find_config(
    home: Path, explicit: Path | None = None, *, environ: Mapping[str, str] | None = None
) -> Path | None:
    """The file to load: `explicit`, then DYNLORA_CONFIG, then HOME/config.toml, then ./config.toml, or None.

    Raises:
        ConfigError: a file that was asked for by name is not there.
    """
    environ = os.environ if environ is None else environ
    asked = [("--config", explicit), ("DYNLORA_CONFIG", environ.get("DYNLORA_CONFIG"))]
    for origin, name in asked:
        if name:
            path = Path(name)
            if not path.is_file():
                raise ConfigError(
                    f"{path} (from {origin}) is not a file; give the path of an existing configuration"
                )
            return path
    return next((path for path in (home / "config.toml", Path("config.toml")) if path.is_file()), None)


def load_config(explicit: Path | None, home: Path, *, environ: Mapping[str, str] | None = None) -> Config:
    """The configuration of a home: the file that find_config names, and over it the environment.

    Raises:
        ConfigError: as find_config and read_config, or the inbox is where the daemon keeps its own files.
    """
    environ = os.environ if environ is None else environ
    path, given = find_config(home, explicit, environ=environ), variables(environ, dict(valid_keys()))
    config = read_config(path, given)
    _check_inbox(config, home, _sources(("inbox", "path"), path, given))
    return config


def _check_inbox(config: Config, home: Path, said_by: str) -> None:
    if not config.inbox.path:
        return
    inbox, home = config.inbox_dir(home).resolve(), home.resolve()
    own = next((name for name in _OWN_FOLDERS if inbox.is_relative_to(home / name)), None)
    if own is None and not home.is_relative_to(inbox):
        return
    where = f"in {own}/ of the home {home}" if own else f"the home {home} itself or a folder around it"
    raise ConfigError(
        f"{said_by}: inbox.path is {config.inbox.path!r}, which is {where}: the daemon would take its own "
        f"files for drops; expected a folder that holds nothing but drops"
    )


def read_config(path: Path | None, given: Given = MappingProxyType({})) -> Config:
    """Read and check one file, and what the environment says instead.

    Raises:
        ConfigError: one line per problem, each naming file or variable, key, value, what was expected, and
            for an unknown key the nearest valid one.
    """
    table = overlaid({} if path is None else _read_table(path), given)
    try:
        config = Config.model_validate(table)
    except ValidationError as error:
        problems = error.errors()
        told = [f"{_sources(problem['loc'], path, given)}: {_explain(problem)}" for problem in problems]
        raise ConfigError("\n".join(told)) from error
    return _with_inbox(config, path, given)


def _read_table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give a readable file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; config.example.toml shows the form") from error


def _sources(location: Sequence[str | int], path: Path | None, given: Given) -> str:
    """Who says what stands there: the variable of a key, else the file, or both of a whole section."""
    dotted = ".".join(map(str, location[:2]))
    if dotted in given:
        return given[dotted][0]
    of_section = [name for key, (name, _) in given.items() if key.startswith(f"{dotted}.")]
    return " and ".join([*([] if path is None else [str(path)]), *of_section])


def _with_inbox(config: Config, path: Path | None, given: Given) -> Config:
    if not config.inbox.path:
        return config
    is_in_file = path is not None and "inbox.path" not in given
    folder = path.parent if path is not None and is_in_file else Path.cwd()
    inbox = (folder / Path(config.inbox.path).expanduser()).resolve()
    if not inbox.is_dir():
        said_by = _sources(("inbox", "path"), path, given)
        raise ConfigError(
            f"{said_by}: inbox.path is {config.inbox.path!r}, but {inbox} is not a folder; "
            f"create it or correct the path"
        )
    return config.model_copy(update={"inbox": config.inbox.model_copy(update={"path": str(inbox)})})


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggestion(key, is_section=isinstance(value, dict))}"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        return f"{key}: {message}" if isinstance(value, dict) else f"{key} is {value!r}; {message}"
    if problem["type"] == "model_type":
        return f"{key} is {value!r}; expected a section, written as [{key}]"
    return f"{key} is {value!r}; {problem['msg'].replace('Input should be', 'expected')}"


def _suggestion(key: str, *, is_section: bool) -> str:
    sections = [f"[{name}]" for name in Config.model_fields]
    keys = [name for name, _ in valid_keys()]
    if is_section:
        near = difflib.get_close_matches(f"[{key}]", sections, n=1, cutoff=0.5)
    else:
        same_name = [name for name in keys if name.rpartition(".")[2] == key.rpartition(".")[2]]
        near = same_name or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; the sections are {', '.join(sections)}; config.example.toml lists every key"

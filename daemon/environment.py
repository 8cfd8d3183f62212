"""Settings from the environment: DYNLORA_LEARNING_STEPS=40 is `steps` of [learning]. Pure; checks nothing.

Names with one word after the prefix (DYNLORA_HOME, DYNLORA_CONFIG, what hooks are given) are no settings.
"""

import tomllib
from collections.abc import Mapping
from typing import Any

PREFIX = "DYNLORA_"
Given = Mapping[str, tuple[str, Any]]  # dotted key → name of the variable, value


def variable_of(key: str) -> str:
    """The variable of a dotted key."""
    return PREFIX + key.replace(".", "_").upper()


def variables(environ: Mapping[str, str], defaults: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """What the environment says, of keys that do not exist too.

    Args:
        defaults: the valid keys; text is taken as it is where the default is text, else read as TOML.
    """
    found = {}
    for name in sorted(environ):
        section, _, key = name.removeprefix(PREFIX).lower().partition("_")
        if name.startswith(PREFIX) and key:
            dotted = f"{section}.{key}"
            found[dotted] = (name, _value(environ[name], defaults.get(dotted)))
    return found


def overlaid(table: Mapping[str, Any], given: Given) -> dict[str, Any]:
    """A file's content with what the environment says instead."""
    merged = dict(table)
    for dotted, (_, value) in given.items():
        section, _, key = dotted.partition(".")
        before = merged.get(section, {})
        if isinstance(before, dict):  # else the file is wrong, and told of
            merged[section] = before | {key: value}
    return merged


def _value(text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text

"""Who did what to a version, when and why: from its manifest, and from the events told since.

The manifest is the truth about how a version came about. What happened to it later (made live again, pinned,
thinned, rebuilt) only events.jsonl tells; a rotated file that was deleted takes its part of that away.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from daemon.recovery import publication
from deploy.manifest import Manifest

_AUTOMATIC = "the daemon"
_WORDS = {
    "initialised": "published as the first version",
    "published": "published",
    "promoted": "promoted from held",
    "reverted": "published without the batch",
    "rolled_back": "made live and pinned",
    "unpinned": "released from its pin",
    "thinned": "thinned",
    "pruned": "pruned",
    "rebuilt": "rebuilt",
}


def origin(manifest: Manifest) -> dict[str, Any]:
    """`operator` and `why` of a version: a person's, or the gate's rules that it passed."""
    told = publication(manifest)
    why = told["why"]
    if why is None and manifest.decision is not None:
        why = "; ".join(rule.detail for rule in manifest.decision.rules)
    return {"operator": manifest.operator, "why": why}


def history(events: Iterable[Mapping[str, Any]], version: int) -> list[dict[str, Any]]:
    """The events that concern one version, oldest first; a roll-back away from it is one too."""
    return [
        dict(event)
        for event in events
        if event["event"] in _WORDS and version in (event.get("version"), event.get("before"))
    ]


def sentence(event: Mapping[str, Any], version: int) -> str:
    """One event for people: when, what, who, why."""
    moment = datetime.fromisoformat(str(event["at"]))
    what = _WORDS[event["event"]]
    if event["event"] == "rolled_back" and event.get("before") == version != event.get("version"):
        what = f"rolled back to version {event['version']}"
    why = f": {event['why']}" if event.get("why") else ""
    return f"{moment:%Y-%m-%d %H:%M:%S} {what} by {event.get('who') or _AUTOMATIC}{why}"

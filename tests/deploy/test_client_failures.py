"""What the client does about versions that cannot be used: the old one answers, and someone is told."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from deploy import client, target
from deploy.client import Client, ClientEvent
from deploy.errors import ManifestError, StoreError, VerifyError
from deploy.manifest import file_record
from deploy.runtime import LoadedVersion
from tests.deploy.swaps import PICTURES, count_loads, kinds, point, wait_for


def _cut_short(directory: Path) -> None:
    content = (directory / "weights.safetensors").read_bytes()
    _replace(directory / "weights.safetensors", content[: len(content) // 2])


def _wrong_bytes(directory: Path) -> None:
    content = bytearray((directory / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    _replace(directory / "weights.safetensors", bytes(content))


def _wrong_parity(directory: Path) -> None:
    """Other weights than the reference was computed with, correctly recorded in the manifest."""
    shutil.copyfile(directory.parent / "0" / "weights.safetensors", directory / ".tmp-weights")
    (directory / ".tmp-weights").replace(directory / "weights.safetensors")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"]["weights.safetensors"] = file_record(directory / "weights.safetensors").model_dump()
    _replace(directory / "manifest.json", json.dumps(manifest).encode())


def _no_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def _no_weights(directory: Path) -> None:
    (directory / "weights.safetensors").unlink()


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


BAD = {
    "weights cut short": (_cut_short, VerifyError, "weights.safetensors has "),
    "wrong hash": (_wrong_bytes, VerifyError, "has other content than was published"),
    "wrong parity": (_wrong_parity, VerifyError, "computes other embeddings here than torch did"),
    "no manifest": (_no_manifest, ManifestError, "manifest.json does not exist"),
    "no weights": (_no_weights, VerifyError, "weights.safetensors is missing"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_version_leaves_the_old_one_serving(
    kind: str, serving: Path, events: list[ClientEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reported once, tried once, tried again when it changes, and goes live when it is mended."""
    spoil, error_type, message = BAD[kind]
    loads, bad = count_loads(monkeypatch), serving / "versions" / "1"
    shutil.copytree(bad, serving / "good")
    spoil(bad)
    with Client(serving, poll_seconds=0.01, on_event=events.append) as own:
        point(serving, 1)
        wait_for(lambda: own.last_error)
        time.sleep(0.3)  # thirty polls

        assert own.classify(PICTURES[:1])[0].version == 0
        assert isinstance(own.last_error, error_type)
        assert message in str(own.last_error)
        assert kinds(events) == [("loaded", 0), ("rejected", 1)]
        assert message in events[1].detail
        assert loads == ["0", "1"]

        (bad / "note.txt").write_text("changed, but no better")
        wait_for(lambda: len(loads) == 3)
        assert own.version == 0

        for path in (serving / "good").iterdir():
            path.replace(bad / path.name)
        wait_for(lambda: own.version == 1)
        assert own.last_error is None


def test_a_good_version_after_a_bad_one_goes_live(
    following: Client, serving: Path, events: list[ClientEvent]
) -> None:
    """The client is not stuck on what it refused."""
    _cut_short(serving / "versions" / "1")
    point(serving, 1)
    wait_for(lambda: following.last_error)
    point(serving, 2)
    wait_for(lambda: ("released", 0) in kinds(events))

    assert following.last_error is None
    assert kinds(events) == [("loaded", 0), ("rejected", 1), ("loaded", 2), ("released", 0)]


def test_pointing_back_at_the_live_version_clears_the_error(following: Client, serving: Path) -> None:
    """After a roll-back from a bad version nothing is loaded and nothing is wrong any more."""
    _no_weights(serving / "versions" / "1")
    point(serving, 1)
    wait_for(lambda: following.last_error)
    point(serving, 0)
    wait_for(lambda: following.last_error is None)

    assert following.version == 0


def test_current_leading_nowhere_later_leaves_the_old_version_serving(
    following: Client, serving: Path, events: list[ClientEvent]
) -> None:
    """A link to a directory that is gone, and then no link at all, are each reported once."""
    point(serving, 77)
    wait_for(lambda: len(events) == 2)
    (serving / "current").unlink()
    wait_for(lambda: len(events) == 3)
    time.sleep(0.2)  # ten polls

    assert following.classify(PICTURES[:1])[0].version == 0
    assert kinds(events)[1:] == [("rejected", None), ("rejected", None)]
    assert "versions/77, which does not exist" in events[1].detail
    assert "current is missing" in events[2].detail
    point(serving, 2)
    wait_for(lambda: following.version == 2)


def test_current_leading_nowhere_at_start_is_a_clear_error(serving: Path, tmp_path: Path) -> None:
    """The error names the link, where it leads, and a way out; no thread is left behind."""
    threads = threading.active_count()
    point(serving, 99)
    with pytest.raises(StoreError, match=r"current points at versions/99.*not exist.*rollback --to 2"):
        Client(serving)
    (serving / "current").unlink()
    with pytest.raises(StoreError, match="current is missing"):
        Client(serving)
    with pytest.raises(StoreError, match="holds no version yet"):
        Client(tmp_path / "nowhere")

    assert threading.active_count() == threads


def test_a_damaged_live_version_at_start_is_a_clear_error(serving: Path) -> None:
    """There is no older version to fall back to, so the constructor says what is wrong."""
    _cut_short(serving / "versions" / "0")

    with pytest.raises(VerifyError, match=r"versions/0/weights\.safetensors has \d+ bytes, expected \d+"):
        Client(serving)


def test_a_switch_during_the_first_load_is_followed(serving: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the version to start on is pruned while it loads, the one that replaced it is taken."""

    def load(directory: Path, **options: Any) -> LoadedVersion:
        if directory.name == "0":
            point(serving, 2)
            (directory / "weights.safetensors").unlink()
        return LoadedVersion(directory, **options)

    monkeypatch.setattr(client, "LoadedVersion", load)
    with Client(serving) as own:
        assert own.version == 2


def test_a_failure_of_the_machine_is_tried_again(
    serving: Path, events: list[ClientEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little memory or too many open files pass: unlike a bad version, they are retried unchanged."""
    failures = [MemoryError(), OSError(24, "Too many open files"), OSError(5, "Input/output error")]

    def load(directory: Path, **options: Any) -> LoadedVersion:
        if directory.name == "1" and failures:
            raise failures.pop(0)
        return LoadedVersion(directory, **options)

    monkeypatch.setattr(client, "LoadedVersion", load)
    monkeypatch.setattr(target, "_FIRST_PAUSE_SECONDS", 0.05)
    with Client(serving, poll_seconds=0.01, on_event=events.append) as own:
        point(serving, 1)
        wait_for(lambda: own.version == 1)

    assert failures == []
    assert kinds(events)[:3] == [("loaded", 0), ("rejected", 1), ("loaded", 1)]


def test_a_lack_of_memory_told_as_a_bad_version_passes_without_a_second_report(
    serving: Path, events: list[ClientEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime tells bad_alloc in its own words; the unchanged version is tried again and goes live."""
    failures = [VerifyError("ONNX Runtime cannot load it: std::bad_alloc") for _ in range(3)]

    def load(directory: Path, **options: Any) -> LoadedVersion:
        if directory.name == "1" and failures:
            raise failures.pop()
        return LoadedVersion(directory, **options)

    monkeypatch.setattr(client, "LoadedVersion", load)
    monkeypatch.setattr(target, "_LONGEST_PAUSE_SECONDS", 0.05)
    with Client(serving, poll_seconds=0.01, on_event=events.append) as own:
        point(serving, 1)
        wait_for(lambda: own.version == 1)

    assert failures == []
    assert kinds(events)[:3] == [("loaded", 0), ("rejected", 1), ("loaded", 1)]


def test_pauses_between_attempts_grow_to_a_minute() -> None:
    """A machine in trouble is left alone for longer each time; an unchanged version that is bad for long."""
    failure, pauses = None, []
    for _ in range(9):
        failure = target.Failure.of(OSError(), "same", failure, now=100.0)
        pauses.append(failure.pause_seconds)
    damaged = target.Failure.of(VerifyError(), "same", failure, now=100.0)

    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert failure is not None
    assert (failure.covers("same", 159.9), failure.covers("same", 160.0)) == (True, False)
    assert (failure.covers("other", 100.0), damaged.covers("other", 100.0)) == (False, False)
    assert (damaged.covers("same", 159.9), damaged.covers("same", 160.0)) == (True, False)
    assert target.Failure.of(OSError(), "other", failure, now=100.0).pause_seconds == 1

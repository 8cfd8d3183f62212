import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deploy.errors import ManifestError
from deploy.manifest import (
    ClassEntry,
    ClassesFile,
    FileRecord,
    Manifest,
    class_key,
    file_record,
    load_classes,
    load_manifest,
    record_files,
    save_classes,
    save_manifest,
)

BATCH = {
    "id": "1-cats",
    "classes": ["cat"],
    "images": {"train": 3, "tune": 1, "exam": 1},
    "content_sha256": "0" * 64,
}


def manifest(**changes: Any) -> Manifest:
    """A plausible manifest, with changes."""
    fields: dict[str, Any] = {
        "version": 1,
        "parent": 0,
        "kind": "update",
        "batch": BATCH,
        "lineage": [{"batch": "1-cats", "delta_sha256": "1" * 64}],
        "architecture": "ViT-B-16",
        "embed_dim": 128,
        "context_length": 77,
        "logit_scale": 100.0,
        "files": {"a": {"sha256": "2" * 64, "bytes": 5}},
        "metrics": {"exam": {"1-cats": {"before": 0.1, "after": 0.8}}},
        "decision": {"outcome": "publish", "rules": [{"rule": "gain", "passed": True, "detail": "+70"}]},
    }
    return Manifest(**(fields | changes))


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    """Writing and reading a manifest loses nothing, and its schema number is in the file."""
    save_manifest(tmp_path, manifest())
    assert load_manifest(tmp_path) == manifest(created_at=load_manifest(tmp_path).created_at)
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["schema"] == 1
    assert list(written)[:5] == ["schema", "version", "parent", "kind", "batch"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 2}, "schema: .* written by another dynlora"),
        ({"colour": "red"}, "colour: Extra inputs"),
        ({"version": -1}, "version: .*greater than or equal to 0"),
        ({"created_at": "2026-01-01T00:00:00"}, "created_at: .*timezone"),
    ],
)
def test_an_unusable_manifest_names_the_file_the_field_and_the_value(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """Whoever reads the error knows where to look."""
    fields = json.loads(manifest().model_dump_json(by_alias=True)) | changes
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(ManifestError, match=rf"(?s){tmp_path}/manifest.json cannot be used: {said}"):
        load_manifest(tmp_path)


def test_a_missing_or_torn_manifest_is_a_manifest_error(tmp_path: Path) -> None:
    """A directory without a whole manifest is no version."""
    with pytest.raises(ManifestError, match=r"manifest\.json does not exist"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 1, "versi')
    with pytest.raises(ManifestError, match="Invalid JSON"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parent": None}, "no parent"),
        ({"parent": 1}, "older than version 1"),
        ({"batch": None}, "names its batch"),
        ({"lineage": [{"batch": "1-cats", "delta_sha256": "1" * 64}] * 2}, "twice"),
    ],
)
def test_a_manifest_that_contradicts_itself_cannot_be_made(changes: dict[str, Any], said: str) -> None:
    """Such a version must not be published in the first place."""
    with pytest.raises(ValidationError, match=said):
        manifest(**changes)


@pytest.mark.parametrize(
    "spelling", ["Red T-Shirt", "red_t_shirt", " RED  t shirt ", "red -_ T\tshirt", "Red T-Shirt".upper()]
)
def test_spellings_of_one_class_have_one_key(spelling: str) -> None:
    """Case, underscores, hyphens and spaces do not make another class."""
    assert class_key(spelling) == "red t shirt"


def test_composed_and_decomposed_letters_have_one_key() -> None:
    """A folder copied from a Mac names the same class as one from Linux."""
    assert class_key("Ba\u0308ckerei") == class_key("B\u00e4ckerei") == "b\u00e4ckerei"
    assert class_key("STRASSE") == class_key("straße")


@given(st.text())
def test_the_key_of_a_key_is_itself(name: str) -> None:
    """Keys can be compared with names and with keys alike."""
    assert class_key(class_key(name)) == class_key(name)


def test_a_class_list_reads_back_in_its_order(tmp_path: Path) -> None:
    """Rows of class_embeddings.npy are found by position, so the order must stay."""
    entries = [ClassEntry(name=n, key=class_key(n), template="a {}.", batch=None) for n in ("Zebra", "ant")]
    save_classes(tmp_path, ClassesFile(classes=tuple(entries)))
    assert [entry.name for entry in load_classes(tmp_path).classes] == ["Zebra", "ant"]


def test_a_class_list_with_two_spellings_of_one_class_is_refused(tmp_path: Path) -> None:
    """One class has one row."""
    entries = [{"name": name, "key": "red shirt", "template": "a {}."} for name in ("red shirt", "Red_Shirt")]
    (tmp_path / "classes.json").write_text(json.dumps({"schema": 1, "classes": entries}))
    with pytest.raises(ManifestError, match="appear twice: red shirt"):
        load_classes(tmp_path)
    entries[1]["key"] = "another"
    (tmp_path / "classes.json").write_text(json.dumps({"schema": 1, "classes": entries}))
    with pytest.raises(ManifestError, match="must be 'red shirt', found 'another'"):
        load_classes(tmp_path)


def test_a_record_is_sha256_and_size_of_every_file_but_the_manifest(tmp_path: Path) -> None:
    """The manifest lists what lies beside it."""
    (tmp_path / "abc").write_bytes(b"abc")
    (tmp_path / "manifest.json").write_bytes(b"{}")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_record(tmp_path / "abc") == FileRecord(sha256=sha256, bytes=3)
    assert list(record_files(tmp_path)) == ["abc"]


class Counted(str):
    """A key that counts how often one is compared with another."""

    __slots__ = ()
    comparisons = 0

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__eq__(self, other)  # type: ignore[arg-type]

    __hash__ = str.__hash__


def test_each_class_is_looked_at_once_however_many_there_are() -> None:
    """Among a hundred thousand, comparing each with all others would take minutes."""
    keys = [Counted(f"kind {i}") for i in range(2000)]
    ClassesFile(
        classes=tuple(ClassEntry.model_construct(name=key, key=key, template="a {}.") for key in keys)
    )

    assert Counted.comparisons < len(keys)


def test_a_hundred_thousand_classes_are_read(tmp_path: Path) -> None:
    """A list of that length is within the limits, and read in a moment."""
    names = [f"kind of thing number {i}" for i in range(100_000)]
    entries = [{"name": name, "key": name, "template": "a {}."} for name in names]
    (tmp_path / "classes.json").write_text(json.dumps({"schema": 1, "classes": entries}))

    assert len(load_classes(tmp_path).classes) == len(names)

"""Archives from strangers: what is unpacked, what is passed over, what is refused whole."""

import io
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from daemon.archive import extract
from daemon.config import InboxConfig
from daemon.errors import ArchiveError


def contents(bench, count: int = 5) -> list[tuple[str, bytes]]:
    """Pictures of one class, as (name, bytes)."""
    folder = bench.class_folder("dress", count, under=bench.home / "pictures")
    return [(f"dress/{path.name}", path.read_bytes()) for path in sorted(folder.iterdir())]


def pack(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """An archive of the kind that its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in members:
                packed.writestr(name, content)
    else:
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as packed:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tgz"])
@pytest.mark.parametrize("wrapper", ["", "spring/"])
def test_an_archive_is_a_batch_folder_packed(bench, suffix: str, wrapper: str) -> None:
    """With or without its own folder around the class folders."""
    members = [(wrapper + name, content) for name, content in contents(bench)]
    more = [(name.replace("dress", "hat"), content + b"\0") for name, content in members]
    pack(bench.inbox / f"spring{suffix}", members + more)

    messages = bench.settle()

    batch = bench.only("queued")
    assert messages == ["000001-spring is queued: 10 images of dress, hat"]
    assert bench.names_and_counts(batch) == {"dress": 5, "hat": 5}
    assert batch.kind == "archive"
    assert (bench.spool.path(batch.id) / "source" / f"spring{suffix}").is_file()


def test_an_archive_of_images_is_the_class_it_is_named_after(bench) -> None:
    """As a class folder would be."""
    pack(bench.inbox / "Dress.zip", [(name.removeprefix("dress/"), c) for name, c in contents(bench)])

    bench.settle()

    assert bench.names_and_counts(bench.only("queued")) == {"Dress": 5}


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_members_that_lead_outside_are_passed_over(bench, suffix: str) -> None:
    """Nothing is written outside; the rest is learnt; each is named with what to do."""
    (_, content), *rest = contents(bench, 6)
    hostile = ["../up.png", "dress/../../../up.png", "/abs.png", "C:/abs.png"]
    before = {path for path in bench.home.rglob("*") if path.suffix == ".png"}
    archive = pack(bench.inbox / f"spring{suffix}", [*rest, *((name, content) for name in hostile)])
    sent = archive.read_bytes()

    bench.settle()

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"dress": 5}
    reasons = {item.sentence for item in batch.set_aside}
    assert len(reasons) == 4
    assert f"spring{suffix}/../up.png was set aside: its path leads out of the archive (..); " in str(reasons)
    assert f"spring{suffix}/abs.png was set aside: its path is absolute; pack it with a path" in str(reasons)
    assert not Path("/abs.png").exists()
    spool = bench.spool.root
    assert {p for p in bench.home.rglob("*.png") if spool not in p.parents} == before
    assert not archive.exists()
    assert (bench.spool.path(batch.id) / "source" / archive.name).read_bytes() == sent


def test_links_and_devices_in_a_tar_are_passed_over(bench, tmp_path: Path) -> None:
    """Also a link that later members would be written through."""
    members = contents(bench)
    archive = pack(bench.inbox / "spring.tar", members)
    with tarfile.open(archive, "a") as packed:
        for name, kind, target in (
            ("dress/soft.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("dress/hard.png", tarfile.LNKTYPE, "dress/0.png"),
            ("dress/pipe.png", tarfile.FIFOTYPE, ""),
            ("hat", tarfile.SYMTYPE, str(tmp_path)),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            packed.addfile(info)
        through = tarfile.TarInfo("hat/through.png")
        through.size = len(members[0][1])
        packed.addfile(through, io.BytesIO(bytes(through.size)))

    bench.settle()

    batch = bench.only("queued")
    aside = {Path(item.file).name: item.reason for item in batch.set_aside}
    assert bench.names_and_counts(batch) == {"dress": 5}
    assert {aside[name] for name in ("soft.png", "hard.png")} == {
        "it is a link, and links are never followed; pack the file itself"
    }
    assert aside["pipe.png"] == "it is neither a file nor a folder; pack image files"
    assert not (tmp_path / "through.png").exists()


def test_a_link_in_a_zip_is_passed_over(bench) -> None:
    """Zip keeps links as small files with a mode."""
    archive = pack(bench.inbox / "spring.zip", contents(bench))
    info = zipfile.ZipInfo("dress/link.png")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr(info, "/etc/passwd")

    bench.settle()

    (item,) = bench.only("queued").set_aside
    assert item.sentence.startswith("spring.zip/dress/link.png was set aside: it is a link")


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_a_bomb_is_refused_and_kept(bench, suffix: str) -> None:
    """By its ratio; what was unpacked of it is gone, the archive itself is in failed/."""
    zeros = bytes(100 << 20)
    archive = pack(bench.inbox / f"spring{suffix}", [("dress/0.png", zeros)])
    size = archive.stat().st_size

    (message,) = bench.settle()

    failed = bench.spool.path("000001-spring")
    assert (
        f"spring{suffix} was refused: it unpacks to more than 200 times its size, as a bomb does" in message
    )
    assert "send it in smaller parts" in bench.spool.reason("000001-spring").reason
    assert [path.name for path in failed.rglob("*") if path.is_file() and path.suffix != ".json"] == [
        f"spring{suffix}"
    ]
    assert (failed / "source" / f"spring{suffix}").stat().st_size == size


def test_a_zip_that_lies_about_its_size_gets_no_further_than_it_said(tmp_path: Path) -> None:
    """The limits hold for what is unpacked, not for what the table promises."""
    archive = pack(tmp_path / "liar.zip", [("a/0.png", bytes(3 << 20))])
    content = bytearray(archive.read_bytes())
    for marker, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        at = content.index(marker) + offset
        content[at : at + 4] = (1000).to_bytes(4, "little")
    archive.write_bytes(content)
    (tmp_path / "out").mkdir()

    passed_over = extract(archive, tmp_path / "out", config=InboxConfig())

    assert [name for name, _ in passed_over] == ["a/0.png"]
    assert not (tmp_path / "out/a/0.png").exists()


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"max_archive_members": 3}, r"it has more than 3 members \(inbox.max_archive_members\)"),
        ({"max_archive_bytes": 300}, r"it unpacks to more than 300 bytes \(inbox.max_archive_bytes\)"),
    ],
)
def test_an_archive_beyond_a_limit_is_refused(
    tmp_path: Path, suffix: str, limits: dict[str, int], told: str
) -> None:
    """The message names the key that would allow it."""
    archive = pack(tmp_path / f"a{suffix}", [(f"{n}.png", os.urandom(100)) for n in range(4)])
    (tmp_path / "out").mkdir()

    with pytest.raises(ArchiveError, match=told):
        extract(archive, tmp_path / "out", config=InboxConfig.model_validate(limits))


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("damage", ["cut", "not at all"])
def test_a_damaged_archive_fails_with_its_name(bench, suffix: str, damage: str) -> None:
    """It is kept as it came."""
    archive = pack(bench.inbox / f"spring{suffix}", contents(bench))
    content = archive.read_bytes() if damage == "cut" else b"not an archive" * 100
    archive.write_bytes(content[: len(content) // 2])

    (message,) = bench.settle()

    assert f"000001-spring was not taken in: spring{suffix} is damaged or not an archive" in message
    kept = bench.spool.path("000001-spring") / "source" / f"spring{suffix}"
    assert kept.read_bytes() == content[: len(content) // 2]


def test_a_damaged_member_is_named_and_the_rest_learnt(bench) -> None:
    """A zip knows the checksum of each file."""
    archive = bench.inbox / "spring.zip"
    members = contents(bench, 6)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for name, content in members:
            packed.writestr(name, content)
    content = bytearray(archive.read_bytes())
    content[content.index(members[0][1]) + 60] ^= 0xFF
    archive.write_bytes(content)

    bench.settle()

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"dress": 5}
    assert "spring.zip/dress/0.png was set aside: it is damaged in the archive" in batch.set_aside[0].sentence


def test_an_encrypted_archive_fails_with_what_to_do(bench) -> None:
    """There is nobody to ask for the password."""
    archive = pack(bench.inbox / "spring.zip", contents(bench))
    content = bytearray(archive.read_bytes())
    for marker, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = content.index(marker) + offset
        content[at] |= 1
    archive.write_bytes(content)

    (message,) = bench.settle()

    assert "spring.zip is encrypted; send it without a password" in message


@pytest.mark.parametrize(("offset", "why"), [(10, "compression method"), (6, "zip file version 9.9")])
def test_a_zip_packed_in_an_unknown_way_is_not_called_damaged(bench, offset: int, why: str) -> None:
    """Whether its member says so when it is read, or the table when the archive is opened."""
    archive = pack(bench.inbox / "spring.zip", contents(bench))
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] = 99
    archive.write_bytes(content)

    (message,) = bench.settle()

    assert "spring.zip is packed in a way that cannot be read here" in message
    assert why in message
    assert "pack it again as a plain zip" in message


def test_names_that_collide_or_do_not_fit_are_passed_over(tmp_path: Path) -> None:
    """The first of a name is kept; a file cannot be a folder; a name has a length."""
    members = [("a/0.png", b"first"), ("a/0.png", b"second"), ("a/0.png/x.png", b"third"), ("n" * 300, b"x")]
    archive = pack(tmp_path / "a.tar", members)
    (tmp_path / "out").mkdir()

    passed_over = extract(archive, tmp_path / "out", config=InboxConfig())

    assert (tmp_path / "out/a/0.png").read_bytes() == b"first"
    assert [reason.partition(";")[0] for _, reason in passed_over] == [
        "the archive has an earlier member of the same name",
        "the archive has an earlier member of the same name",
        "its name is too long",
    ]


def test_a_zip_made_with_backslashes_is_understood(bench) -> None:
    """Some programs on Windows write them."""
    pack(bench.inbox / "spring.zip", [(f"spring\\{n.replace('/', chr(92))}", c) for n, c in contents(bench)])

    bench.settle()

    assert bench.names_and_counts(bench.only("queued")) == {"dress": 5}


def test_unpacked_files_have_plain_rights(tmp_path: Path) -> None:
    """Neither set-user-id nor executable, whatever the archive says."""
    with tarfile.open(tmp_path / "a.tar", "w") as packed:
        info = tarfile.TarInfo("x.png")
        info.mode, info.size = 0o6777, 1
        packed.addfile(info, io.BytesIO(b"x"))
    (tmp_path / "out").mkdir()

    extract(tmp_path / "a.tar", tmp_path / "out", config=InboxConfig())

    assert (tmp_path / "out/x.png").stat().st_mode & 0o7133 == 0


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_damaged_lzma_is_damage_like_any_other(bench, kind: str) -> None:
    """A zip may hold it, and a file called .tar may be it."""
    members = contents(bench)
    archive = bench.inbox / f"spring.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as packed:
            for name, content in members:
                packed.writestr(name, content)
    else:
        archive.write_bytes(lzma.compress(pack(bench.home / "plain.tar", members).read_bytes()))
    content = bytearray(archive.read_bytes())
    content[60:900] = bytes(840)
    archive.write_bytes(content)

    bench.settle()

    (batch,) = bench.spool.ids("queued") + bench.spool.ids("failed")
    record = (bench.spool.path(batch) / "batch.json", bench.spool.path(batch) / "reason.json")
    assert "is damaged" in "".join(path.read_text() for path in record if path.exists())


def test_folders_without_end_in_an_archive_are_passed_over(bench) -> None:
    """Six hundred levels harm nobody, and the rest is learnt."""
    members = contents(bench)
    pack(bench.inbox / "spring.zip", [*members, ("d/" * 600 + "0.png", members[0][1])])

    bench.settle()

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"dress": 5}
    assert "it lies more than 64 folders deep" in batch.set_aside[0].reason


def test_a_header_that_is_no_header_is_refused_unread(tmp_path: Path) -> None:
    """The library would read a long name into memory however long it is."""
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 4 << 30
    first = tarfile.TarInfo("first.png")
    (tmp_path / "a.tar").write_bytes(first.tobuf() + name.tobuf() + bytes(4096))

    with pytest.raises(ArchiveError, match="a header in it claims 4,294,967,296 bytes, expected at most"):
        extract(tmp_path / "a.tar", tmp_path, config=InboxConfig())


def test_many_headers_in_a_row_are_damage_and_no_password(tmp_path: Path) -> None:
    """The library follows them by calling itself."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1
    first = tarfile.TarInfo("first.png")
    (tmp_path / "a.tar").write_bytes(first.tobuf() + (header.tobuf() + b"x" + bytes(511)) * 3000)

    with pytest.raises(ArchiveError, match="is damaged"):
        extract(tmp_path / "a.tar", tmp_path, config=InboxConfig())

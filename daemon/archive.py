"""Unpack an archive that a stranger sent.

Only regular files are written, each below the target, under its own name, with our permissions. Members
that point outside, links and devices are passed over by name. The limits hold for what is really unpacked,
whatever the archive's own table says. Archives inside the archive are not opened.
"""

import errno
import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Self

from daemon.config import InboxConfig
from daemon.errors import ArchiveError, NoSpaceError
from daemon.layout import MAX_LEVELS, is_text
from deploy import disk

_PIECE_BYTES = 1 << 20
_RATIO_FROM_BYTES = 64 << 20  # below this even a bomb does no harm, and flat pictures shrink a lot
_MAX_HEADER_BYTES = 1 << 20
_HEADERS = {*b"LKxgX"}  # long names, long links and pax records, which tarfile reads into memory whole
_MAX_ZIP_TABLE_BYTES = 256 << 20  # zipfile reads it into memory whole; 200,000 long names need 50 MB
_ZIP_MAX_COMMENT_BYTES = 1 << 16
_ZIP_ENTRY = struct.Struct("<28x3H12x")  # lengths of name, extra field and comment, which follow it
_ZIP_END = struct.Struct("<12xL6x")  # size of the table
_ZIP64_END = struct.Struct("<40xQ8x")  # the same, for large archives
_ZIP64_LOCATOR_BYTES = 20
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RecursionError,  # of tarfile, by header after header before a member
    ValueError,
)


class _Header(tarfile.TarInfo):
    """A header that is refused before what it announces is read, where that is no header any more."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type[0] in _HEADERS and header.size > _MAX_HEADER_BYTES):
            raise tarfile.ReadError(
                f"a header in it claims {header.size:,} bytes, expected at most {_MAX_HEADER_BYTES:,}"
            )
        return header


@dataclass(frozen=True)
class _Member:
    name: str
    kind: str  # "file", "folder", "link" or "other"


@dataclass
class _Meter:
    """What has been unpacked so far, against the limits."""

    archive: Path
    config: InboxConfig
    packed_bytes: int = 0
    unpacked_bytes: int = 0
    members: int = 0
    passed_over: list[tuple[str, str]] = field(default_factory=list)

    def count_member(self) -> None:
        self.members += 1
        if self.members > self.config.max_archive_members:
            self._refuse(
                f"it has more than {self.config.max_archive_members:,} members", "max_archive_members"
            )

    def count_bytes(self, count: int) -> None:
        self.unpacked_bytes += count
        if self.unpacked_bytes > self.config.max_archive_bytes:
            limit = f"it unpacks to more than {self.config.max_archive_bytes:,} bytes"
            self._refuse(limit, "max_archive_bytes")
        ratio = self.unpacked_bytes / max(1, self.packed_bytes)
        if self.unpacked_bytes > _RATIO_FROM_BYTES and ratio > self.config.max_archive_ratio:
            times = f"{self.config.max_archive_ratio:g} times"
            self._refuse(f"it unpacks to more than {times} its size, as a bomb does", "max_archive_ratio")

    def _refuse(self, what: str, key: str) -> None:
        raise ArchiveError(f"{self.archive.name} was refused: {what} (inbox.{key}); send it in smaller parts")


def extract(archive: Path, target: Path, *, config: InboxConfig) -> list[tuple[str, str]]:
    """Unpack into the empty directory `target`; returns (member, why it was passed over).

    Raises:
        ArchiveError: damaged, encrypted, of an unknown method, or beyond a limit. What was unpacked so far
            is left in `target`.
        NoSpaceError: the disk is full, or would be.
    """
    meter = _Meter(archive, config, packed_bytes=archive.stat().st_size)
    try:
        if archive.name.lower().endswith(".zip"):
            _extract_zip(archive, target, meter)
        else:
            _extract_tar(archive, target, meter)
    except _DAMAGE as error:
        raise ArchiveError(f"{archive.name} is damaged or not an archive ({error}); send it again") from error
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpaceError(_no_space(archive, meter.unpacked_bytes, target)) from error
        raise ArchiveError(
            f"{archive.name} is damaged or cannot be unpacked ({error}); send it again"
        ) from error
    return meter.passed_over


def _extract_zip(archive: Path, target: Path, meter: _Meter) -> None:
    _check_zip_table(archive, meter)
    with _known_methods(archive):
        packed = zipfile.ZipFile(archive)
    with packed:
        infos = packed.infolist()
        if any(info.flag_bits & 0x1 for info in infos):
            raise ArchiveError(f"{archive.name} is encrypted; send it without a password")
        declared = sum(info.file_size for info in infos)
        _check_limits_and_space(archive, declared, target, meter)
        for info in infos:
            mode = info.external_attr >> 16
            kind = "folder" if info.is_dir() else "link" if stat.S_ISLNK(mode) else "file"
            member = _Member(info.filename.replace("\\", "/"), kind)
            _unpack(member, target, meter, partial(_open_zipped, archive, packed, info))


def _open_zipped(archive: Path, packed: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    with _known_methods(archive):
        return packed.open(info)


@contextmanager
def _known_methods(archive: Path) -> Iterator[None]:
    """Turn zipfile's refusal of a compression that it does not know, or lacks here, into what to do about it.

    Raises:
        ArchiveError: zipfile raised RuntimeError, or NotImplementedError, which is one.
    """
    try:
        yield
    except RuntimeError as error:
        raise ArchiveError(
            f"{archive.name} is packed in a way that cannot be read here ({error}); "
            "pack it again as a plain zip"
        ) from error


def _check_zip_table(archive: Path, meter: _Meter) -> None:
    """Walk through the table of contents before zipfile reads it into memory whole.

    The number of members in the end record is only a claim, which zipfile does not go by: they are counted.
    """
    with archive.open("rb") as file:
        at, end = _zip_table(file)
        if at < 0:
            raise zipfile.BadZipFile("its table of contents is cut short")
        if end - at > _MAX_ZIP_TABLE_BYTES:
            raise zipfile.BadZipFile(
                f"its table of contents has {end - at:,} bytes, expected at most {_MAX_ZIP_TABLE_BYTES:,}"
            )
        while at < end:
            meter.count_member()
            file.seek(at)
            entry = file.read(_ZIP_ENTRY.size)
            if len(entry) < _ZIP_ENTRY.size:
                raise zipfile.BadZipFile("its table of contents is cut short")
            at += _ZIP_ENTRY.size + sum(_ZIP_ENTRY.unpack(entry))


def _zip_table(file: IO[bytes]) -> tuple[int, int]:
    """Where the table of contents begins and ends, by the records after it; as zipfile finds it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _ZIP_END.size - _ZIP_MAX_COMMENT_BYTES))
    tail = file.read()
    at = len(tail) - _ZIP_END.size
    if tail[at : at + 4] != b"PK\x05\x06" or tail[-2:] != b"\0\0":  # a comment comes after the record
        at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _ZIP_END.size:
        raise zipfile.BadZipFile("its end is missing")
    (table_bytes,) = _ZIP_END.unpack_from(tail, at)
    end = size - len(tail) + at
    before = end - _ZIP64_END.size - _ZIP64_LOCATOR_BYTES
    if before >= 0:
        file.seek(before)
        large, locator = file.read(_ZIP64_END.size), file.read(4)
        if large[:4] == b"PK\x06\x06" and locator == b"PK\x06\x07":
            (table_bytes,) = _ZIP64_END.unpack(large)
            end = before
    return end - table_bytes, end


def _extract_tar(archive: Path, target: Path, meter: _Meter) -> None:
    with tarfile.open(archive, "r:*", tarinfo=_Header) as packed:
        for info in packed:
            meter.count_member()
            kind = "folder" if info.isdir() else "file" if info.isreg() else "link"
            kind = kind if kind != "link" or info.issym() or info.islnk() else "other"
            member = _Member(info.name, kind)
            if kind == "file":
                _check_limits_and_space(archive, info.size, target, meter)
            _unpack(member, target, meter, partial(packed.extractfile, info))
        # tarfile takes an archive that was cut between two members for a complete one.
        assert packed.fileobj is not None
        packed.fileobj.seek(packed.offset)
        if len(packed.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")


def _check_limits_and_space(archive: Path, coming: int, target: Path, meter: _Meter) -> None:
    probe = _Meter(archive, meter.config, meter.packed_bytes, meter.unpacked_bytes)
    probe.count_bytes(coming)
    if coming > shutil.disk_usage(target).free:
        raise NoSpaceError(_no_space(archive, coming, target))


def _no_space(archive: Path, needed: int, target: Path) -> str:
    free = shutil.disk_usage(target).free
    return (
        f"{archive.name} needs {needed:,} bytes or more to unpack and the disk has {free:,} left; it is kept "
        f"and unpacked once there is space: free some"
    )


def _unpack(
    member: _Member, target: Path, meter: _Meter, open_member: Callable[[], IO[bytes] | None]
) -> None:
    reason = _why_passed_over(member)
    if reason is not None:
        meter.passed_over.append((member.name.encode("utf-8", "backslashreplace").decode(), reason))
        return
    path = target.joinpath(*_parts(member.name))
    try:
        if member.kind == "folder":
            disk.make_dirs(path)
            return
        disk.make_dirs(path.parent)
        descriptor = disk.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except (FileExistsError, NotADirectoryError):
        meter.passed_over.append(
            (member.name, "the archive has an earlier member of the same name; rename one")
        )
        return
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        meter.passed_over.append((member.name[:200], "its name is too long; shorten it"))
        return
    try:
        for piece in _pieces(open_member()):
            meter.count_bytes(len(piece))
            disk.write(descriptor, piece)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        disk.unlink(path)
        meter.passed_over.append((member.name, f"it is damaged in the archive ({error}); send it again"))
    finally:
        os.close(descriptor)


def _why_passed_over(member: _Member) -> str | None:
    parts = _parts(member.name)
    if not is_text(member.name) or "\0" in member.name:
        return "its name is not valid UTF-8; rename it and pack it again"
    if PurePosixPath(member.name).is_absolute() or (member.name[1:2] == ":" and member.name[:1].isalpha()):
        return "its path is absolute; pack it with a path inside the archive"
    if ".." in parts:
        return "its path leads out of the archive (..); pack it with a path inside"
    if len(parts) > MAX_LEVELS:
        return f"it lies more than {MAX_LEVELS} folders deep; put it into the folder of its class"
    if member.kind == "link":
        return "it is a link, and links are never followed; pack the file itself"
    if member.kind == "other" or not (parts or member.kind == "folder"):
        return "it is neither a file nor a folder; pack image files"
    return None


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts


def _pieces(source: IO[bytes] | None) -> Iterator[bytes]:
    if source is None:
        return
    with source:
        while piece := source.read(_PIECE_BYTES):
            yield piece

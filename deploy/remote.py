"""Where versions are fetched from: a folder, a web server, or an object store. Reads only, trusts nothing.

    <remote>/
      current.json              in a mirror: {"schema": 1, "version": 12, "manifest_sha256": …}
      current/manifest.json     in a serving directory, where `current` is a link
      versions/12/…

A remote gives bytes for names that we chose; what they must be is checked by deploy.pull. Sizes are
limited while reading, and redirects stay on the server that was named.
"""

import contextlib
import errno
import http.client
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy.errors import ShareError

POINTER_NAME = "current.json"
PIECE_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60.0
_MAX_POINTER_BYTES = 4096


class Pointer(BaseModel):
    """current.json: which version is live, and which manifest that is."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_number: int = Field(default=1, alias="schema", ge=1, le=1)
    version: int = Field(ge=0)
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    def to_json(self) -> bytes:
        """The content of current.json."""
        return self.model_dump_json(by_alias=True).encode()


class Remote(Protocol):
    """A place with versions. Names are relative, made of our own parts, with `/` between them."""

    def open(self, name: str, offset: int = 0) -> contextlib.AbstractContextManager[tuple[int, IO[bytes]]]:
        """Open a file for reading from ``offset`` bytes on, or from 0 where that cannot be done.

        Gives the offset that reading starts at, and the stream.

        Raises:
            FileNotFoundError: there is none of that name.
            PermissionError: it may not be read; some stores say that too where there is none.
            OSError: it cannot be read; another try may help.
        """


class FolderRemote:
    """A serving directory or a mirror on a mounted file system."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def open(self, name: str, offset: int = 0) -> Iterator[tuple[int, IO[bytes]]]:
        """See Remote."""
        with (self._folder / name).open("rb") as file:
            file.seek(offset)
            yield offset, file


class WebRemote:
    """A static file server over a serving directory or a mirror."""

    def __init__(self, url: str) -> None:
        self._base = url.rstrip("/") + "/"
        self._opener = urllib.request.build_opener(_SameServer)

    @contextlib.contextmanager
    def open(self, name: str, offset: int = 0) -> Iterator[tuple[int, IO[bytes]]]:
        """See Remote."""
        request = urllib.request.Request(self._base + urllib.parse.quote(name))  # noqa: S310 - see open_remote
        request.add_header("Accept-Encoding", "identity")  # sizes and offsets are those of the file
        if offset:
            request.add_header("Range", f"bytes={offset}-")
        try:
            with self._opener.open(request, timeout=_TIMEOUT_SECONDS) as answer:
                is_partial = answer.status == http.client.PARTIAL_CONTENT
                starts = f"bytes {offset}-"
                if is_partial and not str(answer.headers.get("Content-Range", "")).startswith(starts):
                    raise OSError(
                        errno.EIO, "the server answered with another range than was asked for", name
                    )
                yield (offset if is_partial else 0), answer
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in {http.client.NOT_FOUND, http.client.GONE}:
                raise FileNotFoundError(errno.ENOENT, "the server has no such file", name) from error
            if error.code == http.client.FORBIDDEN:
                raise PermissionError(errno.EACCES, "the server answered 403 Forbidden", name) from error
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise OSError(errno.EINVAL, "the server's file is shorter than what is here", name) from error
            raise OSError(errno.EIO, f"the server answered {error.code} {error.reason}", name) from error
        except (http.client.HTTPException, ssl.SSLError) as error:
            raise OSError(errno.EIO, f"the connection broke: {error!r}", name) from error


class _SameServer(urllib.request.HTTPRedirectHandler):
    """Follows a redirect within the server that was named, never to another one or to another protocol."""

    max_redirections = 3

    def redirect_request(  # noqa: PLR0917 - the standard library's signature
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        before, after = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if (before.scheme, before.netloc) != (after.scheme, after.netloc):
            raise OSError(
                errno.EIO,
                f"the server sends us on to {after.scheme}://{after.netloc}; give that address if meant",
                req.full_url,
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class StoreRemote:
    """An object store, through fsspec: s3:// and whatever else is installed."""

    def __init__(self, url: str) -> None:
        self._files, self._root = open_file_system(url)

    @contextlib.contextmanager
    def open(self, name: str, offset: int = 0) -> Iterator[tuple[int, IO[bytes]]]:
        """See Remote."""
        path = f"{self._root}/{name}"
        with (
            store_errors(name),
            self._files.open(path, "rb", block_size=4 * PIECE_BYTES, cache_type="readahead") as file,
        ):
            file.seek(offset)
            yield offset, file


def open_remote(address: str) -> Remote:
    """Return the remote of a path or URL; nothing is connected to yet.

    Raises:
        ShareError: the URL's scheme is unknown, or the package for it is not installed.
    """
    scheme = address.split("://", 1)[0].lower() if "://" in address else ""
    if scheme in {"http", "https"}:
        return WebRemote(address)
    if scheme in {"", "file"}:
        return FolderRemote(folder_of(address))
    return StoreRemote(address)


def folder_of(address: str) -> Path:
    """Return the folder that a path, or a file:// URL with its escapes, names."""
    if not address.startswith("file://"):
        return Path(address)
    return Path(urllib.parse.unquote(address.removeprefix("file://")))


def open_file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path within it.

    Raises:
        ShareError: the URL cannot be used, or a package is missing.
    """
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise ShareError(f"{url} needs fsspec: pip install 'dynlora[mirror]'") from error
    try:
        files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ShareError(f"{url} cannot be used: {error}. For s3:// pip install 'dynlora[mirror]'") from error
    return files, str(root).rstrip("/")


@contextlib.contextmanager
def store_errors(name: str) -> Iterator[None]:
    """Turn whatever an object store's library raises into an OSError."""
    try:
        yield
    except (OSError, ShareError):
        raise
    except Exception as error:  # every library has its own
        raise OSError(errno.EIO, f"the object store failed: {error!r}", name) from error


def read_small(remote: Remote, name: str, limit: int) -> bytes:
    """Return a whole file of at most ``limit`` bytes.

    Raises:
        ShareError: it is larger.
        FileNotFoundError, OSError: as Remote.open.
    """
    with remote.open(name) as (_, file):
        content = b""
        while len(content) <= limit and (piece := file.read(min(PIECE_BYTES, limit + 1 - len(content)))):
            content += piece
    if len(content) > limit:
        raise ShareError(f"{name} is too large there: expected at most {limit} bytes")
    return content


def read_pointer(remote: Remote) -> Pointer | None:
    """Return what current.json says; None where there is none, as in a plain serving directory.

    Raises:
        ShareError: it says nothing that can be used.
        OSError: as Remote.open.
    """
    try:
        content = read_small(remote, POINTER_NAME, _MAX_POINTER_BYTES)
    except (FileNotFoundError, PermissionError):
        return None  # if it is there and may not be read, nor may what is looked for next
    try:
        return Pointer.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ShareError(
            f"{POINTER_NAME} there cannot be used: expected schema 1, version and manifest_sha256; "
            f"{problem['msg']}"
        ) from error

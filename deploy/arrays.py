"""Reading .npy and .npz files from somewhere else: no pickle, and no more memory than the file has bytes.

A header may claim a shape of terabytes, and a zip of a few kilobytes may unpack to gigabytes. Both are
told from the headers alone, before anything is allocated.
"""

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import VerifyError

MAX_ARRAYS_BYTES = 1 << 30  # all arrays of one .npz, unpacked
_MAX_MEMBERS = 64


def read_array(path: Path) -> NDArray[Any]:
    """Read a .npy file.

    Raises:
        VerifyError: it is missing, damaged, holds objects, or its header claims another size than it has.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            _check_header(file, size)
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, RuntimeError, SyntaxError) as error:
        raise VerifyError(f"{path} cannot be read as a numpy array: {error}") from error


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read every array of a .npz file.

    Raises:
        VerifyError: it is missing, damaged, holds objects, or unpacks to more than MAX_ARRAYS_BYTES.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if unpacked > MAX_ARRAYS_BYTES or len(members) > _MAX_MEMBERS:
                raise ValueError(
                    f"expected at most {_MAX_MEMBERS} arrays of {MAX_ARRAYS_BYTES} bytes together, "
                    f"found {len(members)} of {unpacked}"
                )
            return {member.filename.removesuffix(".npy"): _read_member(archive, member) for member in members}
    # RuntimeError: encrypted, or a compression that this Python lacks.
    except (
        OSError,
        ValueError,
        EOFError,
        MemoryError,
        SyntaxError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        raise VerifyError(f"{path} cannot be used: expected numpy arrays in a zip, found {error}") from error


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        _check_header(file, member.file_size)
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _check_header(file: IO[bytes], size_bytes: int) -> None:
    """Check that the header of a .npy claims exactly the bytes that follow it.

    Raises:
        ValueError: it does not, or the array holds objects.
    """
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"expected format 1.0 or 2.0, found {version}")
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    claimed = file.tell() + math.prod(shape) * dtype.itemsize
    if claimed != size_bytes or any(side < 0 for side in shape):
        raise ValueError(
            f"its header claims shape {shape} {dtype}, that is {claimed} bytes, found {size_bytes}"
        )

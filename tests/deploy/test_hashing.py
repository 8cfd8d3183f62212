"""The hash that is computed beside the writing."""

import hashlib
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.hashing import BackgroundHash


@given(st.lists(st.binary(max_size=100), max_size=20))
def test_any_pieces_hash_as_their_concatenation(pieces: list[bytes]) -> None:
    """The same digest as hashlib gives for the whole."""
    with BackgroundHash() as digest:
        for piece in pieces:
            digest.update(memoryview(piece))

        assert digest.hexdigest() == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_the_thread_ends_also_when_the_writer_fails() -> None:
    """A full disk leaves no thread behind."""

    def write() -> None:
        with BackgroundHash() as digest:
            for _ in range(10):
                digest.update(bytes(1 << 20))
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write()

    assert not [thread for thread in threading.enumerate() if thread.name == "hash"]

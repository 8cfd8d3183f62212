"""A folder that holds nothing usable is not called empty: what is in it and why it is no use is told."""

from pathlib import Path

import pytest

from daemon.config import Config
from daemon.errors import InboxError
from daemon.submit import check, submit

LINK = "it is a link, and links are never followed; send a copy of the file itself"


def links(folder: Path, count: int) -> Path:
    """A folder of links to nowhere."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.png").symlink_to("/nowhere")
    return folder


def test_a_class_folder_of_links_is_told_of_with_their_number_and_the_reason(bench) -> None:
    """Putting four more images in is not what is missing."""
    links(bench.inbox / "dress", 5)
    links(bench.inbox / "spring" / "hat", 1)

    assert bench.settle() == [
        f"dress holds no usable file, the 5 entries in it are passed over, the first of them '0.png': {LINK}",
        f"spring holds no usable file, the only entry in it is passed over: '0.png': {LINK}",
    ]
    assert bench.step(60) == []
    assert len(list((bench.inbox / "dress").iterdir())) == 5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b".0.png", "ignored because its name starts with a dot; rename it if it was meant to be learnt"),
        (b"caf\xe9.png", "its name is not valid UTF-8; rename it and send it again"),
        (b"Thumbs.db", "ignored: the operating system or file server left it there, not a person"),
    ],
)
def test_each_kind_of_name_that_is_passed_over_gives_its_reason(bench, name: bytes, reason: str) -> None:
    """In a message that can be written down."""
    (bench.inbox / "dress").mkdir()
    Path(bench.inbox / "dress" / name.decode(errors="surrogateescape")).write_bytes(b"x")

    (message,) = bench.settle()

    assert message.startswith("dress holds no usable file, the only entry in it is passed over: ")
    assert message.endswith(reason)
    message.encode()


def test_such_a_class_in_a_batch_is_set_aside_with_the_reason(bench) -> None:
    """The others are learnt."""
    bench.class_folder("hat", under=bench.inbox / "spring")
    links(bench.inbox / "spring" / "dress", 5)

    bench.settle()

    batch = bench.only("queued")
    assert batch.set_aside[-1].sentence == (
        "spring/dress was set aside: it holds no usable file, the 5 entries in it are passed over, the first "
        f"of them '0.png': {LINK}; a class needs at least 4 (inbox.min_images_per_class): "
        "add images and drop the folder again"
    )


def test_submit_refuses_it_with_the_reason(bench, tmp_path: Path) -> None:
    """And so does the check beforehand."""
    folder = links(tmp_path / "dress", 5)

    for refuse in (lambda: submit(folder, bench.inbox), lambda: check(folder, Config())):
        with pytest.raises(InboxError, match="holds no usable file, the 5 entries in it are passed over"):
            refuse()

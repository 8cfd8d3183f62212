"""A stream of pictures: order, bad ones, bounded look-ahead, and answers as classify gives them."""

import itertools
import queue
import threading
import tracemalloc
from pathlib import Path

import pytest

from deploy.client import Client
from deploy.errors import ClientError
from deploy.stream import LOOK_AHEAD, Ahead
from tests.deploy.swaps import PICTURES, point, wait_for


def test_the_answers_come_in_order_and_are_those_of_classify(following: Client) -> None:
    """A stream is another way to ask, not another answer."""
    pictures = [PICTURES[index % 3] for index in range(20)]
    answers = list(following.classify_stream(pictures, ["cat", "boot"], unknown=True, batch_size=4))
    expected = following.classify(pictures, ["cat", "boot"], unknown=True)

    assert [answer.index for answer in answers] == list(range(20))
    for answer, classified in zip(answers, expected, strict=True):
        assert answer.version == classified.version == 0
        assert [p.label for p in answer.predictions] == [p.label for p in classified.predictions]
        assert answer.predictions[0].score == pytest.approx(classified.predictions[0].score, abs=1e-4)
        assert answer.unknown == pytest.approx(classified.unknown, abs=1e-4)


def test_a_bad_picture_does_not_end_the_stream(following: Client) -> None:
    """Its answer says what is wrong and names the version; those after it are answered."""
    answers = list(following.classify_stream([PICTURES[0], b"no picture", PICTURES[1], "/nowhere.png"]))

    assert [answer.error is None for answer in answers] == [True, False, True, False]
    assert [bool(answer.predictions) for answer in answers] == [True, False, True, False]
    assert {answer.version for answer in answers} == {0}
    assert list(following.classify_stream([])) == []


def test_a_slow_source_is_answered_picture_by_picture(following: Client) -> None:
    """A camera's picture is not kept back until a batch is full."""
    source: queue.Queue[bytes | None] = queue.Queue()
    answers = following.classify_stream(iter(source.get, None), batch_size=8)
    for index in range(3):
        source.put(PICTURES[index])
        assert next(answers).index == index
    source.put(None)
    assert next(answers, None) is None


def test_a_stream_goes_on_with_the_new_version(following: Client, serving: Path) -> None:
    """Every answer names the version it is from, and they never go back."""
    stop = threading.Event()
    endless = itertools.takewhile(lambda _: not stop.is_set(), itertools.cycle(PICTURES))
    versions = []
    for answer in following.classify_stream(endless, batch_size=2):
        versions.append(answer.version)
        if len(versions) == 4:
            point(serving, 1)
        if answer.version == 1:
            stop.set()

    assert versions == sorted(versions)
    assert set(versions) == {0, 1}


def test_the_error_of_the_source_comes_after_what_was_before_it(following: Client) -> None:
    """Nothing that arrived is lost, and the caller sees their own error."""

    def source():
        yield PICTURES[0]
        raise KeyError("camera unplugged")

    answers = following.classify_stream(source())
    assert next(answers).index == 0
    with pytest.raises(KeyError, match="camera unplugged"):
        next(answers)


def test_an_endless_source_is_read_a_bounded_number_ahead_and_no_thread_stays() -> None:
    """Leaving in the middle ends the threads; a source that is fast fills no memory."""
    taken = itertools.count()
    with Ahead(taken, lambda item: item, batch_size=3, threads=2) as ahead:
        batches = ahead.batches()
        first = [item.result() for item in next(batches)]
        assert first[0] == 0
        threads = [t for t in threading.enumerate() if t.name == "dynlora-stream"]
        wait_for(ahead._queue.full)
        # In the queue, given out, and in the reader's hand.
        assert next(taken) <= LOOK_AHEAD * 3 + 3 + 2
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_many_pictures_at_once_take_no_more_memory_than_a_few(following: Client) -> None:
    """Classify goes through a long list in parts."""
    following.classify(PICTURES)
    peaks = []
    for count in (32, 160):
        tracemalloc.start()
        following.classify([PICTURES[index % 3] for index in range(count)])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    assert peaks[1] < 1.5 * peaks[0]


def test_what_cannot_be_asked_is_refused(following: Client) -> None:
    """A wrong batch size and what is not a list at once, an empty choice with the first answer."""
    for single in ("photo.jpg", Path("photo.jpg"), b"GIF89a"):
        with pytest.raises(
            ClientError, match=r"expected a list of pictures, found a single .*put it in \[ \]"
        ):
            following.classify_stream(single)
    with pytest.raises(ClientError, match="expected a list of labels, found a single str"):
        following.classify_stream(PICTURES, "cat")
    with pytest.raises(ClientError, match="batch_size must be at least 1, found 0"):
        following.classify_stream(PICTURES, batch_size=0)
    with pytest.raises(ClientError, match="nothing to choose from"):
        next(following.classify_stream(PICTURES, []))

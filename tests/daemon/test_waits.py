"""Since when the oldest drop waits, also where a record cannot be read for a while."""

from datetime import datetime

from daemon.batch import BATCH_FILE
from daemon.waits import Waits


def test_a_record_that_could_not_be_read_once_is_read_again(bench):
    """A moment's I/O error must not make the oldest batch young for as long as it waits."""
    bench.class_folder("cups")
    bench.settle()
    batch = bench.only("queued")
    path = bench.spool.path(batch.id) / BATCH_FILE
    waits = Waits(bench.spool)
    path.rename(path.with_suffix(".away"))
    assert waits.oldest_at() is None
    path.with_suffix(".away").rename(path)

    assert waits.oldest_at() == datetime.fromisoformat(batch.received_at).timestamp()


def test_a_record_that_was_read_is_not_read_with_every_round(bench):
    """It never changes what it says of when the batch came."""
    bench.class_folder("cups")
    bench.settle()
    batch = bench.only("queued")
    waits = Waits(bench.spool)
    known = waits.oldest_at()
    (bench.spool.path(batch.id) / BATCH_FILE).unlink()

    assert known is not None
    assert waits.oldest_at() == known

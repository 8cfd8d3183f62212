"""What was held was not learnt: it may be tried again, and nobody is told otherwise."""

import json
import shutil
import subprocess
import sys

import pytest

from daemon.home import create_home
from daemon.reception import Reception
from daemon.submit import submit


def hold_first(bench, producer_id: str | None = None) -> None:
    """A batch of dresses that was held; its images are in kept/dress."""
    bench.class_folder("dress", 10, under=bench.home / "kept")
    submit(bench.home / "kept" / "dress", bench.inbox, producer_id=producer_id)
    bench.step()
    bench.spool.move("000001-dress", "held")


def test_held_content_dropped_again_is_a_new_batch(bench) -> None:
    """With the same split: what graded grades again, what was learnt from is learnt from."""
    hold_first(bench)
    shutil.copytree(bench.home / "kept" / "dress", bench.inbox / "dress")

    assert bench.settle() == ["000002-dress is queued: 10 images of dress"]

    first, second = bench.only("held"), bench.only("queued")
    assert second.duplicate_of is None
    assert second.content_sha256 == first.content_sha256
    assert {i.sha256: i.split for i in second.images} == {i.sha256: i.split for i in first.images}


def test_the_id_of_a_held_batch_given_again_is_told_plainly(bench) -> None:
    """To the log and to events.jsonl: it was held, not learnt, and another id helps."""
    hold_first(bench, "order-7")
    told = []

    def tell(*event, **fields) -> None:
        told.append((*event, fields))

    reception = Reception(bench.home, bench.config, tell=tell)
    bench.class_folder("hat", 5, under=bench.home / "kept")
    submit(bench.home / "kept" / "hat", bench.inbox, producer_id="order-7")

    reception.tick(0.0)

    why = (
        "000002-hat was not learnt: its id 'order-7' is that of 000001-dress, which was held and not "
        "published; give it another id to have it tried again"
    )
    ((event, _, fields),) = told
    assert (event, fields["why"], fields["is_held"]) == ("duplicate", why, True)
    assert bench.only("done").duplicate_of == "000001-dress"


@pytest.mark.timeout(60)
def test_submit_wait_with_the_id_of_a_held_batch_exits_with_held(bench) -> None:
    """Exit code 3 and the sentence: the program that submitted must not take it for learnt."""
    create_home(bench.home)
    hold_first(bench, "order-7")
    folder = bench.class_folder("hat", 5, under=bench.home / "kept")
    command = [sys.executable, "-m", "daemon.cli", "--home", str(bench.home), "--json"]
    program = subprocess.Popen(
        [*command, "submit", str(folder), "--id", "order-7", "--wait"], stdout=subprocess.PIPE, text=True
    )
    while program.poll() is None and not bench.spool.ids("done"):
        bench.step()

    output, _ = program.communicate()
    outcome = json.loads(output)
    assert program.returncode == 3
    assert (outcome["event"], outcome["batch"]) == ("held", "000002-hat")
    assert outcome["why"].startswith("its id 'order-7' is that of 000001-dress, which was held")

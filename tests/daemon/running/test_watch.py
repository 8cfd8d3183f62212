"""`dynlora status --watch` on a real terminal, beside a real daemon."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

from daemon.events import EventLog
from tests.daemon.running.conftest import draw_class
from tests.daemon.running.programs import ROOT, behave


def read_until(terminal: int, words: str, seconds: float = 30) -> str:
    """What the terminal shows, until the words are in it."""
    shown, deadline = "", time.monotonic() + seconds
    while words not in shown and words not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown):
        assert time.monotonic() < deadline, shown[-3000:]
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")
    return shown


def test_the_page_follows_the_work_and_ctrl_c_ends_it_with_0(quick_home, running):
    """Idle, then a batch with its steps, then the decision; the terminal is given back as it was."""
    behave(quick_home, steps=100, step_seconds=0.05)  # long enough for a page on a busy machine
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon.cli", "status", "--watch", "--home", str(quick_home)],
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "110", "LINES": "40", "PYTHONPATH": str(ROOT)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    read_until(terminal, "nothing is being learnt")
    draw_class(quick_home / "inbox" / "cups")
    read_until(terminal, "kept rank 4.0")
    read_until(terminal, "version 1 is live")
    read_until(terminal, "exam 25.0% → 75.0%")
    process.send_signal(signal.SIGINT)
    left = read_until(terminal, "\x1b[?1049l")

    assert process.wait(30) == 0
    assert "Traceback" not in left
    os.close(terminal)


def test_watching_without_a_terminal_is_refused(dynlora, home):
    """A pipe gets no escape codes; the message says what programs use."""
    for more in ([], ["--json"]):
        code, _, err = dynlora("status", "--watch", *more, "--home", home)
        assert code == 2
        assert "programs follow events.jsonl" in err


def test_status_says_how_long_the_oldest_drop_waits_and_what_was_decided_last(bench, dynlora):
    """In words and as JSON."""
    bench.drop("cups")
    bench.run()
    bench.store.roll_back(0, who="me", why="")
    bench.drop("plates")
    bench.tick_until(lambda: bench.spool.ids("queued"))

    _, out, _ = dynlora("status", "--home", bench.home)
    assert re.search(r"^oldest    has waited for \d+ s to be learnt$", out, re.MULTILINE)
    found = json.loads(dynlora("status", "--home", bench.home, "--json")[1])
    assert [entry["event"] for entry in found["decisions"]] == ["published"]
    assert re.search(
        r"^last      \d\d-\d\d \d\d:\d\d published 000001-cups: version 1, exam 25", out, re.MULTILINE
    )
    assert time.time() - 300 < found["oldest_at"] <= time.time()


def test_a_failed_batch_stands_in_the_status_with_its_reason_until_it_is_discarded(bench, dynlora):
    """Both that had a record and one that was never taken in; what became of them stays to be read."""
    (bench.home / "inbox" / "letter.zip").write_bytes(b"no archive")
    (bench.home / "inbox" / "cups").mkdir()
    (bench.home / "inbox" / "cups" / "0.png").write_bytes(b"no image")
    bench.run()
    bench.service.stop()
    first, second = bench.spool.ids("failed")
    _, out, _ = dynlora("status", "--home", bench.home)
    assert re.search(rf"^failed    {first}, {second}$", out, re.MULTILINE)
    assert re.search(rf"^last .* failed {first}: .* (damaged|usable)", out, re.MULTILINE)

    dynlora("discard", first, "--why", "junk", "--home", bench.home)
    dynlora("discard", second, "--why", "junk", "--home", bench.home)

    _, out, _ = dynlora("status", "--home", bench.home)
    assert not re.search(r"^failed", out, re.MULTILINE)
    assert re.search(r"^discarded 2$", out, re.MULTILINE)
    assert re.search(rf"^last .* discarded {second}: junk$", out, re.MULTILINE)
    found = json.loads(dynlora("status", "--home", bench.home, "--json")[1])
    assert found["discarded"] == found["batches"]["failed"] == [first, second]
    assert [bench.spool.reason(batch).reason.partition(":")[2] for batch in (first, second)] == [" junk"] * 2


def test_the_tail_of_the_events_is_their_end_over_a_rotation_too(tmp_path):
    """Whole lines only, oldest first, and no more read than asked."""
    log = EventLog(tmp_path, max_bytes=2000)
    for number in range(50):
        log.append("published", version=number)
    everything = [entry["version"] for entry in log.read()]

    assert everything == list(range(50))
    assert [entry["version"] for entry in log.tail(1 << 20)] == everything[-len(log.tail(1 << 20)) :]
    for size in (100, 150, 700, 3000):
        few = [entry["version"] for entry in log.tail(size)]
        assert few == everything[len(everything) - len(few) :]
        assert len(few) <= size // 60
    assert [entry["version"] for entry in log.tail(150)] == [49]

"""Hooks in a daemon's life: called for what was decided, and never in its way."""

import json

from daemon.config import HooksConfig
from tests.daemon.running.conftest import QUICK, QUICK_TOML, Bench, draw_class
from tests.daemon.running.programs import behave, start_daemon


def test_a_hook_that_hangs_delays_no_batch(home):
    """Two batches are learnt while the first call has not ended."""
    hooks = HooksConfig(command=["/bin/sleep", "300"], timeout_seconds=3600)
    bench = Bench(home, QUICK.model_copy(update={"hooks": hooks}))
    bench.service.start()
    for name in ("cups", "plates"):
        bench.drop(name)
        bench.tick_until(lambda: bench.spool.ids("queued") or bench.spool.ids("work"))
        count = bench.store.current()
        bench.tick_until(lambda count=count: bench.store.current() > count)

    assert bench.store.current() == 2
    bench.service._observers._hooks._stop_seconds = 0.1
    bench.service.stop(lambda: True)


def test_run_once_calls_the_hooks_before_it_ends(home, tmp_path):
    """One published, one held: both are delivered, and told in events.jsonl."""
    out = tmp_path / "out.jsonl"
    command = f'["/bin/sh", "-c", "cat >> {out}"]'
    (home / "config.toml").write_text(f"{QUICK_TOML}[hooks]\ncommand = {command}\n")
    behave(home, exams=[[40, 10, 20, 0]])
    draw_class(home / "inbox" / "cups" / "cups")
    _, err = start_daemon(home, once=True).communicate(timeout=60)
    behave(home, exams=[[40, 10, 0, 0]])
    draw_class(home / "inbox" / "plates" / "plates")
    start_daemon(home, once=True).communicate(timeout=60)

    assert [json.loads(line)["event"] for line in out.read_text().splitlines()] == ["published", "held"], err
    events = [json.loads(line) for line in (home / "events.jsonl").read_text().splitlines()]
    done = [entry for entry in events if entry["event"] == "hook_done"]
    assert [(entry["of"], entry["batch"]) for entry in done] == [
        ("published", "000001-cups"),
        ("held", "000002-plates"),
    ]

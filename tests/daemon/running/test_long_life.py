"""Three hundred batches: the daemon stays as small as it was, its home within what is meant to stay."""

import signal
import time

import pytest

from daemon.budget import used_bytes
from daemon.home import create_home
from daemon.spool import Spool
from deploy.store import VersionStore
from tests.daemon.drops import IMAGES
from tests.daemon.running.long_life import live, sizes, tell
from tests.daemon.running.programs import behave, start_daemon
from tests.deploy.tiny import found_tiny

CONFIG = """
[inbox]
settle_seconds = 0.0
gather_seconds = 0.0
scan_seconds = 0.2
[retention]
done_days = 0.0
[learning]
standby = false
"""
BATCHES = 300
RECORD_BYTES = 200_000  # of one batch for ever: manifest, delta, class list and embeddings, batch.json, logs


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_hundreds_of_batches_leave_the_daemon_as_small_as_it_was(tmp_path):
    """Under 20 MB more memory, no descriptor and no thread more; images gone, few versions whole."""
    home = tmp_path / "home"
    create_home(home)
    found_tiny(home / "serving")
    (home / "config.toml").write_text(CONFIG)
    behave(home, grade_all=True, steps=1, step_seconds=0)
    log = (tmp_path / "daemon.log").open("w")
    process = start_daemon(home, log=log)
    started = time.monotonic()
    try:
        before, after = live(process, home, warm=10, count=BATCHES, standing_by=0)
        tell(before, after, home, time.monotonic() - started)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        # What is done is swept at a start, and then every ten minutes.
        again = start_daemon(home, once=True)
        again.communicate(timeout=60)
        assert again.returncode == 0
    finally:
        process.kill()
        log.close()

    store = VersionStore(home / "serving")
    print(sizes(home))
    assert store.versions() == list(range(BATCHES + 1))
    assert after.resident_bytes - before.resident_bytes < 20e6
    assert (after.descriptors, after.threads) == (before.descriptors, before.threads)
    assert len(store.full_versions()) <= 4  # store.keep_full and the first one
    whole = sum(record.bytes for record in store.live_manifest().files.values())
    assert used_bytes(home) < 4 * whole + BATCHES * (RECORD_BYTES + IMAGES * 10_000)
    assert not list((home / "spool" / "done").glob("*/images/*/*"))
    assert len(Spool(home).ids("done")) == BATCHES

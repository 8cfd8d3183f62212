"""The real worker, batch after batch: none of what it needs stays in the daemon's process."""

import signal
import subprocess
import time

import pytest

from daemon.home import create_home
from daemon.spool import Spool
from deploy.store import VersionStore
from tests.daemon.running.long_life import live, tell
from tests.e2e.conftest import DYNLORA, ROOT, environment
from tests.e2e.test_towers import NATIVE, TEXT
from tests.e2e.towers import publish_founded, write_model

BATCHES = 20
CONFIG = """
[inbox]
settle_seconds = 0.0
gather_seconds = 0.0
scan_seconds = 0.2
[learning]
steps = 1
threads = 1
dtype = "float32"
[exam]
min_gain = 0.0
alpha = 1e-9
"""


@pytest.mark.nightly
@pytest.mark.timeout(2400)
def test_what_workers_need_does_not_pile_up_in_the_daemon(tmp_path):
    """Torch, models and graphs come and go with each worker; the parent stays as it was."""
    home = tmp_path / "home"
    create_home(home)
    small = {"embed_dim": 32, "vision_cfg": NATIVE, "text_cfg": TEXT}
    publish_founded(home, write_model(tmp_path / "model", small))
    (home / "config.toml").write_text(CONFIG)
    with (tmp_path / "daemon.log").open("w") as log:
        process = subprocess.Popen(
            [*DYNLORA, "run", "--home", str(home)], cwd=ROOT, env=environment(), stdout=log, stderr=log
        )
    started = time.monotonic()
    try:
        before, after = live(process, home, warm=4, count=BATCHES, standing_by=1)
        tell(before, after, home, time.monotonic() - started)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 0
    finally:
        process.kill()

    assert len(Spool(home).ids("done")) == BATCHES
    assert VersionStore(home / "serving").current() == BATCHES
    assert after.resident_bytes - before.resident_bytes < 20e6
    assert after.descriptors <= before.descriptors
    assert after.threads <= before.threads

"""SIGTERM in any phase of the worker: a prompt end, and the next start goes on to the same weights."""

import signal
import time

import pytest

from tests.e2e.conftest import wait_until
from tests.e2e.test_kills import check_like

PHASES = ("load", "score", "train", "fold", "exam", "verify")


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_is_prompt_and_safe_whatever_the_worker_is_at(e2e_home, undisturbed, phase):
    """No phase is waited for; a batch that was learnt is not learnt again for it."""
    e2e_home.submit("shoes", "hat")
    e2e_home.submit("tomato", "carrot")
    daemon = e2e_home.start()
    wanted = PHASES[PHASES.index(phase) :]
    wait_until(lambda: (e2e_home.status().get("working") or {}).get("phase") in wanted, why=e2e_home.log)
    begun = time.monotonic()
    daemon.send_signal(signal.SIGTERM)
    daemon.wait(timeout=60)
    print(f"{phase}: ended after {time.monotonic() - begun:.1f} s")
    [at_work] = e2e_home.spool.ids("work")
    assert e2e_home.spool.load(at_work).attempts[-1].outcome == "interrupted"

    e2e_home.finish()
    check_like(e2e_home, undisturbed)

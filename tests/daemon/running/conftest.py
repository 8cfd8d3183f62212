"""Homes with a real version 0, drops, and a service with a stand-in worker."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from daemon.config import AttemptsConfig, Config, InboxConfig
from daemon.home import create_home
from daemon.lifecycle import Launch
from daemon.progress import LineView
from daemon.service import Service
from daemon.spool import Spool
from deploy.store import VersionStore

STANDIN = Path(__file__).with_name("standin_worker.py")
QUICK = Config(
    inbox=InboxConfig(settle_seconds=0, gather_seconds=0, scan_seconds=0.05),
    attempts=AttemptsConfig(max=3, backoff_seconds=10),
)


def draw_class(folder, count=10, *, seed=0):
    """A class folder of small random images that all differ."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, *folder.name.encode()])
    for number in range(count):
        pixels = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


class Bench:
    """A home, a service over it with a clock in hand, and what tests do with them."""

    def __init__(self, home, config):
        self.home, self.config = home, config
        self.spool, self.store = Spool(home), VersionStore(home / "serving")
        self.now = time.time()
        self.service = self.new_service()

    def new_service(self):
        """A service that starts anew from what is on disk, like a restarted daemon."""
        launch = Launch(make_command=lambda *arguments: [sys.executable, str(STANDIN), *arguments])
        self.service = Service(self.home, self.config, view=LineView(), launch=launch)
        return self.service

    def behave(self, **behaviour):
        """Tell the stand-in worker how to behave from now on."""
        (self.home / "behaviour.json").write_text(json.dumps(behaviour))

    def drop(self, *names, seed=0):
        """Put class folders into the inbox."""
        for name in names:
            draw_class(self.home / "inbox" / name, seed=seed)

    def tick(self):
        """One iteration; time passes as on the wall."""
        self.now += 0.02
        time.sleep(0.01)
        self.service.tick(self.now)

    def tick_until(self, is_true, seconds=30):
        """Tick until a condition holds."""
        deadline = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < deadline, self.describe()
            self.tick()

    def run(self):
        """Tick until nothing is left to do, and at least until the inbox was looked at twice."""
        self.service.reception.wake.set()
        self.tick()
        self.service.reception.wake.set()
        self.tick()
        self.tick_until(self.service.is_idle)

    def state(self):
        """Which batch is where."""
        states = ("incoming", "queued", "work", "held", "failed", "done")
        return {state: self.spool.ids(state) for state in states if self.spool.ids(state)}

    def events(self):
        """Names of the events so far."""
        return [entry["event"] for entry in self.service._events.read()]

    def describe(self):
        """For the message of a condition that never came true."""
        return f"{self.state()} {self.service.trouble} {self.service._events.read()[-3:]}"


@pytest.fixture
def home(version_dir, tmp_path):
    """An initialised home with version 0 of the bundled model."""
    path = tmp_path / "home"
    create_home(path)
    shutil.rmtree(path / "serving")
    shutil.copytree(version_dir.parent.parent, path / "serving", symlinks=True)
    return path


@pytest.fixture
def bench(home):
    """A started service on a home of its own; its worker is stopped at the end."""
    bench = Bench(home, QUICK)
    bench.service.start()
    yield bench
    bench.service.stop(lambda: True)

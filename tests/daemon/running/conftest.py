"""Homes with a real version 0, drops, and a service with a stand-in worker."""

import functools
import json
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

from daemon import cli, loop
from daemon.config import AttemptsConfig, Config, InboxConfig
from daemon.home import create_home
from daemon.lifecycle import Launch
from daemon.progress import LineView
from daemon.service import Service
from daemon.spool import Spool
from deploy.store import VersionStore
from tests.daemon.running.programs import STANDIN, start_daemon

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


def make_home(version_dir, path):
    """An initialised home with version 0 of the bundled model."""
    create_home(path)
    shutil.rmtree(path / "serving")
    shutil.copytree(version_dir.parent.parent, path / "serving", symlinks=True)
    return path


@pytest.fixture
def home(version_dir, tmp_path):
    """A home of one's own."""
    return make_home(version_dir, tmp_path / "home")


@pytest.fixture
def bench(home):
    """A started service on a home of its own; its worker is stopped at the end."""
    bench = Bench(home, QUICK)
    bench.service.start()
    yield bench
    bench.service.stop(lambda: True)


QUICK_TOML = "[inbox]\nsettle_seconds = 0.0\ngather_seconds = 0.0\nscan_seconds = 0.05\n[attempts]\nmax = 1\n"


@pytest.fixture
def quick_home(home):
    """A home whose inbox is taken in at once."""
    (home / "config.toml").write_text(QUICK_TOML)
    return home


@pytest.fixture
def standin(monkeypatch):
    """`run` in this process starts the stand-in worker."""
    make = lambda *arguments: [sys.executable, str(STANDIN), *arguments]  # noqa: E731
    monkeypatch.setattr(loop, "Launch", functools.partial(Launch, make_command=make))


@pytest.fixture
def dynlora(capsys, monkeypatch, tmp_path):
    """Run a command in this process; its exit code, stdout and stderr."""
    monkeypatch.delenv("DYNLORA_HOME", raising=False)
    monkeypatch.delenv("DYNLORA_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code, out, err

    return run


@pytest.fixture
def running(quick_home):
    """A daemon of another process on the home, up and idle; asked to stop at the end."""
    process = start_daemon(quick_home)
    deadline = time.monotonic() + 30
    while not (quick_home / "status.json").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)

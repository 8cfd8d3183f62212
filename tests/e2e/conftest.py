"""The whole thing with the real program and the real worker: one initialised home, copied per test."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemon.spool import Spool
from deploy.client import Client
from deploy.store import VersionStore

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "examples" / "demo" / "images"
DYNLORA = [sys.executable, "-m", "daemon.cli"]
# Few steps: whether it learns well is tested elsewhere. Under 20 exam images a batch is never held for too
# small a gain; a test that wants that asks for more. One dtype: a trial could choose another one in the
# next life, and lives are compared bit for bit.
CONFIG = """
[inbox]
settle_seconds = 0.1
gather_seconds = 0.1
scan_seconds = 0.2
[learning]
steps = {steps}
threads = 1
dtype = "float32"
checkpoint_seconds = 0.3
standby = {standby}
[exam]
fraction = {exam}
min_gain = {min_gain}
alpha = 1e-9
[attempts]
max = 3
backoff_seconds = 0.1
"""


class Home:
    """One home and the real program on it."""

    def __init__(self, path):
        self.path = path
        self.spool, self.store = Spool(path), VersionStore(path / "serving")
        self.configure()

    def configure(self, *, steps=8, min_gain=0.0, exam=0.2, standby="false"):
        """Write the configuration."""
        text = CONFIG.format(steps=steps, min_gain=min_gain, exam=exam, standby=standby)
        (self.path / "config.toml").write_text(text)

    def dynlora(self, *arguments, timeout=120):
        """Run one command to its end."""
        return subprocess.run(
            [*DYNLORA, *map(str, arguments), "--home", str(self.path)],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout, env=environment(),
        )  # fmt: skip

    def start(self, *, once=True):
        """Start `dynlora run` in a process group of its own."""
        with (self.path / "daemon.log").open("ab") as log:
            return subprocess.Popen(
                [*DYNLORA, "run", *(["--once"] if once else []), "--home", str(self.path)],
                cwd=ROOT, stdout=log, stderr=log, env=environment(), start_new_session=True,
            )  # fmt: skip

    def finish(self, timeout=200):
        """Run to the end of the queue and expect success."""
        done = self.dynlora("run", "--once", "--json", timeout=timeout)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def submit(self, *classes):
        """Submit a batch of demo classes, complete."""
        batch = self.path.parent / f"{self.path.name}-{classes[0]}"
        for name in classes:
            [folder] = (IMAGES / "drop").glob(f"*/{name}")
            shutil.copytree(folder, batch / name)
        done = self.dynlora("submit", batch, "--id", classes[0])
        assert done.returncode == 0, done.stderr

    def weights(self):
        """Version → sha256 of its weights."""
        return {n: self.store.manifest(n).files["weights.safetensors"].sha256 for n in self.store.versions()}

    def status(self):
        """What the running daemon says."""
        try:
            return json.loads((self.path / "status.json").read_bytes())
        except FileNotFoundError:
            return {}

    def log(self):
        """The daemon's log so far."""
        return (self.path / "daemon.log").read_text()


def environment():
    """One thread per library: two cores are shared with other tests."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def wait_until(is_true, seconds=90, why=lambda: ""):
    """Wait for a condition, not for a time."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, why()
        time.sleep(0.02)


def kill(process, *, group):
    """SIGKILL to the daemon alone, or to its whole process group; waits until it is gone."""
    if group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


@contextmanager
def asking(home, every_seconds=0.02):
    """A client that classifies all the while; yields the versions it saw, in order, and its errors."""
    import threading

    image = next((IMAGES / "heldout").rglob("*.jpg"))
    seen, errors, stop = [], [], threading.Event()
    with Client(home.path / "serving", poll_seconds=0.05, threads=1) as client:

        def ask():
            while not stop.wait(every_seconds):
                try:
                    [answer] = client.classify([image], labels=["a shoe", "a tomato"])
                except Exception as error:  # noqa: BLE001 - any failed request is what the test looks for
                    errors.append(error)
                    continue
                if client.last_error is not None:
                    errors.append(client.last_error)
                if not seen or seen[-1] != answer.version:
                    seen.append(answer.version)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield seen, errors
        finally:
            stop.set()
            thread.join()


@pytest.fixture(scope="session")
def initialised(tmp_path_factory):
    """A home made by `dynlora init`; only to be copied."""
    path = tmp_path_factory.mktemp("e2e") / "home"
    done = subprocess.run(
        [*DYNLORA, "init", str(path), "--json"],
        cwd=ROOT, capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == 0
    return path


@pytest.fixture
def e2e_home(initialised, tmp_path):
    """A home of one's own."""
    shutil.copytree(initialised, tmp_path / "home", symlinks=True)
    return Home(tmp_path / "home")


@pytest.fixture(scope="session")
def undisturbed(initialised, tmp_path_factory):
    """The same two batches learnt without any trouble: what every disturbed run must end with."""
    path = tmp_path_factory.mktemp("undisturbed") / "home"
    shutil.copytree(initialised, path, symlinks=True)
    home = Home(path)
    home.batches, home.steps = [("shoes", "hat"), ("tomato", "carrot")], 8
    home.configure(steps=home.steps)
    for classes in home.batches:
        home.submit(*classes)
    started = time.monotonic()
    home.finish()
    home.longest_seconds = (time.monotonic() - started) / 2
    return home

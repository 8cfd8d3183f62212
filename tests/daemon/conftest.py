"""Fixtures of the daemon's tests: a home with an inbox, and pictures to drop into it."""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from daemon import logs
from daemon.batch import Batch
from daemon.config import Config, InboxConfig
from daemon.intake import Intake
from daemon.spool import Spool, State
from daemon.taking import IntakeEvent


@pytest.fixture(autouse=True)
def _no_standing_log_fields() -> Iterator[None]:
    """A service that a test leaves running must not add its version to the lines of the next one."""
    yield
    logs.stand(live=None)


class Bench:
    """A home, its intake, and a clock that only moves when told to."""

    def __init__(self, home: Path, inbox: Path | None = None, **inbox_config: float) -> None:
        self.home = home
        self.inbox = inbox or home / "inbox"
        self.inbox.mkdir(exist_ok=True)
        self.spool = Spool(home)
        self.spool.create()
        self.config = Config(inbox=InboxConfig.model_validate(inbox_config))
        self.now = 0.0
        self._seeds = itertools.count()
        self.restart()

    def restart(self) -> None:
        """A new intake over the same files, as after a crash."""
        self.intake = Intake(self.config, self.inbox, self.spool)

    def paint(self, path: Path, seed: int | None = None, size: tuple[int, int] = (12, 9)) -> Path:
        """A small picture that no other call without a seed makes."""
        rng = np.random.default_rng(next(self._seeds) if seed is None else 10_000 + seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    def class_folder(self, name: str, count: int = 5, under: Path | None = None) -> Path:
        """A folder of pictures, in the inbox unless told otherwise."""
        folder = (under or self.inbox) / name
        for number in range(count):
            self.paint(folder / f"{number}.png")
        return folder

    def step(self, seconds: float = 0.0) -> list[IntakeEvent]:
        """Let time pass, then one iteration."""
        self.now += seconds
        return self.intake.step(self.now)

    def settle(self) -> list[str]:
        """Two looks at a quiet inbox; what was said."""
        return [event.message for event in [*self.step(), *self.step(60)]]

    @contextmanager
    def renaming(self, pattern: str) -> Iterator[None]:
        """Meanwhile another thread renames what fits in the inbox, as fast as it can."""
        stop = threading.Event()

        def rename() -> None:
            for turn in itertools.count(1):
                if stop.is_set():
                    return
                for path in list(self.inbox.glob(pattern)):
                    with suppress(FileNotFoundError):
                        path.rename(path.with_name(f"{path.name.split('.')[0]}.{turn}"))

        thread = threading.Thread(target=rename)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def only(self, state: State) -> Batch:
        """The record of the one batch in `state`."""
        (batch,) = self.spool.ids(state)
        return self.spool.load(batch)

    def aside(self, batch: Batch) -> dict[str, str]:
        """Name of each file set aside → why; each must still be there."""
        directory = self.spool.path(batch.id)
        for item in batch.set_aside:
            assert (
                ".zip" in item.file or (directory / item.file).exists() or item.reason.startswith("it disapp")
            )
        return {Path(item.file).name: item.reason for item in batch.set_aside}

    def names_and_counts(self, batch: Batch) -> dict[str, int]:
        """Class as shown → usable images, each of which must be where the record says."""
        for image in batch.images:
            assert (self.spool.path(batch.id) / image.file).is_file()
        return {
            entry.name: sum(image.class_key == entry.key for image in batch.images) for entry in batch.classes
        }


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A home with the default configuration."""
    return Bench(tmp_path)


@pytest.fixture
def make_bench() -> type[Bench]:
    """For a test that puts the home elsewhere or sets keys of [inbox]."""
    return Bench


@pytest.fixture
def mount_tmpfs(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """A function (name, bytes) that mounts a small file system; skips where that is not allowed."""
    import subprocess

    mounted: list[Path] = []

    def mount(name: str, size: int) -> Path:
        path = tmp_path / name
        path.mkdir()
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)],
            capture_output=True,
            check=False,
        )
        if result.returncode:
            pytest.skip(f"mounting a tmpfs is not permitted here: {result.stderr.decode().strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)

"""A life of two batches or ten, from the inbox to the last version, quick enough to be lived very often.

The daemon's code is the real one, and so are the store, its weights and their fold. A worker is a process of
its own that the daemon starts, hears and kills as ever; it learns in no time, for it is forked from one that
has all modules, and makes the update that a batch of that number always makes.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from daemon import child, requests, supervisor, worker
from daemon.batch import Batch, read_batch
from daemon.config import AttemptsConfig, Config, InboxConfig
from daemon.exam_embeddings import EMBEDDINGS_NAME, Memory
from daemon.exams import load_exams
from daemon.home import create_home
from daemon.lifecycle import Launch
from daemon.plan import PLAN_NAME, Plan
from daemon.progress import LineView
from daemon.report import ExamResult, Report
from daemon.seen import OWN_NAME, SEEN_NAME, Seen
from daemon.service import Service
from daemon.spool import STATES, Spool
from deploy import atomic
from deploy.store import VersionStore
from deploy.verify import check_files
from deploy.weights import read_metadata
from tests.deploy.tiny import found_tiny, stage_update

CONFIG = Config(
    inbox=InboxConfig(settle_seconds=0, gather_seconds=0, scan_seconds=1),
    attempts=AttemptsConfig(max=3, backoff_seconds=1),
)
NAMES = ("cup", "hat")
TICKS = 4000  # without a worker
SECONDS = 300  # of a life: on a slow disk a worker takes as long as it takes
IMAGES = 5
WIDTH = 4  # of what is remembered of exams


def new_home(home: Path) -> None:
    """Version 0, and two batches in the inbox."""
    create_home(home)
    found_tiny(home / "serving")
    for number, name in enumerate(NAMES):
        draw_batch(home / "inbox" / f"batch-{number}", name, number)


def draw_batch(batch: Path, name: str, number: int) -> None:
    """A folder with one class folder of small images that no other batch has."""
    folder = batch / name
    folder.mkdir(parents=True)
    for index in range(IMAGES):
        pixels = np.random.default_rng([number, index]).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def live(home: Path) -> None:
    """Run the daemon until nothing is left to do, or until it does not get any further."""
    supervisor.start_process = _fork_worker  # type: ignore[assignment]
    service = Service(home, CONFIG, view=LineView(), launch=Launch(make_command=lambda *args: list(args)))
    service.start()
    now, ticks, until = 1e9, 0, time.monotonic() + SECONDS
    while True:
        now += 400  # beyond every wait, of trouble too
        service.reception.wake.set()
        service.tick(now)
        if service.is_idle() and not service.trouble:
            break
        if service._lifecycle.working is not None:
            os.sched_yield()
        else:
            ticks += 1
        if ticks == TICKS or time.monotonic() > until:
            raise AssertionError(f"no end in sight after {ticks} ticks: {service.trouble}")
    service.stop(lambda: True)


class _Forked:
    """As much of subprocess.Popen as a Worker uses."""

    def __init__(self, arguments: list[str], log_path: Path) -> None:
        reads, writes = os.pipe()
        self.returncode: int | None = None
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reads)
            os.dup2(writes, 1)
            code = 1
            try:
                child.die_with_parent(parent)
                given = dict(zip(arguments[1::2], arguments[2::2], strict=True))
                with child.alone(Path(given["--home"]), worker.LOCK_NAME):
                    code = _work(given)
            except OSError as error:
                _say(event="error", message=str(error), retry=True)
            except BaseException:  # noqa: BLE001 - whatever it is, the daemon is told by the log
                log_path.write_text(traceback.format_exc())
            finally:
                os._exit(code)
        os.close(writes)
        self.stdout = os.fdopen(reads, "rb")

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int | None:
        return self._reap(0)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:
                return self.returncode
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    terminate = kill


def _fork_worker(command: Any, log_path: Path, *, stdin: int = 0) -> Any:
    return _Forked(list(command), log_path)


def _say(**message: Any) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _work(given: dict[str, str]) -> int:
    """Plan, checkpoint, delta, staged version, report: in the real worker's order, through the same doors."""
    home, batch_id, parent = Path(given["--home"]), given["--batch"], int(given["--parent"])
    work_dir, store = home / "spool" / "work" / batch_id, VersionStore(home / "serving")
    batch = read_batch(work_dir)
    for image in batch.images:
        assert (work_dir / image.file).stat().st_size > 0, f"{image.file} was lost"
    plan = Plan(
        batch=batch_id, content_sha256=batch.content_sha256, parent=parent, parent_weights_sha256="0" * 64,
        seed=1, splits={}, threads=1, preset="default", settings={}, software={},
    )  # fmt: skip
    atomic.write_text(work_dir / PLAN_NAME, plan.model_dump_json(by_alias=True))
    _remember(home, work_dir, batch)
    own = np.full(WIDTH, batch.seq, np.float32), np.eye(WIDTH, dtype=np.float32)
    Seen(*own, len(batch.classes), (batch_id,)).save(work_dir / OWN_NAME)
    atomic.make_dir(work_dir / "checkpoint")
    atomic.write_text(work_dir / "checkpoint" / "checkpoint.safetensors", "1")
    atomic.make_dir(work_dir / "result")
    names = [entry.name for entry in batch.classes]
    staging, manifest = stage_update(store, batch_id, names)
    atomic.write_file(work_dir / "result" / "delta.safetensors", (staging / "delta.safetensors").read_bytes())
    draft = manifest.model_dump(mode="json", by_alias=True)
    draft["batch"] |= {"content_sha256": batch.content_sha256, "producer_id": batch.producer_id}
    exam = ExamResult(batch=batch_id, images=40, correct_before=10, correct_after=30, gained=20, lost=0)
    report = Report(batch=batch_id, parent=parent, manifest=draft, exams=(exam,))
    atomic.write_text(work_dir / "result" / "report.json", report.model_dump_json())
    _say(event="result")
    return 0


def _remember(home: Path, work_dir: Path, batch: Batch) -> None:
    """Of the batch's own exam and of those kept before, as if each batch had another tower."""
    images = {work_dir: batch.split("exam")} | {where: exam.images for where, exam in load_exams(home)}
    for directory, shown in images.items():
        rows = {image.file: (image.sha256, np.full(WIDTH, batch.seq, np.float32)) for image in shown}
        if rows:
            Memory(lambda _: None).save(directory, batch.id, rows)


def check_visible(home: Path, batches: int = len(NAMES)) -> None:
    """At any moment, before anybody recovers: what clients see is whole, and every image is in one place."""
    store = VersionStore(home / "serving")
    assert store.current() in store.versions()
    newest = store.versions()[-CONFIG.store.keep_full :]
    assert set(newest) <= set(store.full_versions())  # older ones are pruned
    for version in store.full_versions():
        check_files(store.path(version), store.manifest(version).files)
    places = [(state, batch) for state in STATES for batch in Spool(home).ids(state)]
    assert len({batch for _, batch in places}) == len(places), places
    whole = [path for path in home.rglob("*.png") if path.stat().st_size]
    kept = {path.read_bytes() for path in whole if "exams" not in path.parts}
    assert len(kept) == IMAGES * batches, f"{len(kept)} of {IMAGES * batches} images are left"
    for name in (EMBEDDINGS_NAME, OWN_NAME):
        assert not list(home.glob(f"spool/done/*/{name}"))
    if (home / SEEN_NAME).exists():
        seen = Seen.load(home / SEEN_NAME)
        assert seen.classes == len(seen.batches) == len(set(seen.batches)), seen.batches
    for path in home.glob(f"exams/0*/{EMBEDDINGS_NAME}"):
        assert Memory(_refuse).load(path.parent, read_metadata(path)["tower"], WIDTH)


def _refuse(sentence: str) -> None:
    raise AssertionError(sentence)


def outcome(home: Path) -> dict[str, Any]:
    """What must be the same in the end, whatever happened on the way."""
    store, spool = VersionStore(home / "serving"), Spool(home)
    live_manifest = store.live_manifest()
    return {
        "states": {state: spool.ids(state) for state in STATES},
        "versions": store.versions(),
        "lineage": [entry.batch for entry in live_manifest.lineage],
        "weights": live_manifest.files["weights.safetensors"].sha256,
        "exams": [exam.batch for _, exam in load_exams(home)],
        "seen": sorted(Seen.load(home / SEEN_NAME).batches),
        "leftovers": sorted(str(p.relative_to(home)) for p in home.rglob(f"{atomic.TEMPORARY_PREFIX}*")),
    }


def retry_failed(home: Path) -> None:
    """What an operator does once the disk is mended: nothing was lost, so nothing has to be sent again."""
    for batch in Spool(home).ids("failed"):
        assert Spool(home).reason(batch).reason
        requests.leave(home, requests.Request(command="retry", batch=batch, who="ann"))


def live_in_child(home: Path) -> None:
    """A life in a process of its own, that has to end well."""
    log = home.parent / "log"
    assert in_child(lambda: live(home), log) == 0, log.read_text()


def in_child(work: Any, log: Path) -> int:
    """Run `work` in a process group of its own; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        with log.open("wb") as file:
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the parent looks at the log
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

"""What happens to a batch between queued/ and done/, held/ or failed/: attempts, the worker, the gate.

One thing at a time: either a worker runs (`observe` looks after it), or `advance` moves one batch one step.
What is kept in memory (the running worker, waiting times) may be lost at any moment; the files say how to go
on.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from daemon import attempts, logs
from daemon.batch import Batch
from daemon.budget import check_space, needs_of_learning
from daemon.errors import BatchError, DaemonError
from daemon.plan import step_reached
from daemon.publish import Publisher
from daemon.reception import Knowledge
from daemon.recovery import next_step
from daemon.spool import Reason
from daemon.standby import Standby
from daemon.status import is_full_disk
from daemon.supervisor import EXIT_DONE, EXIT_STOPPED, Worker, default_command
from deploy.errors import DeployError, StoreError

LOG_NAME = "worker.log"
RETRY_HINT = "look at worker.log beside this file, mend the cause, and drop the images again"


@dataclass(frozen=True)
class Launch:
    """How workers are started.

    Attributes:
        config_path: handed to the worker, which reads the same configuration; None for the defaults.
        wake: called from another thread when a worker says something.
        make_command: the command line for given worker arguments; tests put a stand-in here.
        keeps_standby: whether a worker stands by while there is nothing to learn.
    """

    config_path: Path | None = None
    keeps_standby: bool = False
    wake: Callable[[], None] = lambda: None
    make_command: Callable[..., list[str]] = default_command


@dataclass
class _Job:
    batch: str
    parent: int
    worker: Worker
    progress: dict[str, Any] = field(default_factory=dict)
    heard_at: float = field(default_factory=time.monotonic)  # no jump of the clock makes it look stuck


class Lifecycle:
    """Works off the spool, batch by batch in the order they came."""

    def __init__(self, publisher: Publisher, launch: Launch) -> None:
        self._publisher, self._launch = publisher, launch
        self._home = publisher.home
        self._spool, self._store, self._tell = publisher.spool, publisher.store, publisher.tell
        self._known = Knowledge(publisher.store)
        self._job: _Job | None = None
        self.standby = Standby(launch.make_command, publisher.home, wake=launch.wake)
        self._not_before: dict[str, tuple[float, float]] = {}  # batch id → since when it waits, until when

    @property
    def working(self) -> dict[str, Any] | None:
        """The batch a worker has, with its phase and step; None while none runs."""
        return None if self._job is None else {"batch": self._job.batch, **self._job.progress}

    def close_interrupted(self) -> None:
        """At start: mark attempts that ended with the previous daemon."""
        for batch_id in self._spool.ids("work"):
            try:
                batch = self._spool.load(batch_id)
            except BatchError:
                continue  # `advance` puts it into failed/
            closed = self._closed(batch)
            if closed is not batch:
                self._spool.save(closed)
                logs.log(
                    "recovered", batch=batch_id, attempt=len(batch.attempts), outcome=attempts.INTERRUPTED
                )

    def _closed(self, batch: Batch) -> Batch:
        """With an attempt that nobody ended marked as interrupted, where its checkpoint was."""
        return attempts.close_interrupted(batch, step=step_reached(self._spool.state_dir("work") / batch.id))

    def observe(self, now: float) -> None:
        """Hear the running worker, and act when it has ended or must not go on."""
        job = self._job
        if job is None:
            return
        for message in job.worker.messages():
            job.heard_at = time.monotonic()
            fields = {key: value for key, value in message.items() if key != "event"}
            if message["event"] == "phase":
                job.progress = fields  # the steps of the phase before mean nothing in this one
            elif message["event"] == "step":
                job.progress |= fields
        code = job.worker.poll()
        if code is not None:
            self._job = None
            self._ended(job, code, now)
        elif time.monotonic() - job.heard_at > self._publisher.config.learning.silent_seconds:
            self._kill_silent(job, now)
        elif self._store.pin() is not None:
            self.interrupt(f"{attempts.RESTARTED}a version was pinned")
        elif self._store.current() != job.parent:
            self.interrupt(f"{attempts.RESTARTED}version {self._store.current()} was made live")

    def advance(self, now: float) -> bool:
        """Move one batch one step; says whether there was anything to do. While pinned there never is."""
        if self._job is not None or self._store.pin() is not None:
            return False
        for batch_id in self._spool.ids("work"):
            self._proceed(batch_id, now)
            return True
        for batch_id in self._spool.ids("queued"):
            since, until = self._not_before.get(batch_id, (now, now))
            if not since <= now < until:  # due, or the clock was set back
                self._take(batch_id)
                return True
        return False

    def stand_by(self, now: float) -> None:
        """See that a worker stands by for the next batch, unless one is at work or nothing may be learnt."""
        if self._store.pin() is not None:
            self.standby.stop()
        elif self._launch.keeps_standby and self._job is None:
            self.standby.keep(now, self._store.current())

    def interrupt(self, outcome: str, should_force: Callable[[], bool] = lambda: False) -> None:
        """Stop the worker, if there is one, giving it time for a checkpoint."""
        job, self._job = self._job, None
        if job is not None:
            code = job.worker.stop(self._publisher.config.learning.stop_seconds, should_force)
            logs.log("worker stopped", batch=job.batch, code=code, outcome=outcome)
            self._spool.save(self._spool.load(job.batch).with_outcome(outcome))

    def wait_no_longer(self, batch_id: str) -> None:
        """An operator wants this batch tried at once, if it waits for its next attempt."""
        self._not_before.pop(batch_id, None)

    def _take(self, batch_id: str) -> None:
        """From queued/ to work/, unless the same was published before: then straight to done/."""
        try:
            batch = self._spool.load(batch_id)
        except BatchError as error:
            self._give_up(batch_id, str(error))
            return
        if batch.forgotten is not None:  # cut short before it got to failed/
            self._give_up(batch_id, "its images were forgotten before it was learnt")
            return
        other = self._published_twin(batch)
        if other is None:
            self._spool.move(batch_id, "work")
            return
        self._spool.save(batch.model_copy(update={"duplicate_of": other}))
        self._spool.move(batch_id, "done")
        self._tell("duplicate", batch=batch_id, duplicate_of=other)

    def _published_twin(self, batch: Batch) -> str | None:
        """The batch that brought the same and was published while this one waited."""
        found = self._known()
        twin = found.contents.get(batch.content_sha256)
        if batch.producer_id is not None:
            twin = found.producer_ids.get(batch.producer_id, twin)
        return twin if twin != batch.id else None

    def _proceed(self, batch_id: str, now: float) -> None:
        """The next step of a batch in work/, as `recovery.next_step` says."""
        listing = self._publisher.look(batch_id)
        step = next_step(listing, self._store.current())
        if step == "finish":
            assert listing.published_as is not None
            self._publisher.finish(batch_id, listing.published_as)
        elif step == "judge":
            self._judge(batch_id, now)
        elif step == "redo":
            self._publisher.discard_result(batch_id)
        elif step == "restart":
            logs.log("restarting", batch=batch_id, live=self._store.current())
            self._publisher.discard_learning(batch_id)
        else:
            self._start(batch_id, now)

    def _start(self, batch_id: str, now: float) -> None:
        try:
            batch = self._closed(self._spool.load(batch_id))
        except BatchError as error:
            self._give_up(batch_id, str(error))
            return
        if (why := attempts.why_give_up(batch, self._publisher.config.attempts)) is not None:
            self._give_up(batch_id, why)
            return
        live = self._store.current()
        needs = needs_of_learning(self._store.manifest(live))
        waits = f"It waits in {self._spool.state_dir('work') / batch_id}."
        check_space(self._home, self._publisher.config.disk, needs, f"learn {batch_id}", waits=waits)
        batch = batch.with_attempt(datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"))
        self._spool.save(batch)  # before the worker exists: an attempt that kills us is counted
        self._publisher.drop_staging(batch_id)
        arguments = (
            *("adapt", "--home", str(self._home), "--config", str(self._launch.config_path or "")),
            *("--batch", batch_id, "--parent", str(live)),
        )
        worker = self.standby.start_worker(arguments, self._spool.state_dir("work") / batch_id / LOG_NAME)
        self._job = _Job(batch_id, live, worker, {"phase": "start"})
        self._tell("adapting", batch=batch_id, parent=live, attempt=len(batch.attempts), pid=worker.pid)

    def _ended(self, job: _Job, code: int, now: float) -> None:
        if code == EXIT_STOPPED:
            self._spool.save(self._spool.load(job.batch).with_outcome(attempts.INTERRUPTED))
        elif code != EXIT_DONE:
            error = job.worker.error
            if error is not None and error.get("fault") == "home":
                self._blame_home(job.batch, str(error["message"]))
            # Killed (out of memory, say) or stopped by a full disk, it goes on from its checkpoint. Failing
            # without an explanation, it might only fail there again: it starts over.
            if code > 0 and error is None:
                self._publisher.discard_learning(job.batch)
            retry = error is None or error.get("retry") is not False
            self._failed(job.batch, job.worker.why_it_failed(code), now, retry=retry)
        elif self._publisher.look(job.batch).report_parent is None:
            self._failed(job.batch, "the worker ended well but left no readable report", now)

    def _kill_silent(self, job: _Job, now: float) -> None:
        """It said nothing for too long: a hung disk, a deadlock. It goes on from its checkpoint, as after a
        crash.
        """
        limit, phase = self._publisher.config.learning.silent_seconds, job.progress.get("phase", "start")
        self._job = None
        job.worker.kill()
        why = (
            f"the worker said nothing for {limit:g} seconds (learning.silent_seconds) while in phase "
            f"{phase!r}, and was killed"
        )
        self._failed(job.batch, why, now)

    def _blame_home(self, batch_id: str, why: str) -> NoReturn:
        """The batch stays in work/ and its attempt does not count: what is wrong would fail any other too.

        Raises:
            StoreError: always, with what the worker said; tried again like every trouble.
        """
        batch = self._spool.load(batch_id).with_outcome(f"{attempts.RESTARTED}{why}")
        self._spool.save(attempts.without_repetition(batch))
        raise StoreError(why)

    def _judge(self, batch_id: str, now: float) -> None:
        try:
            self._publisher.judge(batch_id, datetime.fromtimestamp(now, UTC))
        except (DeployError, DaemonError) as error:
            is_published = self._publisher.look(batch_id).published_as is not None
            if is_full_disk(error) or isinstance(error, BatchError) or is_published:
                raise  # a version that has its number is finished, never made again
            # What the worker made cannot be published (a file cut short, say): it makes it again.
            self._publisher.discard_result(batch_id)
            self._failed(batch_id, str(error), now)

    def _failed(self, batch_id: str, why: str, now: float, *, retry: bool = True) -> None:
        """One attempt failed: note it, then wait for the next one in queued/, or give up."""
        batch = self._spool.load(batch_id)
        if batch.attempts:
            batch = batch.with_outcome(f"{attempts.FAILED}{why}")
            self._spool.save(batch)
        reason = why if not retry else attempts.why_give_up(batch, self._publisher.config.attempts)
        if reason is not None:
            self._give_up(batch_id, reason)
            return
        wait = attempts.wait_seconds(batch, self._publisher.config.attempts)
        self._not_before[batch_id] = now, now + wait
        self._spool.move(batch_id, "queued")
        self._tell("attempt_failed", logging.WARNING, batch=batch_id, why=why, next_attempt_seconds=wait)

    def _give_up(self, batch_id: str, why: str) -> None:
        """Put a batch into failed/ with the reason; its images stay, what was learnt goes."""
        if self._spool.find(batch_id) == "work":
            self._publisher.discard_learning(batch_id)
        details = _failures(self._spool, batch_id)
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        self._spool.fail(
            Reason(batch=batch_id, reason=why, what_to_do=RETRY_HINT, failed_at=moment, details=details)
        )
        self._tell("failed", logging.ERROR, batch=batch_id, why=why)


def _failures(spool: Any, batch_id: str) -> list[str]:
    try:
        batch: Batch = spool.load(batch_id)
    except BatchError:
        return []
    return attempts.failures(batch)

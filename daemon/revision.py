"""An operator's commands that take long (promote, revert, rebuild): one at a time, in a worker of their own.

    answer(request)    begin it, or say how it ended; None while it is under way
    observe()          hear the worker; once it is done: gate, publish, answer
    abort(why)         nobody waits any more, or another version went live: nothing of it stays

Used by a daemon, tick by tick, and by a command that holds the home's lock itself (`run_alone`). Nothing is
kept on disk but the worker's staging directory, which recovery removes: after a crash the request, still
there if its command is, is carried out from the start.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from daemon import logs
from daemon.budget import check_space, version_bytes
from daemon.errors import DaemonError, WorkerError
from daemon.gate import decide, decide_revert, overruled
from daemon.lifecycle import Launch
from daemon.publish import Publisher
from daemon.report import Report, staging_name
from daemon.requests import Answer, Request, is_waiting
from daemon.revisable import check_promotable, check_revertible
from daemon.standby import Standby
from daemon.supervisor import EXIT_DONE, Message, Worker
from deploy import atomic
from deploy.errors import DeployError, StoreError
from deploy.manifest import Decision
from deploy.rebuild import adopt_rebuild
from deploy.rebuild import staging_name as rebuild_staging_name

Value = TypeVar("Value")
LONG_COMMANDS = frozenset({"promote", "revert", "rebuild"})
LOG_NAME = "worker.log"  # in the home: what it does concerns no batch's directory
HELD = 3


@dataclass
class _Job:
    request: Request
    parent: int
    worker: Worker
    progress: dict[str, Any] = field(default_factory=lambda: {"phase": "start"})
    result: Message | None = None
    answer: Answer | None = None


class Reviser:
    """Carries out long commands on one home.

    Args:
        pause_learning: called with a reason before a worker starts that changes the live version.
        standby: may have a worker that stands by, which is taken for what needs torch.
    """

    def __init__(
        self,
        publisher: Publisher,
        launch: Launch,
        *,
        pause_learning: Callable[[str], None] = lambda _: None,
        standby: Standby | None = None,
    ) -> None:
        self._publisher, self._launch, self._pause_learning = publisher, launch, pause_learning
        self._standby = standby or Standby(launch.make_command, publisher.home, wake=launch.wake)
        self._store = publisher.store
        self._job: _Job | None = None

    @property
    def working(self) -> dict[str, Any] | None:
        """What is under way, with its phase and step; None while nothing is."""
        if self._job is None or self._job.answer is not None:
            return None
        request = self._job.request
        named = {"batch": request.batch} if request.batch else {"version": request.to}
        return {"command": request.command, "request": request.name, **named, **self._job.progress}

    @property
    def is_changing_live(self) -> bool:
        """Whether what is under way will make another version live; learning waits for it."""
        return self.working is not None and self.working["command"] != "rebuild"

    def is_under_way(self, name: str) -> bool:
        """Whether the request of that name was begun."""
        return self._job is not None and self._job.request.name == name

    def answer(self, request: Request) -> Answer | None:
        """Begin a command or say how it ended; None while it is under way. What goes wrong is an answer."""
        job = self._job
        if job is not None and job.request == request:
            if job.answer is not None:
                self._job = None
            return job.answer
        if (working := self.working) is not None:
            what = f"{working['command']} {working.get('batch', working.get('version'))}"
            why = f"`{what}` is under way and only one such thing at a time: try again when it has ended"
            return Answer(exit_code=1, error=why)
        try:
            return self._begin(request)
        except (DeployError, DaemonError, OSError) as error:
            return Answer(exit_code=1, error=str(error))

    def observe(self) -> None:
        """Hear the worker; end what nobody wants any more or what the live version no longer fits."""
        job = self._job
        if job is None or job.answer is not None:
            return
        code = job.worker.poll()  # first: once it has ended, all it said is in
        for message in job.worker.messages():
            if message["event"] == "phase":
                job.progress = {"phase": message.get("phase")}
            elif message["event"] == "step":
                job.progress |= {key: message.get(key) for key in ("step", "steps")}
            elif message["event"] == "result":
                job.result = message
        if (why := self._why_abort(job)) is not None:
            self.abort(why)
        elif code is not None:
            job.answer = self._conclude(job, code)

    def abort(self, why: str) -> None:
        """End what is under way; the live version is what it was."""
        job = self._job
        if job is None or job.answer is not None:
            return
        job.worker.kill()
        self._discard(job.request)
        request = job.request
        logs.log("given up", level=logging.WARNING, what=request.command, batch=request.batch, why=why)
        job.answer = Answer(exit_code=1, error=f"{why}; nothing was changed")

    def stop(self) -> None:
        """The daemon ends: the worker too. The command that waits does the work itself."""
        job, self._job = self._job, None
        if job is not None and job.answer is None:
            job.worker.kill()
            self._discard(job.request)

    def run_alone(self, request: Request, wait: Callable[[dict[str, Any]], None]) -> Answer:
        """Carry out a command to its end; the caller holds the home's lock.

        Args:
            wait: called with what is under way until there is news, or for a moment.
        """
        try:
            while (answer := self.answer(request)) is None:
                if (working := self.working) is not None:
                    wait(working)
                self.observe()
        finally:
            self.stop()
        return answer

    # Beginning

    def _begin(self, request: Request) -> Answer | None:
        self._store.complete()
        if request.command == "rebuild":
            version = _named(request.to, "a version to rebuild")
            size = version_bytes(self._store.manifest(version))
            arguments = ["rebuild", "--home", str(self._publisher.home), "--version", str(version)]
        else:
            batch_id = _named(request.batch, "a batch")
            check = check_promotable if request.command == "promote" else check_revertible
            done = check(self._publisher, batch_id)
            if done is not None:
                return done
            self._check_pin()
            size = version_bytes(self._store.live_manifest())
            arguments = self._arguments(request.command, batch_id)
        what = f"{request.command} {request.batch or request.to}"
        check_space(self._publisher.home, self._publisher.config.disk, {"the version": size}, what)
        if request.command != "rebuild":
            what = f"{request.who} asked to {request.command} {request.batch}"
            self._pause_learning(what)
        self._discard(request)
        worker = self._standby.start_worker(arguments, self._publisher.home / LOG_NAME)
        self._job = _Job(request, self._store.current(), worker)
        logs.log("begun", what=request.command, batch=request.batch, version=request.to, who=request.who)
        return None

    def _arguments(self, command: str, batch_id: str) -> list[str]:
        config_path = self._launch.config_path
        home, config = str(self._publisher.home), str(config_path) if config_path else ""
        named = ["--batch", batch_id, "--parent", str(self._store.current())]
        return [command, "--home", home, "--config", config, *named]

    def _check_pin(self) -> None:
        if (pin := self._store.pin()) is not None:
            raise StoreError(
                f"version {pin.version} is pinned by {pin.who}: nothing is published until `dynlora unpin`"
            )

    # Ending

    def _why_abort(self, job: _Job) -> str | None:
        if job.request.name and not self._is_wanted(job.request):
            return "the command that asked for it no longer waits"
        if job.request.command == "rebuild":
            return None
        if self._store.pin() is not None:
            return f"version {self._store.current()} was pinned meanwhile"
        if self._store.current() != job.parent:
            return f"version {self._store.current()} was made live meanwhile"
        return None

    def _is_wanted(self, request: Request) -> bool:
        return is_waiting(self._publisher.home, request.name)

    def _conclude(self, job: _Job, code: int) -> Answer:
        try:
            if code != EXIT_DONE or job.result is None:
                raise WorkerError(job.worker.why_it_failed(code))
            if job.request.command == "rebuild":
                return self._adopt(job)
            return self._publish(job.request, Report.model_validate(job.result.get("report")))
        except (DeployError, DaemonError, OSError, ValueError) as error:
            self._discard(job.request)
            return Answer(exit_code=1, error=str(error))

    def _adopt(self, job: _Job) -> Answer:
        request, version = job.request, _named(job.request.to, "a version")
        files = adopt_rebuild(self._store, version)
        if files:
            self._publisher.tell("rebuilt", version=version, who=request.who, why=request.why or None)
        # A thin or prune that came after the order has the last word; the answer must not hide it.
        is_full = self._store.is_full(version)
        return Answer(exit_code=0, result={"version": version, "files": files, "is_full": is_full})

    def _publish(self, request: Request, report: Report) -> Answer:
        """Publish what the worker staged, or refuse a revert that loses too much."""
        config = self._publisher.config.exam
        is_revert = request.command == "revert"
        decision = decide_revert(report.exams, config) if is_revert else decide(report.exams, config)
        found = {"exams": [exam.model_dump() for exam in report.exams], "warnings": list(report.warnings)}
        if is_revert and decision.outcome == "hold" and not request.insist:
            self._discard(request)
            why = _why_held(decision)
            self._publisher.tell("revert_refused", batch=request.batch, who=request.who, why=why)
            return Answer(exit_code=HELD, result=found | {"decision": decision.model_dump()}, error=why)
        decision = overruled(decision, request.who, request.why)
        version = self._publisher.revise(report, decision, operator=request.who)
        found |= {"decision": decision.model_dump(), "live": version, "version": version}
        return Answer(exit_code=0, result=found)

    def _discard(self, request: Request) -> None:
        """Remove what an aborted or earlier try staged."""
        if request.command == "rebuild":
            name = rebuild_staging_name(request.to or 0)
        else:
            name = staging_name(request.command, request.batch or "")
        atomic.remove_tree(self._store.staging_dir(name))


def _named(value: Value | None, what: str) -> Value:
    """The value.

    Raises:
        DaemonError: the request names none.
    """
    if value is None:
        raise DaemonError(f"the request does not name {what}")
    return value


def _why_held(decision: Decision) -> str:
    details = "; ".join(rule.detail for rule in decision.rules if not rule.passed)
    return f"nothing was published: {details}. To take the batch out all the same, use --insist."

"""A staged version is verified, then graded as clients will ask it: loaded once for both. No torch."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.child import Outlet
from daemon.examine import Examiner, Grades
from daemon.report import ExamResult, metrics_of
from deploy.manifest import FileRecord, Manifest, save_manifest
from deploy.runtime import LoadedVersion
from deploy.store import VersionStore
from deploy.verify import PUBLISH_TOLERANCE, check_staged, graph_hashes

Draft = dict[str, Any]  # of a manifest, without what is only known when it is published


@dataclass
class Stopwatch:
    """Seconds spent per stage, and the word to the outside that it begins."""

    outlet: Outlet
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, *, is_told: bool = True) -> Iterator[None]:
        """Time one stage; the same name adds up."""
        if is_told:
            self.outlet.phase(name)
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0) + time.monotonic() - started, 3)


@dataclass(frozen=True)
class Grading:
    """What new versions are held against.

    Attributes:
        parent: the live version that they are built on.
        before: what the parent answered to the examiner.
    """

    store: VersionStore
    parent: Manifest
    examiner: Examiner
    before: Grades
    watch: Stopwatch

    def of(
        self,
        staging: Path,
        make_draft: Callable[[Mapping[str, FileRecord]], Draft],
        *,
        known: Mapping[str, FileRecord] | None = None,
    ) -> tuple[Draft, list[ExamResult]]:
        """Verify and grade a filled staging directory; it has a manifest.json afterwards, for now.

        Args:
            make_draft: the manifest's draft, given the records of all files.
            known: records of files that were hashed while they were written.

        Returns:
            The draft with its metrics, and the exams, the batch's own first.

        Raises:
            VerifyError: the version is not what it should be; names the file.
            BatchError, WorkerError: an exam image cannot be read.
        """
        graphs, dim = graph_hashes(self.parent.files), self.parent.embed_dim
        with self.watch.stage("verify"):
            files = check_staged(staging, embed_dim=dim, parent_graphs=graphs, known=known or {})
            draft = make_draft(files)
            # Provisional, so that it can be loaded as clients will; publishing writes the final one.
            numbered = draft | {"version": self.store.next_version()}
            save_manifest(staging, Manifest.model_validate(numbered), is_flushed=False)
            version = self._open(staging)
        with version:
            with self.watch.stage("verify", is_told=False):
                parity = version.measure_parity(PUBLISH_TOLERANCE)
            with self.watch.stage("exam"):
                after = self.examiner.ask(version)
        exams = self.examiner.compare(self.before, after)
        metrics = metrics_of(exams, self.before.cosines_with(after))
        return draft | {"metrics": metrics | {"parity": parity}}, exams

    def _open(self, staging: Path) -> LoadedVersion:
        """As clients do: every file is read again and compared with its record, here beside opening it.

        Raises:
            VerifyError: a file is not what it should be.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="check") as beside:
            checks: list[Future[None]] = []
            version = LoadedVersion(
                staging,
                threads=1,
                runs_at_once=self.examiner.threads,
                aside=lambda check: checks.append(beside.submit(check)),
            )
        try:
            for check in checks:
                check.result()
        except BaseException:
            version.close()
            raise
        return version

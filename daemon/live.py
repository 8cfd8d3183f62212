"""The live version as a worker has it in memory: for torch to learn from, and for ONNX Runtime to ask.

Opened when there is an order, or ahead of it by a worker that stands by. What was opened ahead counts only
where the order names the same version with the same manifest.json, byte for byte, and the files that were
opened are those that lie there now. They are hashed again before anything that is made from them is kept:
they may have lain there for days. Runs in the worker only.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daemon.examine import Examiner, Grades
from deploy.cpus import usable_cpus
from deploy.export import reference_image_embeds
from deploy.manifest import (
    MANIFEST_NAME,
    OPEN_CLIP_CONFIG_NAME,
    WEIGHTS_NAME,
    ClassEntry,
    Manifest,
    load_manifest,
)
from deploy.memory import free_memory_bytes
from deploy.opening import check_used_files
from deploy.runtime import LoadedVersion
from deploy.store_reader import StoreReader
from deploy.vision_digest import is_same_tower, vision_digest
from dynlora.clip import Clip, load_version

_COPIES = 2  # of the weights: torch's and ONNX Runtime's
_SHARE_OF_MEMORY = 0.25  # of what is free, at most, for a worker that only waits
Files = dict[str, tuple[int, int, int, int]]
_WARM_ROWS = 4  # as many as are asked at once later on


@dataclass
class Live:
    """One version, open.

    Attributes:
        directory: versions/N, resolved.
        manifest_content: its manifest.json when it was opened.
        opened: which files were opened, by `_files_of`; ONNX Runtime maps them.
        is_ahead: it was opened before there was an order.
        tower: digest of its vision tower, where that has been computed.
        reference_embeds: torch's answer to the reference pixels, where that has been computed.
    """

    directory: Path
    manifest_content: bytes
    opened: Files
    clip: Clip
    loaded: LoadedVersion
    is_ahead: bool = False
    tower: str | None = None
    reference_embeds: NDArray[np.float32] | None = None

    def fits(self, directory: Path) -> bool:
        """Whether this is the version in a directory, with the manifest and the files it has there now."""
        path = directory.resolve()
        return (
            path == self.directory
            and (path / MANIFEST_NAME).read_bytes() == self.manifest_content
            and _files_of(path, self.loaded.manifest) == self.opened
        )

    def close(self) -> None:
        """Let go of both halves; nothing can be asked any more."""
        self.loaded.close()
        del self.clip  # who started us still has this object, but nobody needs a second model

    def ask(
        self, examiner: Examiner, classes: Sequence[ClassEntry] | None = None, *, runs_at_once: int
    ) -> Grades:
        """Let ONNX Runtime answer the exams (`Examiner.ask`), then close it: learning needs the memory.

        Beside it the files of what was opened ahead are read once more; answers are kept only if they are
        what they were.

        Raises:
            VerifyError: a file is not any more what it was.
        """
        with self.loaded as loaded, ThreadPoolExecutor(1, thread_name_prefix="check") as beside:
            loaded.runs_at_once = runs_at_once
            checking = beside.submit(self.check_again)
            try:
                return examiner.ask(loaded, classes, tower=self.tower, before_keeping=checking.result)
            finally:
                checking.result()  # a damaged file explains whatever went wrong

    def check_again(self) -> None:
        """Read the files of what was opened ahead once more; what was opened just now has been read.

        Raises:
            VerifyError: a file is not any more what it was.
        """
        if self.is_ahead:
            check_used_files(self.directory, self.loaded.manifest)

    def reference_of(self, staging: Path) -> NDArray[np.float32] | None:
        """Torch's answer to the reference pixels, if it is known and a staged version has this tower."""
        if self.reference_embeds is None or not is_same_tower(staging, self.directory):
            return None
        return self.reference_embeds


def open_live(directory: Path) -> Live:
    """Open a version twice, for torch and for ONNX Runtime: both at once.

    Raises:
        VerifyError, ManifestError, ModelError: it cannot be used; says why.
    """
    directory = directory.resolve()
    manifest, content = load_manifest(directory), (directory / MANIFEST_NAME).read_bytes()
    files = _files_of(directory, manifest)
    with ThreadPoolExecutor(1, thread_name_prefix="open") as beside:
        opening = beside.submit(LoadedVersion, directory, threads=1, runs_at_once=usable_cpus())
        try:
            config_path, weights_path = directory / OPEN_CLIP_CONFIG_NAME, directory / WEIGHTS_NAME
            clip = load_version(config_path, weights_path, manifest.architecture)
        except BaseException:
            opening.result().close()
            raise
        loaded = opening.result()
    return Live(directory, content, files, clip, loaded)


def take_live(ahead: Live | None, directory: Path) -> Live:
    """The version in a directory: what was opened ahead if it is this one, else opened now.

    Raises:
        VerifyError, ManifestError, ModelError: it cannot be used; says why.
    """
    fitting = fitting_live(ahead, directory)
    return open_live(directory) if fitting is None else fitting


def fitting_live(ahead: Live | None, directory: Path) -> Live | None:
    """What was opened ahead if it is the version in a directory; else it is let go."""
    if ahead is not None and not ahead.fits(directory):
        ahead.close()
        return None
    return ahead


def open_ahead(home: Path, *, is_wanted: Callable[[], bool]) -> Live | None:
    """Open a home's live version before there is an order, and do what every order begins with.

    Args:
        is_wanted: asked before each thing that an order may as well do without; False ends it.

    Returns:
        None where it would take too much of the free memory: an order opens it then.

    Raises:
        DeployError, DynloraError, OSError: the version cannot be used.
    """
    store = StoreReader(home / "serving")
    directory = store.path(store.current())
    needed = _COPIES * load_manifest(directory).files[WEIGHTS_NAME].bytes
    if needed > _SHARE_OF_MEMORY * free_memory_bytes() or not is_wanted():
        return None
    live = open_live(directory)
    live.is_ahead = True
    try:
        for prepare in (_compute_tower, _warm_up, _compute_reference):
            if not is_wanted():
                break
            prepare(live)
    except BaseException:
        live.close()
        raise
    return live


def _files_of(directory: Path, manifest: Manifest) -> Files:
    """What tells a file from another put in its place: device, inode, size and time of its content."""
    found = {name: (directory / name).stat() for name in manifest.files if (directory / name).exists()}
    return {name: (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in found.items()}


def _compute_tower(live: Live) -> None:
    live.tower = vision_digest(live.directory)


def _warm_up(live: Live) -> None:
    """The first run of a shape plans its memory."""
    loaded = live.loaded
    height, width = loaded.preprocessing.size
    loaded.encode_pixels(np.zeros((_WARM_ROWS, 3, height, width), np.float32))
    loaded.encode_texts([""] * _WARM_ROWS)


def _compute_reference(live: Live) -> None:
    live.reference_embeds = reference_image_embeds(live.clip.model, live.clip.image_size)

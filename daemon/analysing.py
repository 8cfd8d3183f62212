"""`dynlora analyze`, worker side: a batch's images to tensors, the sweep, and its figures to files.

Reads the home and writes only where it is told to; the daemon may go on meanwhile.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from daemon.batch import Batch
from daemon.child import Outlet
from daemon.compose import Known
from daemon.config import Config
from daemon.errors import BatchError
from daemon.spool import Spool
from daemon.submit import looked_at
from daemon.tasks import load_images
from deploy import atomic
from deploy.cpus import usable_cpus
from deploy.manifest import (
    OPEN_CLIP_CONFIG_NAME,
    PREPROCESSOR_NAME,
    WEIGHTS_NAME,
    ClassEntry,
    load_classes,
)
from deploy.preprocess import Preprocessing
from deploy.store import VersionStore
from dynlora.analysis import Probe, Sweep, Trial, analyze
from dynlora.clip import load_version
from dynlora.settings import PAPER
from dynlora.task import Name, Task

RESULT_NAME = "analysis.json"


# The published loss, whatever the daemon learns with: it may update any matrix, where the default's own
# leaves the vision tower out. Faster than published, for the few steps of a trial; ranks stay dense.
_LEARNING = PAPER.with_overrides(
    batch_size=24, learning_rate=2e-3, betas=(0.9, 0.999), gates="ones", dense_fraction=1.0
)


@dataclass(frozen=True)
class Wanted:
    """What to analyse, and how."""

    source: str  # a batch of the home, or the path of a folder or archive
    probe: Path | None  # class folders that are only asked about
    ranks: Sequence[int]
    steps: int
    out: Path  # a folder; made where there is none


def analyze_batch(home: Path, wanted: Wanted, config: Config, *, outlet: Outlet) -> list[Path]:
    """Sweep on the live version; returns the files written.

    Raises:
        BatchError, InboxError: the batch or the probe cannot be used.
        DeployError, DynloraError: the live version cannot be used, or nothing is held out.
    """
    store = VersionStore(home / "serving")
    manifest = store.live_manifest()
    version_dir = store.path(manifest.version)
    torch.set_num_threads(config.learning.threads or usable_cpus())
    clip = load_version(
        version_dir / OPEN_CLIP_CONFIG_NAME, version_dir / WEIGHTS_NAME, manifest.architecture
    )
    preprocessing = Preprocessing.load(version_dir / PREPROCESSOR_NAME)
    known = load_classes(version_dir).classes
    with _batch(home, wanted.source, config) as (base, batch):
        task, held_out = _task(batch, base, preprocessing, known)
    probe = None
    if wanted.probe:
        with _batch(home, str(wanted.probe), config) as (base, batch):
            pixels, labels = load_images(batch, batch.images, base, preprocessing)
            probe = Probe(_classes(batch), pixels, labels)
    settings = _LEARNING.with_overrides(steps=wanted.steps)
    outlet.phase("train")
    trials = analyze(
        clip,
        task,
        held_out,
        sweep=Sweep(settings, wanted.ranks, config.learning.seed),
        probe=probe,
        told=lambda done, count: outlet.step(step=done, steps=count),
    )
    document = {
        "source": wanted.source,
        "version": manifest.version,
        "images": {"learnt": len(task.labels), "held_out": len(held_out.labels)},
        "probe": str(wanted.probe) if wanted.probe else None,
        "settings": settings.as_dict(),
        "seed": config.learning.seed,
        "trials": [asdict(trial) | {"retention": trial.retention} for trial in trials],
    }
    return _write(document, trials, wanted.out)


def _write(document: dict[str, object], trials: list[Trial], out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_json(out / RESULT_NAME, document)
    try:
        from daemon import analysis_plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return [out / RESULT_NAME]
    return [
        out / RESULT_NAME,
        *analysis_plots.draw([asdict(t) | {"retention": t.retention} for t in trials], out),
    ]


@contextmanager
def _batch(home: Path, source: str, config: Config) -> Iterator[tuple[Path, Batch]]:
    """A batch of the home by its id, or else what a drop of this path would be, with its images in place."""
    spool = Spool(home)
    if spool.find(source) is not None:
        batch = spool.load(source)
        if batch.forgotten:
            raise BatchError(f"the images of {source} were removed; give a folder instead")
        yield spool.path(source), batch
        return
    with looked_at(Path(source), config, Known()) as (base, batch):
        if not batch.classes:
            raise BatchError(f"no class in {source} has enough usable images")
        yield (
            base,
            batch.model_copy(
                update={"images": [image.model_copy(update={"file": image.origin}) for image in batch.images]}
            ),
        )


def _task(
    batch: Batch, base: Path, preprocessing: Preprocessing, known: Sequence[ClassEntry]
) -> tuple[Task, Probe]:
    """What is learnt, and what is held out of learning: the batch's tuning and exam images."""
    classes = _classes(batch)
    own = {c.key for c in batch.classes}  # however it is spelt, a name is not another one than itself
    pixels, labels = load_images(batch, batch.split("train"), base, preprocessing)
    held = [image for image in batch.images if image.split != "train"]
    others = [Name(entry.name, entry.template) for entry in known if entry.key not in own]
    task = Task(classes, pixels, labels, known=others)
    return task, Probe(classes, *load_images(batch, held, base, preprocessing))


def _classes(batch: Batch) -> list[Name]:
    return [Name(c.name, c.template) for c in batch.classes]

"""What the demo found: accuracies before and after, the table, and what must not have happened."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from traffic import Request, Swap, swaps

from deploy.client import Client
from deploy.manifest import GRAPH_NAMES, Manifest, load_classes
from deploy.store import VersionStore

MIN_REQUESTS = 200
MAX_GAP_SECONDS = 0.1  # during a swap


class Scores(NamedTuple):
    """Shares of images recognised; none of them was or will be dropped."""

    clothing: float  # among the names of all dropped classes
    groceries: float  # likewise
    never_dropped: float  # among the names of the classes that are never dropped


def score(client: Client, images: Path) -> Scores:
    """Ask about all held-out images. `images` is the folder of sample images."""
    dropped = [
        path.name for domain in ("clothing", "groceries") for path in _classes(images / "heldout" / domain)
    ]
    others = [path.name for path in _classes(images / "never_dropped")]
    return Scores(
        clothing=_accuracy(client, images / "heldout/clothing", dropped),
        groceries=_accuracy(client, images / "heldout/groceries", dropped),
        never_dropped=_accuracy(client, images / "never_dropped", others),
    )


def graph_hashes(store: VersionStore) -> dict[str, set[str]]:
    """Every sha256 of each graph over all versions: as recorded, and as the files still there have it."""
    recorded = [store.manifest(version).files for version in store.versions()]
    there = [store.path(version) for version in store.full_versions()]
    return {
        name: {files[name].sha256 for files in recorded} | {_sha256(path / name) for path in there}
        for name in GRAPH_NAMES
    }


def problems(requests: Sequence[Request], store: VersionStore) -> list[str]:
    """What must not have happened, one sentence each; empty when all is well."""
    found = []
    failed = [request for request in requests if request.error is not None]
    if failed:
        found.append(f"{len(failed)} requests failed, the first with {failed[0].error}")
    if len(requests) < MIN_REQUESTS:
        found.append(f"only {len(requests)} requests were made, expected at least {MIN_REQUESTS}")
    unseen = sorted(set(store.versions()) - {request.answered for request in requests})
    if unseen:
        found.append(f"no answer came from published version {', '.join(map(str, unseen))}")
    found += [
        f"{_ms(swap.longest_gap_seconds)} without an answer while version {swap.version} was taken up, "
        f"expected at most {_ms(MAX_GAP_SECONDS)}"
        for swap in swaps(requests)
        if swap.longest_gap_seconds > MAX_GAP_SECONDS
    ]
    found += [
        f"{name} has {len(hashes)} different sha256 over the versions, expected one"
        for name, hashes in graph_hashes(store).items()
        if len(hashes) != 1
    ]
    return found


def show(
    console: Console, store: VersionStore, requests: Sequence[Request], *, before: Scores, after: Scores
) -> None:
    """Print the two tables."""
    updates = [store.manifest(version) for version in store.versions() if version > 0]
    learnt = Table(title="What was learnt, and what was kept", title_justify="left")
    for heading in ("images", "asked among", "before", "after"):
        learnt.add_column(heading, justify="right" if heading in ("before", "after") else "left")
    for manifest in updates:
        learnt.add_row(*_exam_row(manifest, len(load_classes(store.path(manifest.version)).classes)))
    for heading, names, values in (
        ("held-out clothing", "the dropped names", (before.clothing, after.clothing)),
        ("held-out groceries", "the dropped names", (before.groceries, after.groceries)),
        ("groceries never dropped", "their names (zero-shot)", (before.never_dropped, after.never_dropped)),
    ):
        learnt.add_row(heading, names, *(f"{value:.1%}" for value in values))
    console.print(learnt)

    facts = Table(title="How it was served", title_justify="left", show_header=False)
    facts.add_column()
    facts.add_column(overflow="fold")  # a hash is shown whole
    for name, value in _facts(store, updates, requests):
        facts.add_row(name, value)
    console.print(facts)


def _exam_row(manifest: Manifest, known: int) -> tuple[str, str, str, str]:
    assert manifest.batch is not None
    heading = f"exam of {manifest.batch.id} ({manifest.batch.images.exam} images)"
    # A lone first class is always right among known names: there is no other to confuse it with.
    names = "the only known name" if known == 1 else f"the {known} known names"
    exams = (manifest.metrics or {}).get("exams")
    for exam in exams if isinstance(exams, list) else []:
        if isinstance(exam, dict) and exam["batch"] == manifest.batch.id:
            before, after = (float(str(exam[key])) for key in ("accuracy_before", "accuracy_after"))
            return heading, names, f"{before:.1%}", f"{after:.1%}"
    return heading, names, "not graded", "not graded"


def _facts(
    store: VersionStore, updates: Sequence[Manifest], requests: Sequence[Request]
) -> list[tuple[str, str]]:
    seen = sorted({request.answered for request in requests if request.answered is not None})
    hashes = graph_hashes(store)
    return [
        ("versions published", ", ".join(map(str, store.versions()))),
        ("versions that answered", ", ".join(map(str, seen))),
        *((f"ranks kept in version {m.version}", _ranks(m)) for m in updates),
        *((f"sha256 of {name}, all versions", " ".join(sorted(hashes[name]))) for name in GRAPH_NAMES),
        ("requests served", str(sum(request.error is None for request in requests))),
        ("requests failed", str(sum(request.error is not None for request in requests))),
        *((f"swap to version {swap.version}", _swap_in_words(swap)) for swap in swaps(requests)),
    ]


def _ranks(manifest: Manifest) -> str:
    ranks = list((manifest.ranks or {}).values())
    if not ranks:
        return "none recorded"
    mean = sum(ranks) / len(ranks)
    return f"{sum(ranks)} in {len(ranks)} matrices, {mean:.1f} each ({min(ranks)} to {max(ranks)})"


def _swap_in_words(swap: Swap) -> str:
    gap = _ms(swap.longest_gap_seconds)
    return f"taken up in {swap.pickup_seconds:.2f} s, {swap.requests} answers, longest gap {gap}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _classes(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _accuracy(client: Client, folder: Path, labels: list[str]) -> float:
    right = total = 0
    for class_dir in _classes(folder):
        answers = client.classify(sorted(class_dir.iterdir()), labels=labels, top=1)
        right += sum(answer.predictions[0].label == class_dir.name for answer in answers)
        total += len(answers)
    return right / total


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

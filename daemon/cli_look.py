"""Commands that only look: status, versions, show, classes, verify, check-config."""

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from daemon.output import Options, common_options, pass_options, percent, table
from daemon.report import exam_rows
from deploy.manifest import Manifest

MOST_DECISIONS = 5  # that `status` tells
MOST_NAMED = 20  # batches of one state, before it is enough to say how many more there are


@click.command()
@click.option("--watch", is_flag=True, help="A page that follows what goes on, until Ctrl-C.")
@common_options
@pass_options
def status(options: Options, *, watch: bool) -> None:
    """Say what is going on: queue, batch at work, live version, pin, last decisions."""
    from daemon.status import snapshot

    if watch:
        _watch(options)
        return
    found = snapshot(options.existing_home())
    options.show(found, lambda: _say_status(found))


@click.command()
@common_options
@pass_options
def versions(options: Options) -> None:
    """List all versions."""
    from daemon.audit import origin
    from deploy.space import state_of

    store = options.store()
    live, pin = store.current(), store.pin()
    rows = [
        {
            "version": number,
            "kind": manifest.kind,
            "parent": manifest.parent,
            "batch": manifest.batch.id if manifest.batch else None,
            "created_at": manifest.created_at.isoformat(timespec="seconds"),
            "live": number == live,
            "pinned": pin is not None and number == pin.version,
            "full": store.is_full(number),
            "state": state_of(store, number),
            **origin(manifest),
            **_own_exam(manifest),
        }
        for number in store.versions()
        for manifest in [store.manifest(number)]
    ]
    options.show({"versions": rows}, lambda: _say_versions(rows))


@click.command()
@click.argument("version", required=False, type=click.IntRange(min=0))
@common_options
@pass_options
def show(options: Options, version: int | None) -> None:
    """Show one version (default: the live one): batch, exams, ranks, decision rule by rule, history."""
    from daemon.audit import history
    from daemon.events import EventLog

    store = options.store()
    manifest = store.manifest(store.current() if version is None else version)
    told = history(EventLog(options.existing_home()).read(), manifest.version)
    document = manifest.model_dump(mode="json", by_alias=True) | {"history": told}
    options.show(document, lambda: _say_manifest(manifest, told))


@click.command()
@common_options
@pass_options
def classes(options: Options) -> None:
    """List the classes the live version knows, with template and origin."""
    from deploy.manifest import load_classes

    store = options.store()
    entries = load_classes(store.path(store.current())).classes
    document = {"version": store.current(), "classes": [entry.model_dump() for entry in entries]}
    rows = [[entry.name, entry.template, entry.batch or "known from the start"] for entry in entries]
    options.show(document, lambda: table(["class", "template", "origin"], rows))


@click.command()
@click.argument("version", required=False, type=click.IntRange(min=0))
@click.option("--trust", type=click.Path(path_type=Path), help="Public keys (PEM); one must have signed it.")
@common_options
@pass_options
def verify(options: Options, version: int | None, *, trust: Path | None) -> None:
    """Re-read a version (default: the live one): checksums, graphs, parity with its reference outputs."""
    from daemon.progress import showing
    from deploy.errors import VerifyError
    from deploy.signing import TrustedKeys
    from deploy.space import state_of
    from deploy.verify import graph_hashes, verify_version

    store = options.store()
    number = store.current() if version is None else version
    manifest = store.manifest(number)
    if (state := state_of(store, number)) in {"thin", "pruned"}:
        raise VerifyError(
            f"version {number} has no weights to verify: it is {state}; "
            f"`dynlora rebuild {number}` brings it back"
        )
    if trust is not None:
        TrustedKeys.load(trust).load_manifest(store.path(number))
    # A regraph brings graphs of its own; any other version has its parent's.
    parent = None
    if manifest.parent is not None and manifest.kind != "regraph":
        parent = graph_hashes(store.manifest(manifest.parent).files)
    with showing("warning") as view:
        view.update("verify", version=number)
        report = verify_version(store.path(number), parent_graphs=parent)
    document = {
        "version": number,
        "files": len(report.files),
        "parity": report.parity,
        "structure_checked": report.structure_checked,
        "signature_checked": trust is not None,
    }
    parity = ", ".join(f"{tower} {value:.1e}" for tower, value in report.parity.items())
    sentence = (
        f"version {number} is what it was: {len(report.files)} files; largest difference to torch {parity}"
    )
    options.show(document, lambda: click.echo(sentence))


@click.command("check-config")
@common_options
@pass_options
def check_config(options: Options) -> None:
    """Read the configuration and say what is wrong with it."""
    from daemon.environment import variables
    from daemon.errors import ConfigError
    from daemon.tracking import NOT_INSTALLED, is_installed

    path, config = options.config_path(), options.config()
    if config.mlflow.tracking_uri and not is_installed():
        where = path or "the environment"
        raise ConfigError(f"{where}: {NOT_INSTALLED}. Without it batches are learnt, and no runs are logged")
    names = [name for name, _ in variables(os.environ, {}).values()]
    document = {"file": str(path) if path else None, "environment": names, "config": config.model_dump()}
    options.show(document, lambda: click.echo(_say_sources(path, ", ".join(names))))


def _say_sources(path: Path | None, names: str) -> str:
    said = f"{path} is fine" if path else "no configuration file; the defaults count"
    return f"{said}; the environment sets {names}" if names else said


def _own_exam(manifest: Manifest) -> dict[str, Any]:
    """Accuracy on the version's own batch before and after; None where it has no exam."""
    own = manifest.batch.id if manifest.batch else None
    row = next((row for row in exam_rows(manifest) if row["batch"] == own), {})
    return {"exam_before": row.get("accuracy_before"), "exam_after": row.get("accuracy_after")}


def _watch(options: Options) -> None:
    from rich.console import Console

    from daemon.board import watch

    console = Console()
    if options.as_json or not console.is_terminal:
        raise click.UsageError(
            "--watch draws on a terminal; programs follow events.jsonl, or ask --json again"
        )
    with contextlib.suppress(KeyboardInterrupt):
        watch(options.existing_home(), console)


def _say_status(found: Mapping[str, Any]) -> None:
    from daemon.board import age, by_state, cells

    daemon = f"running (pid {found['daemon']}), {found['state']}" if found["daemon"] else "not running"
    click.echo(f"daemon    {daemon}")
    click.echo(f"live      {found.get('live_error') or 'version ' + str(found['live'])}")
    if pin := found["pin"]:
        why = f": {pin['why']}" if pin["why"] else ""
        click.echo(f"pinned    at version {pin['version']} by {pin['who']}{why}; `dynlora unpin` releases")
    if working := found["working"]:
        click.echo(f"learning  {working['batch']}: {working.get('phase')}{_steps(working)}")
    if revising := found["revising"]:
        named = revising.get("batch") or f"version {revising.get('version')}"
        click.echo(f"ordered   {revising['command']} {named}: {revising.get('phase')}{_steps(revising)}")
    if found["rests"]:
        click.echo(f"resting   {found['rests']['why']}")
    if found["trouble"]:
        click.echo(f"trouble   {found['trouble']}")
    if found["mlflow"]:
        click.echo(f"mlflow    {found['mlflow']}")
    if found["taking_in"]:
        drop = found["taking_in"]
        click.echo(f"taking in {drop['batch']}: {drop['phase']}{_steps(drop)}")
    for state, content in by_state(found).items():
        names = _some(content) if isinstance(content, list) else str(content)
        if names and names != "0":
            click.echo(f"{state:<9} {names}")
    if found["oldest_at"] is not None:
        click.echo(f"oldest    has waited for {age(time.time() - found['oldest_at'])} to be learnt")
    for sentence in found["inbox"]:
        click.echo(f"inbox     {sentence}")
    for event in found["decisions"][: -MOST_DECISIONS - 1 : -1]:
        moment, name, what, why = cells(event)
        said = " ".join(filter(None, (moment, name, what)))
        click.echo(f"last      {said}{': ' if why else ''}{why}")


def _some(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _steps(working: Mapping[str, Any]) -> str:
    from daemon.progress import figures

    found = figures(working)
    return f" {', '.join(found)}" if found else ""


def _say_versions(rows: list[dict[str, Any]]) -> None:
    def marks(row: dict[str, Any]) -> str:
        words = [word for word in ("live", "pinned") if row[word]]
        return ", ".join(words if row["full"] else [*words, row["state"]])

    table(
        ["version", "kind", "parent", "batch", "own exam before", "after", "created", "by", ""],
        [
            [
                str(row["version"]),
                row["kind"],
                "–" if row["parent"] is None else str(row["parent"]),
                row["batch"] or "–",
                percent(row["exam_before"]),
                percent(row["exam_after"]),
                row["created_at"][:16].replace("T", " "),
                row["operator"] or "–",
                marks(row),
            ]
            for row in rows
        ],
    )


def _say_manifest(manifest: Manifest, told: list[dict[str, Any]]) -> None:
    from daemon.audit import sentence

    parent = "" if manifest.parent is None else f", made from version {manifest.parent}"
    created = f"{manifest.created_at:%Y-%m-%d %H:%M:%S} UTC"
    click.echo(f"version {manifest.version}: {manifest.kind}{parent}, {created}")
    click.echo(f"{manifest.architecture}, embeddings of {manifest.embed_dim}, {_megabytes(manifest)}")
    if manifest.batch:
        counts = manifest.batch.images
        click.echo(f"batch {manifest.batch.id}: {', '.join(manifest.batch.classes)}")
        click.echo(f"images: {counts.train} learnt from, {counts.tune} tuned on, {counts.exam} in the exam")
    if exams := exam_rows(manifest):
        table(["exam", "images", "before", "after", "lost"], [_exam_cells(exam) for exam in exams])
    if manifest.ranks:
        ranks = sorted(manifest.ranks.values())
        mean = sum(ranks) / len(ranks)
        click.echo(f"kept ranks: {len(ranks)} matrices, {ranks[0]} to {ranks[-1]}, {mean:.1f} on average")
    if tokens := (manifest.method or {}).get("tokens"):
        click.echo(f"tokens of names with a new embedding: {tokens}")
    for rule in manifest.decision.rules if manifest.decision else ():
        click.echo(f"{'passed' if rule.passed else 'failed'}  {rule.rule}: {rule.detail}")
    for event in told:
        click.echo(sentence(event, manifest.version))


def _exam_cells(exam: Mapping[str, Any]) -> list[str]:
    accuracies = [percent(exam.get(key)) for key in ("accuracy_before", "accuracy_after")]
    return [str(exam["batch"]), str(exam["images"]), *accuracies, str(exam.get("negative_flips"))]


def _megabytes(manifest: Manifest) -> str:
    return f"{sum(record.bytes for record in manifest.files.values()) / 1e6:,.1f} MB"

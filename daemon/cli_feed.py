"""Commands that bring something in: init, run, submit."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from daemon import logs
from daemon.errors import ConfigError
from daemon.output import Options, common_options, pass_options

HELD, FAILED = 3, 1
_WITH_WEIGHTS = ("hf-hub:", "local-dir:")  # models that come with their own
_NO_IMAGES = (
    "init --images FOLDER, with any photographs, makes what is learnt more accurate: see docs/models.md"
)


@click.command()
@click.argument("home", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--model", default="bundled", show_default=True, help="The bundled CLIP or an open_clip architecture."
)
@click.option("--pretrained", help="An open_clip tag, or a checkpoint file.")
@click.option(
    "--classes",
    "classes_path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file of class names to know from the start, one per line.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of any photographs, read once: they tell learning what the model answers in general. The "
    "bundled model needs none.",
)
@common_options
@pass_options
def init(
    options: Options,
    home: Path | None,
    model: str,
    *,
    pretrained: str | None,
    classes_path: Path | None,
    images: Path | None,
) -> None:
    """Make a home and publish version 0."""
    from daemon.events import EventLog
    from daemon.foreground import run_worker
    from daemon.home import create_home, names_in, unmade_where_it_fails
    from daemon.lock import HomeLock
    from daemon.progress import showing
    from deploy.manifest import load_classes
    from deploy.store import VersionStore

    home = home or options.home
    store = VersionStore(home / "serving")
    if versions := store.versions():
        raise ConfigError(
            f"{home} is a home already, with versions up to {versions[-1]}; expected a free path. "
            f"Look at it with `dynlora status --home {home}`."
        )
    _check_weights(model, pretrained)
    _check_packages()
    before = names_in(home)
    create_home(home)
    arguments = ["init", "--home", str(home), "--model", model]
    arguments += ["--pretrained", pretrained] if pretrained else []
    arguments += ["--classes", str(classes_path)] if classes_path else []
    arguments += ["--images", str(images)] if images else []
    with HomeLock(home), showing() as view:
        with unmade_where_it_fails(home, before):
            run_worker(home, arguments, view)
        logs.log("initialised", home=str(home))
        EventLog(home).record("initialised", version=store.current())
        if images is None and (model != "bundled" or pretrained):
            logs.log("no_images_in_general", hint=_NO_IMAGES)
    names = [entry.name for entry in load_classes(store.path(0)).classes]
    manifest = store.live_manifest()
    document = {
        "home": str(home),
        "version": manifest.version,
        "architecture": manifest.architecture,
        "classes": names,
    }
    options.show(document, lambda: _say_initialised(home, manifest.architecture, len(names)))


@click.command()
@click.option(
    "--once",
    is_flag=True,
    help="Work off the inbox, then exit: 3 if a batch was held, 1 if one failed or a signal came.",
)
@common_options
@pass_options
def run(options: Options, *, once: bool) -> None:
    """Take in what is dropped, learn it, publish it; until SIGTERM or Ctrl-C."""
    from daemon import loop
    from daemon.progress import showing

    home, config = options.existing_home(), options.config()
    with showing(config.log.level, config.log.format) as view:
        found = loop.run(home, config, config_path=options.config_path(), view=view, once=once)
    events = {outcome["event"] for outcome in found["outcomes"]}
    options.show(found, lambda: _say_outcomes(found, once=once))
    if once:
        is_held = "held" in events or any(outcome.get("is_held") for outcome in found["outcomes"])
        has_failed = "failed" in events or found["signal"] is not None  # cut short, the work is not done
        sys.exit(FAILED if has_failed else HELD if is_held else 0)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Only say what would be accepted; submit nothing.")
@click.option("--wait", is_flag=True, help="Wait until it is live, held or failed, and exit accordingly.")
@click.option("--id", "producer_id", help="Your own key for this batch: the same id is never learnt twice.")
@click.option("--template", help="Prompt template with one {}, for example 'a scan of a {}.'.")
@common_options
@pass_options
def submit(
    options: Options, path: Path, *, check: bool, wait: bool, producer_id: str | None, template: str | None
) -> None:
    """Put a class folder, a batch folder or an archive into the inbox, complete."""
    from daemon import submit as door
    from daemon.progress import showing
    from daemon.waiting import batches_now, wait_for

    home, config = options.existing_home(), options.config()
    if check:
        _check(options, path)
        return
    earlier = batches_now(home)
    identity = door.submit(path, config.inbox_dir(home), producer_id=producer_id, templates=template)
    if not wait:
        document = {"id": identity, "inbox": str(config.inbox_dir(home))}
        options.show(document, lambda: click.echo(f"submitted {path} with id {identity}"))
        return

    with showing(config.log.level, config.log.format) as view:
        outcome = wait_for(home, identity, view, earlier=earlier)
    options.show(outcome, lambda: _say_outcome(outcome))
    sys.exit({"failed": FAILED, "held": HELD}.get(outcome["event"], 0))


def _check(options: Options, path: Path) -> None:
    from daemon import submit as door
    from daemon.reception import known

    report = door.check(path, options.config(), known(options.store()))
    document = {
        "accepted": report.is_accepted,
        "classes": report.classes,
        "set_aside": report.set_aside,
        "warnings": report.warnings,
        "refused": report.refused,
    }

    def text() -> None:
        for name, count in report.classes.items():
            click.echo(f"{name}: {count} images")
        for sentence in [*report.set_aside, *report.warnings]:
            click.echo(sentence)
        click.echo("it would be accepted" if report.is_accepted else f"it would be refused: {report.refused}")

    options.show(document, text)
    sys.exit(0 if report.is_accepted else FAILED)


def _check_weights(model: str, pretrained: str | None) -> None:
    """What is known without torch.

    Raises:
        ConfigError: the model has no weights of its own, and none were named.
    """
    if model != "bundled" and not pretrained and not model.startswith(_WITH_WEIGHTS):
        raise ConfigError(
            f"{model} was named without weights; expected --pretrained with an open_clip tag or a local file"
        )


def _check_packages() -> None:
    """Before anything is made: the worker's packages come with the daemon extra only.

    Raises:
        ModuleNotFoundError: one of them is not installed.
    """
    for name in ("torch", "open_clip", "onnx"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _say_initialised(home: Path, architecture: str, count: int) -> None:
    click.echo(f"{home} is ready: version 0 is live ({architecture}, {count} class names).")
    click.echo(
        f"Start the daemon with `dynlora --home {home} run` and drop class folders into {home / 'inbox'}."
    )


def _say_outcomes(found: dict[str, Any], *, once: bool) -> None:
    for outcome in found["outcomes"]:
        click.echo(_outcome_line(outcome))
    if found["signal"]:
        click.echo(f"stopped by {found['signal']}; what was begun goes on at the next start")
    elif once and not found["outcomes"]:
        pinned = "a version is pinned; batches wait for `dynlora unpin`" if found["pinned"] else None
        click.echo(pinned or found["rests"] or "there was nothing to learn")


def _say_outcome(outcome: dict[str, Any]) -> None:
    from daemon.batch import the_first

    for sentences in (outcome.get("set_aside", []), outcome.get("warnings", [])):
        for sentence in the_first(sentences, outcome.get("record", "")):
            click.echo(sentence)
    click.echo(_outcome_line(outcome))


def _outcome_line(outcome: dict[str, Any]) -> str:
    event, batch = outcome["event"], outcome.get("batch")
    if event == "published":
        if (live := outcome.get("live", outcome["version"])) != outcome["version"]:
            return f"{batch} became version {outcome['version']}; version {live} is live"
        return f"{batch} is live as version {outcome['version']}"
    if outcome.get("is_held"):
        return str(outcome["why"])
    if event == "held" and "duplicate_of" in outcome:
        return f"{batch} was not learnt: {outcome['why']}"
    if event == "duplicate":
        return f"{batch} was not learnt again: {outcome['duplicate_of']} brought the same"
    return f"{batch} {'was held' if event == 'held' else 'failed'}: {outcome.get('why')}"

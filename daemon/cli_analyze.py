"""`dynlora analyze`: where in the model a batch is learnt best, and where learning costs what was known."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from daemon.errors import ConfigError, InboxError
from daemon.output import Options, common_options, pass_options, percent, table
from daemon.spool import Spool

PLOTS_HINT = "no drawings: matplotlib is not installed; pip install 'dynlora[plots]'"


@click.command()
@click.argument("batch")
@click.option(
    "--probe",
    type=click.Path(path_type=Path, exists=True),
    help="Class folders that are never learnt: what is kept is the accuracy on them.",
)
@click.option("--ranks", default="4,16", show_default=True, help="Ranks to try, with commas between.")
@click.option("--steps", type=click.IntRange(min=1), default=60, show_default=True, help="Of each trial.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("analysis"),
    show_default=True,
    help="Folder for the figures (JSON) and the drawings; made if it is not there.",
)
@common_options
@pass_options
def analyze(options: Options, batch: str, *, probe: Path | None, ranks: str, steps: int, out: Path) -> None:
    """Learn a batch (its id, a folder or an archive) in one part of the model after the other, and compare.

    It learns with the published loss, whatever preset is configured: the default's leaves the vision tower as
    it is. Nothing is published, and nothing in the home changes.
    """
    from daemon.foreground import run_worker
    from daemon.progress import showing

    home = options.existing_home()
    _check_source(home, batch)
    config_path = options.config_path()
    arguments = ["analyze", "--home", str(home), "--source", batch, "--out", str(out.resolve())]
    arguments += ["--ranks", _checked_ranks(ranks), "--steps", str(steps)]
    arguments += ["--config", str(config_path)] if config_path else []
    arguments += ["--probe", str(probe)] if probe else []
    with showing(options.config().log.level) as view:
        found = run_worker(home, arguments, view)
    has_plots = find_spec("matplotlib") is not None

    def text() -> None:
        rows = [_cells(trial) for trial in found["trials"]]
        table(["location", "rank", "new", "kept", "‖ΔW‖", "mean kept rank"], rows)
        for file in found["files"]:
            click.echo(file)
        if not has_plots:
            click.echo(PLOTS_HINT, err=True)

    options.show(found, text)


def _check_source(home: Path, source: str) -> None:
    """Before a worker takes seconds to start.

    Raises:
        InboxError: it is no batch of the home, and no path.
    """
    if Spool(home).find(source) is None and not Path(source).exists():
        raise InboxError(f"{source} does not exist; give the id of a batch, a folder or an archive")


def _checked_ranks(text: str) -> str:
    try:
        ranks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        ranks = []
    if not ranks or ranks[0] < 1:
        raise ConfigError(f"--ranks is {text!r}; expected numbers of at least 1, such as 4,16")
    return ",".join(map(str, ranks))


def _cells(trial: dict[str, Any]) -> list[str]:
    ranks = trial["kept_ranks"].values()
    mean = f"{sum(ranks) / len(ranks):.1f}" if ranks else ""
    shares = [percent(trial["new_accuracy"]), percent(trial["retention"])]
    return [trial["location"], str(trial["rank"]), *shares, f"{trial['delta_norm']:.2f}", mean]

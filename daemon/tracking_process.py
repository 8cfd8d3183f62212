"""A process of its own that logs decided batches to MLflow, oldest first, one run each; then it ends.

    python -m daemon.tracking_process --home HOME --uri URI --experiment NAME

`daemon.tracking` starts it, hears it, and kills it when it takes too long. The only file that imports
mlflow, which takes seconds and may wait for a server for minutes. Killed anywhere, it is done again: a run
gets its last tag when it is whole, and one without that tag, or from before a retry, is deleted and made
anew.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from daemon.child import Outlet, die_with_parent
from daemon.run_notes import noted, read_note
from daemon.run_record import DECIDED_AT, RunRecord, gather_run
from daemon.supervisor import EXIT_DONE, EXIT_FAILED

HINT = "pip install 'dynlora[mlflow]'"
# The client's own patience is hours long, it reports who uses it to its makers, and a plain folder as a
# store wants to be asked for. What an operator has set counts.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "GIT_PYTHON_REFRESH": "quiet",  # it needs no git
}
_WHOLE = "dynlora.is_whole"
_AT_ONCE = 100  # parameters or tags in one request, which servers of all ages take
_METRICS_AT_ONCE = 500
_LONGEST_WHY = 300  # characters
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")


def main(arguments: Sequence[str] | None = None) -> int:
    """Log what has a note; returns the exit code."""
    options = _options(arguments)
    die_with_parent(options.parent_pid)
    outlet = Outlet()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        _log_all(options, outlet)
    except ModuleNotFoundError as error:
        outlet.say("error", message=f"the Python package {error.name} is not installed; {HINT}")
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - the client raises whatever a store or a server comes up with
        outlet.say("error", message=f"{options.uri} cannot be used: {_why(error)}")
        return EXIT_FAILED
    return EXIT_DONE


def _log_all(options: argparse.Namespace, outlet: Outlet) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    outlet.phase("connect")
    client = MlflowClient(options.uri)
    experiment = _experiment(client, options.experiment)
    for batch_id in noted(options.home):
        outlet.say("phase", phase="log", batch=batch_id)
        note = read_note(options.home, batch_id)
        record = None if note is None else gather_run(options.home, note)
        if note is None or record is None:
            outlet.say("gone", batch=batch_id)
            continue
        try:
            run_id = log_run(client, experiment, record, sign=lambda: outlet.phase("log"))
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            outlet.say("refused", batch=batch_id, decision=note.decision, why=_why(error))
        else:
            outlet.say("logged", batch=batch_id, decision=note.decision, run=run_id)


def log_run(client: Any, experiment: str, record: RunRecord, *, sign: Callable[[], None]) -> str:
    """Make the run of one batch, or bring it up to date where a whole one is there; returns its id.

    Args:
        sign: called after every request that took some of it, as a sign of progress.
    """
    words = " and ".join(f"tags.`{key}` = '{value}'" for key, value in record.identity.items())
    found = client.search_runs([experiment], words)
    known = next(
        (run for run in found if _WHOLE in run.data.tags and record.goes_on_from(run.data.tags)), None
    )
    for run in found:
        if run is not known:
            client.delete_run(run.info.run_id)
    if known is None:
        whole = _new_run(client, experiment, record, sign)
    else:
        whole = str(known.info.run_id)
        new = {key: value for key, value in record.params.items() if key not in known.data.params}
        _log(client, whole, params=new, tags=record.tags)
        if (
            known.data.tags.get(DECIDED_AT) != record.tags[DECIDED_AT]
        ):  # graded again: the latest value counts
            client.log_batch(whole, metrics=_final(record))
    client.set_tag(whole, _WHOLE, "true")
    return whole


def _new_run(client: Any, experiment: str, record: RunRecord, sign: Callable[[], None]) -> str:
    from mlflow.entities import Metric

    run = client.create_run(experiment, _ms(record.started_at), tags=record.identity, run_name=record.name)
    run_id = str(run.info.run_id)
    _log(client, run_id, params=record.params, tags=record.tags)
    curve = [
        Metric(name, value, _ms(point.at), point.step)
        for point in record.curve
        for name, value in (("loss", point.loss), ("kept_rank", point.kept_rank))
        if math.isfinite(value)
    ]
    metrics = [*curve, *_final(record)]
    for start in range(0, len(metrics), _METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + _METRICS_AT_ONCE])
        sign()
    client.set_terminated(run_id, "FAILED" if record.has_failed else "FINISHED", _ms(record.ended_at))
    return run_id


def _final(record: RunRecord) -> list[Any]:
    """The figures that are known at the end, as metrics of the last step."""
    from mlflow.entities import Metric

    last = record.curve[-1].step if record.curve else 0
    known = {name: value for name, value in record.figures.items() if math.isfinite(value)}
    return [Metric(name, value, _ms(record.ended_at), last) for name, value in known.items()]


def _log(client: Any, run_id: str, **values: Mapping[str, str]) -> None:
    from mlflow.entities import Param, RunTag

    kind = {"params": Param, "tags": RunTag}
    for name, pairs in values.items():
        items = [kind[name](key, value) for key, value in pairs.items()]
        for start in range(0, len(items), _AT_ONCE):
            client.log_batch(run_id, **{name: items[start : start + _AT_ONCE]})


def _experiment(client: Any, name: str) -> str:
    """The experiment's id; made where it is missing. Raises ValueError where it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name))
    if found.lifecycle_stage == "deleted":
        raise ValueError(
            f"the experiment {name!r} was deleted there; restore it, or set mlflow.experiment to another name"
        )
    return str(found.experiment_id)


def _ms(moment: float) -> int:
    return int(1000 * moment)


def _why(error: BaseException) -> str:
    """The innermost reason, in a line: what a client wraps around it says less."""
    text = str(error) or repr(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TimeoutError):
            text = "no answer in time"
        elif isinstance(cause, OSError) and cause.strerror:
            text = cause.strerror
        cause = cause.__cause__ or cause.__context__
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_WHY else f"{text[:_LONGEST_WHY]}…"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m daemon.tracking_process", description=__doc__)
    parser.add_argument("--parent-pid", type=int, default=os.getppid(), help="exit when this process ends")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--experiment", required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

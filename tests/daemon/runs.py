"""What lies in an MLflow store that is an SQLite file, read without the client that wrote it."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass


@dataclass
class Run:
    """One run: figures are (step, value) by name, in the order of steps."""

    name: str
    status: str
    experiment: str
    seconds: float
    params: dict
    tags: dict
    metrics: dict


def runs_of(path):
    """The runs that are not deleted, by name; none where there is no store."""
    if not path.exists():
        return []
    words = (
        "select r.run_uuid, r.name, r.status, e.name, (r.end_time - r.start_time) / 1000.0 from runs r "
        "join experiments e on e.experiment_id = r.experiment_id "
        "where r.lifecycle_stage = 'active' order by 2"
    )
    with closing(sqlite3.connect(path)) as database:

        def pairs(table, run):
            return dict(database.execute(f"select key, value from {table} where run_uuid = ?", [run]))

        found = []
        for run, name, status, experiment, seconds in database.execute(words).fetchall():
            metrics = {}
            rows = "select key, step, value from metrics where run_uuid = ? order by key, step"
            for key, step, value in database.execute(rows, [run]):
                metrics.setdefault(key, []).append((step, value))
            params, tags = pairs("params", run), pairs("tags", run)
            found.append(Run(name, status, experiment, seconds, params, tags, metrics))
        return found

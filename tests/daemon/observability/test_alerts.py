"""The alert rules and the dashboard, read and evaluated by Prometheus' own tool."""

import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest
import yaml

from daemon.metrics import Metrics
from daemon.spool import Spool
from deploy.store import VersionStore

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian package prometheus)")
FOLDER = Path(str(resources.files("daemon").joinpath("observability")))
NAME = re.compile(r"\b(?:dynlora|process)_[a-z_]+")
QUERIES = [
    target["expr"].replace("$job", ".+")
    for panel in json.loads((FOLDER / "grafana.json").read_text())["panels"]
    for target in panel["targets"]
]


def promtool(*arguments: object, cwd: Path, stdin: str | None = None) -> str:
    """Run it; what it said, once it was content."""
    command = [str(PROMTOOL), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, input=stdin)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_promtool
def test_every_alert_fires_when_it_should_and_none_on_a_healthy_daemon(tmp_path) -> None:
    """`promtool test rules`: the rules themselves, on series that are made up."""
    shutil.copy(FOLDER / "alerts.yml", tmp_path)
    shutil.copy(Path(__file__).with_name("alerts_test.yml"), tmp_path)

    assert "12 rules found" in promtool("check", "rules", "alerts.yml", cwd=tmp_path)
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml", cwd=tmp_path)


@needs_promtool
def test_every_query_of_the_dashboard_is_one_that_prometheus_reads(tmp_path) -> None:
    """As recording rules, which are parsed by the same code as the queries of a panel."""
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(QUERIES)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))

    found = promtool("check", "rules", "panels.yml", cwd=tmp_path)

    assert f"{len(QUERIES)} rules found" in found


@needs_promtool
def test_the_metrics_follow_the_conventions_of_prometheus(bare_metrics, tmp_path) -> None:
    """`promtool check metrics` knows the rules of naming, and has nothing to say about ours."""
    ours = [line for line in bare_metrics.text().decode().splitlines() if "dynlora_" in line]

    assert promtool("check", "metrics", cwd=tmp_path, stdin="\n".join(ours) + "\n") == ""


@pytest.mark.parametrize("name", ["alerts.yml", "grafana.json"])
def test_every_metric_that_is_named_exists(bare_metrics, name: str) -> None:
    """A renamed metric would leave a panel empty and an alert silent for ever."""
    text = (FOLDER / name).read_text()
    told = {sample for line in bare_metrics.text().decode().splitlines() for sample in NAME.findall(line)}

    named = set(NAME.findall(text))

    assert len(named) > 8
    assert named - told == set()


@pytest.fixture
def bare_metrics(tmp_path) -> Metrics:
    """The metrics of a home in which nothing has happened yet."""
    return Metrics(Spool(tmp_path), VersionStore(tmp_path / "serving"), "0")

"""What a scrape says after real batches, on a real port and in a real file."""

import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from daemon import tracking
from daemon.config import MetricsConfig, MlflowConfig
from daemon.config_sources import read_config
from daemon.errors import ConfigError
from daemon.run_notes import noted
from tests.daemon.running.conftest import QUICK, Bench


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parse(text: str) -> dict[tuple[str, ...], float]:
    """(name, label values…) → value of every sample."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """What Prometheus would read."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return parse(answer.read().decode())


@pytest.fixture
def port() -> int:
    """Where the bench's metrics are."""
    return free_port()


@pytest.fixture
def bench(home, port, tmp_path):
    """A started service whose metrics can be read on a port and in a file."""
    metrics = MetricsConfig(port=port, textfile=str(tmp_path / "dynlora.prom"))
    bench = Bench(home, QUICK.model_copy(update={"metrics": metrics}))
    bench.service.start()
    yield bench
    bench.service.stop(lambda: True)


def look(bench) -> None:
    """Let the daemon come round once more, late enough to look at the home again."""
    bench.now += 3
    bench.tick()


def test_a_life_of_two_batches_can_be_read_in_the_metrics(bench, port, tmp_path) -> None:
    """One published, one held: counters, stages, the queue, the live version and its exams."""
    look(bench)
    assert scrape(port)["dynlora_live_version",] == 0
    bench.drop("cups")
    bench.run()
    bench.behave(exams=[[40, 10, 0, 0]])
    bench.drop("plates")
    bench.run()
    look(bench)

    found = scrape(port)

    assert found["dynlora_batches_total", "published"] == 1
    assert found["dynlora_batches_total", "held"] == 1
    assert found["dynlora_batches_total", "failed"] == 0
    assert found["dynlora_attempts_total",] == 2
    assert found["dynlora_train_steps_total",] >= 2
    assert found["dynlora_inbox_batches", "held"] == 1
    assert found["dynlora_inbox_batches", "done"] == 1
    assert found["dynlora_live_version",] == 1
    assert found["dynlora_drop_to_live_seconds_count",] == 1
    assert found["dynlora_daemon_state", "idle"] == 1
    assert found["dynlora_inbox_oldest_age_seconds",] == 0
    created = bench.store.manifest(1).created_at.timestamp()
    assert found["dynlora_last_success_timestamp_seconds",] == pytest.approx(created)
    assert 80e6 < found["dynlora_disk_needed_bytes",] < 100e6  # twice the bundled model's version
    assert 0 < found["dynlora_disk_free_bytes",] <= found["dynlora_disk_size_bytes",]
    in_file = parse((tmp_path / "dynlora.prom").read_text())
    assert {k: v for k, v in in_file.items() if k[0].startswith("dynlora")} == {
        k: v for k, v in found.items() if k[0].startswith("dynlora")
    }
    assert (tmp_path / "dynlora.prom").stat().st_mode & 0o777 == 0o644


def test_a_step_is_counted_once_however_often_learning_is_resumed(bench, port) -> None:
    """Stopped at a checkpoint and gone on from it: what was learnt before is not made again."""
    steps = 24
    bench.behave(steps=steps, step_seconds=0.02)
    bench.drop("cups")
    for until in (8, 16):
        bench.tick_until(lambda until=until: (bench.service._lifecycle.working or {}).get("step", 0) >= until)
        bench.store.roll_back(0, who="me", why="")  # a pin interrupts
        bench.tick_until(lambda: bench.service._lifecycle.working is None)
        bench.store.unpin("me")
    bench.run()
    look(bench)

    assert bench.store.current() == 1
    assert 12 <= scrape(port)["dynlora_train_steps_total",] <= steps  # the last of a stop may go unseen


def test_a_drop_is_old_from_its_arrival_until_it_is_learnt(bench, port) -> None:
    """Pinned, so that it stays in the queue: what was dropped an hour ago is an hour old."""
    bench.store.roll_back(0, who="me", why="")
    bench.drop("cups")
    bench.tick_until(lambda: bench.spool.ids("queued"))
    bench.now += 3600
    bench.tick()

    found = scrape(port)

    assert found["dynlora_inbox_oldest_age_seconds",] == pytest.approx(3600, abs=60)
    assert found["dynlora_daemon_state", "pinned"] == 1


def test_batches_without_a_run_in_mlflow_are_counted_until_none_is_to_have_one(
    bench, port, monkeypatch
) -> None:
    """No client is installed, so what is decided waits; then MLflow is switched off."""
    monkeypatch.setattr(tracking, "is_installed", lambda: False)
    wanted = MlflowConfig(tracking_uri="http://127.0.0.1:9")
    bench.service.reconfigure(bench.config.model_copy(update={"mlflow": wanted}))
    look(bench)
    assert scrape(port)["dynlora_mlflow_waiting_batches",] == 0
    for name in ("cups", "plates"):
        bench.drop(name)
        bench.run()
    look(bench)
    assert scrape(port)["dynlora_mlflow_waiting_batches",] == len(noted(bench.home)) == 2

    bench.service.reconfigure(bench.config)
    look(bench)

    assert scrape(port)["dynlora_mlflow_waiting_batches",] == 0


def test_no_label_grows_with_batches_or_classes(bench, port) -> None:
    """As many series after three batches of new classes as after the first."""
    bench.drop("cups")
    bench.run()
    look(bench)
    before = set(scrape(port))
    for name in ("plates", "forks"):
        bench.drop(name)
        bench.run()
    look(bench)

    assert set(scrape(port)) == before


def test_a_port_that_is_taken_stops_nothing_and_is_taken_over_when_it_is_free(home, caplog) -> None:
    """The daemon learns; the log says once what is wrong."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        bench = Bench(home, QUICK.model_copy(update={"metrics": MetricsConfig(port=port)}))
        bench.service.start()
        bench.drop("cups")
        bench.run()
        look(bench)
        assert bench.store.current() == 1
        assert [record.getMessage() for record in caplog.records].count("metrics not readable") == 1
    bench.now += 31
    bench.tick()

    assert scrape(port)["dynlora_live_version",] == 1
    bench.service.stop(lambda: True)
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_a_folder_that_cannot_be_written_stops_nothing(home, tmp_path) -> None:
    """The textfile's folder is gone: told, and written once it is there."""
    path = tmp_path / "collector" / "dynlora.prom"
    bench = Bench(home, QUICK.model_copy(update={"metrics": MetricsConfig(textfile=str(path))}))
    bench.service.start()
    bench.drop("cups")
    bench.run()
    assert bench.store.current() == 1

    path.parent.mkdir()
    bench.now += 31
    bench.tick()
    assert parse(path.read_text())["dynlora_live_version",] == 1
    assert list(path.parent.iterdir()) == [path]
    bench.service.stop(lambda: True)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("port = 70000", "metrics.port is 70000"),
        ('textfile = "metrics.prom"', "expected an absolute path that ends in .prom"),
        ('textfile = "/var/lib/metrics.txt"', "expected an absolute path that ends in .prom"),
    ],
)
def test_a_place_that_cannot_be_is_refused(tmp_path: Path, line: str, answer: str) -> None:
    """With the key and what was expected."""
    path = tmp_path / "config.toml"
    path.write_text(f"[metrics]\n{line}\n")

    with pytest.raises(ConfigError, match=answer):
        read_config(path)

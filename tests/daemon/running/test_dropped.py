"""What goes by age while a daemon runs: told once, and never taken for something that was lost."""

import json
import os

from daemon.config import RetentionConfig
from tests.daemon.running.conftest import QUICK, Bench


def test_what_is_dropped_by_age_is_told_and_not_told_again(home):
    """An exam and a file of events of long ago: one event each, and no start makes up the old ones."""
    bench = Bench(home, QUICK)
    bench.service.start()
    bench.drop("cups")
    bench.run()
    [batch_id] = bench.spool.ids("done")
    ancient = home / f"events-{1:020d}.jsonl"
    (home / "events.jsonl").rename(ancient)
    os.utime(home / "exams" / batch_id / "exam.json", (0, 0))
    manifest = home / "serving" / "versions" / "1" / "manifest.json"
    told = json.loads(manifest.read_text())
    told["created_at"] = "2020-01-01T00:00:00Z"
    manifest.chmod(0o644)
    manifest.write_text(json.dumps(told))
    bench.service.stop(lambda: True)
    limits = RetentionConfig(exam_days=30, event_days=30)
    bench.config = QUICK.model_copy(update={"retention": limits})
    for _ in range(2):  # the second start finds the earlier events gone
        bench.new_service().start()
        bench.tick()
        bench.service.stop(lambda: True)

    assert not ancient.exists()
    assert not (home / "exams" / batch_id).exists()
    assert bench.events().count("events_dropped") == bench.events().count("exam_dropped") == 1
    assert "published" not in bench.events()

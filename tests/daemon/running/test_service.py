"""The service, iteration by iteration, with real files, a real store and a stand-in worker process."""

import pytest


def test_a_dropped_class_folder_becomes_a_live_version(bench):
    """From the inbox to `current`, with the exam kept and nothing left in between."""
    bench.drop("cups")
    bench.run()

    [batch_id] = bench.spool.ids("done")
    manifest = bench.store.live_manifest()
    assert bench.state() == {"done": [batch_id]}
    assert (manifest.version, manifest.parent, manifest.batch.id) == (1, 0, batch_id)
    assert manifest.decision.outcome == "publish"
    assert bench.events() == ["started", "queued", "adapting", "published"]

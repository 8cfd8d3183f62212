"""Taking a batch out again, thinning and rebuilding, with the real program and the real worker."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from deploy import space
from deploy.lineage import fold_lineage
from deploy.manifest import WEIGHTS_NAME, load_classes
from deploy.verify import verify_version
from tests.e2e.conftest import IMAGES, ROOT, Home, asking, wait_until

OTHER_MACHINE = {"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "3"}
# Photographs of clothes under wrong names, as a producer who swapped two lists would send them.
WRONG_NAMES = {"shoes": "lemon", "hat": "bucket", "dress": "ladder"}


def exam_of(home, version, batch):
    """Accuracy after a version on one batch's exam."""
    rows = {row["batch"]: row for row in home.store.manifest(version).metrics["exams"]}
    return rows[batch]["accuracy_after"]


def test_a_reverted_batch_is_gone_to_the_bit_and_every_version_can_be_rebuilt(undisturbed, tmp_path):
    """No daemon: the command does it itself. Torch and the graphs agree on the weights without the batch."""
    home = Home(shutil.copytree(undisturbed.path, tmp_path / "home", symlinks=True))
    first, second = home.spool.ids("done")

    done = home.dynlora("revert", first, "--why", "wrong images", "--json")

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    manifest = home.store.live_manifest()
    assert (answer["version"], manifest.version, manifest.kind) == (3, 3, "revert")
    assert [row["batch"] for row in answer["exams"]] == [second]
    assert [entry.batch for entry in manifest.lineage] == [second]
    assert fold_lineage(home.store, 3, manifest.lineage, tmp_path / "fold") == manifest.files[WEIGHTS_NAME]
    assert max(verify_version(home.store.path(3)).parity.values()) < 1e-5
    assert {entry.name for entry in load_classes(home.store.path(3)).classes} == {"tomato", "carrot"}
    shown = json.loads(home.dynlora("show", "3", "--json").stdout)
    assert [(event["event"], event["who"]) for event in shown["history"]] == [("reverted", manifest.operator)]
    assert home.dynlora("thin", "1").returncode == 0
    assert space.state_of(home.store, 1) == "thin"
    assert home.dynlora("rebuild", "1").returncode == 0
    verify_version(home.store.path(1))


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_a_mislabelled_batch_is_taken_out_and_the_accuracy_it_had_cost_comes_back(e2e_home, tmp_path):
    """Number 2 of 3, through a running daemon, while a client asks: the weights are the fold of 1 and 3."""
    home = e2e_home
    home.configure(steps=120)
    drop(home, tmp_path / "good", {name: name for name in WRONG_NAMES}, slice(0, 18))
    drop(home, tmp_path / "bad", WRONG_NAMES, slice(18, None))
    drop(home, tmp_path / "other", {"tomato": "tomato", "carrot": "carrot"}, slice(None))
    good, bad, other = (event["batch"] for event in home.finish(timeout=2000)["outcomes"])
    before = exam_of(home, 1, good)
    spoilt = exam_of(home, 3, good)
    daemon = home.start(once=False)
    try:
        wait_until(lambda: home.status().get("state") == "idle", why=home.log)
        with asking(home) as (seen, errors):
            done = home.dynlora("revert", bad, "--json", timeout=900)
            wait_until(lambda: 4 in seen, why=home.log)
    finally:
        daemon.terminate()
        daemon.wait(60)

    assert done.returncode == 0, done.stderr
    assert errors == []
    manifest = home.store.manifest(4)
    assert [entry.batch for entry in manifest.lineage] == [good, other]
    assert fold_lineage(home.store, 4, manifest.lineage, tmp_path / "fold") == manifest.files[WEIGHTS_NAME]
    after = exam_of(home, 4, good)
    print(f"exam of the good batch: {before:.1%} learnt, {spoilt:.1%} spoilt, {after:.1%} after the revert")
    assert spoilt < before
    assert after >= before - 0.1
    assert after > spoilt
    rebuild_elsewhere(home, [1, 2])


def drop(home, folder, names, images):
    """Submit demo photographs of classes (keys) under names (values)."""
    for source, name in names.items():
        [directory] = (IMAGES / "drop").glob(f"*/{source}")
        target = folder / name
        target.mkdir(parents=True)
        for path in sorted(directory.iterdir())[images]:
            shutil.copyfile(path, target / path.name)
    done = home.dynlora("submit", folder)
    assert done.returncode == 0, done.stderr


def rebuild_elsewhere(home, versions):
    """Thinned here, rebuilt in a process with other BLAS kernels and threads: the same bytes."""
    space.thin(home.store, versions)  # the policy pruned some of them already
    for version in versions:
        assert not home.store.is_full(version)
        environment = os.environ | OTHER_MACHINE
        done = subprocess.run(
            [sys.executable, "-m", "daemon.cli", "--home", str(home.path), "rebuild", str(version)],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        verify_version(home.store.path(version))

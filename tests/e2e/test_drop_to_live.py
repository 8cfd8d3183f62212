"""Drop → live with nothing replaced by a stand-in."""

import hashlib
import json
import shutil
import subprocess

import pytest

from daemon.exam_embeddings import EMBEDDINGS_NAME
from daemon.examine import Examiner
from daemon.exams import load_exams
from daemon.general import MOMENTS_NAME
from daemon.report import RESULT_DIR, load_report
from daemon.seen import OWN_NAME, SEEN_NAME, Seen
from deploy.manifest import load_classes
from deploy.runtime import LoadedVersion
from deploy.vision_digest import vision_digest
from dynlora.clip import BUNDLED_MOMENTS
from tests.daemon.runs import runs_of
from tests.e2e.conftest import DYNLORA, IMAGES, ROOT, Home, asking, environment, wait_until


def test_two_batches_become_two_versions_that_verify(undisturbed):
    """Each on top of the other, with the same graphs, and every file what its manifest says."""
    manifests = [undisturbed.store.manifest(n) for n in undisturbed.store.versions()]
    graphs = {(m.files["vision_model.onnx"].sha256, m.files["text_model.onnx"].sha256) for m in manifests}

    assert [m.version for m in manifests] == [0, 1, 2]
    assert len(graphs) == 1
    assert len(set(undisturbed.weights().values())) == 3
    assert [entry.batch for entry in manifests[2].lineage] == undisturbed.spool.ids("done")
    assert undisturbed.dynlora("verify").returncode == 0
    assert {exam.batch for _, exam in load_exams(undisturbed.path)} == set(undisturbed.spool.ids("done"))
    second = manifests[2].metrics["exams"]
    assert [row["batch"] for row in second] == undisturbed.spool.ids("done")[::-1]


def test_what_a_version_was_learnt_with_is_on_record(undisturbed):
    """Image moments and tokens, too; the vision tower is the first version's, as the preset wants it."""
    manifests = [undisturbed.store.manifest(n) for n in undisturbed.store.versions()]
    moments = hashlib.sha256((undisturbed.path / MOMENTS_NAME).read_bytes()).hexdigest()

    assert [m.method["moments_sha256"] == moments for m in manifests[1:]] == [True, False]
    assert Seen.load(undisturbed.path / SEEN_NAME).batches == tuple(undisturbed.spool.ids("done"))
    assert all(m.method["tokens"] > 0 for m in manifests[1:])
    assert len({vision_digest(undisturbed.store.path(m.version)) for m in manifests}) == 1
    assert all(m.metrics["mean_image_cosine"] == pytest.approx(1, abs=1e-6) for m in manifests[1:])


@pytest.mark.nightly
def test_images_in_general_can_be_given_with_a_new_home(tmp_path):
    """Moments of one's own photographs take the place of the bundled ones; too few are refused."""
    (tmp_path / "few").mkdir()
    shutil.copy(next((IMAGES / "heldout").rglob("*.jpg")), tmp_path / "few")
    refused, made = (
        subprocess.run(
            [*DYNLORA, "init", str(tmp_path / "home"), "--images", str(images)],
            cwd=ROOT, capture_output=True, text=True, check=False, env=environment(),
        )
        for images in (tmp_path / "few", IMAGES)
    )  # fmt: skip

    assert refused.returncode == 2
    assert "expected at least 256" in refused.stderr
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "home" / MOMENTS_NAME).read_bytes() != BUNDLED_MOMENTS.read_bytes()


def test_a_third_batch_embeds_no_exam_image_but_its_own(undisturbed, tmp_path):
    """What the workers of the first two kept is not made anew, and images that it is of are not looked at."""
    shutil.copytree(undisturbed.path, tmp_path / "home", symlinks=True)
    home = Home(tmp_path / "home")
    before = kept_embeddings(home)
    home.submit("dress")
    home.finish()
    after = kept_embeddings(home)

    assert list(before) == undisturbed.spool.ids("done")
    assert {batch: after[batch] for batch in before} == before
    assert list(after) == home.spool.ids("done")
    assert len(after) == 3
    assert not list(home.path.glob(f"spool/*/*/{EMBEDDINGS_NAME}"))
    examiner = Examiner(home.path, None, home.path, load_classes(home.store.path(3)).classes, threads=1)
    with LoadedVersion(home.store.path(3), threads=1) as version:
        version.encode_pixels = None  # nobody calls it
        assert len(examiner.ask(version).embeddings) == 3


def test_a_home_without_image_moments_learns_them_from_batch_to_batch(e2e_home):
    """The first batch is told what it lacks; the second knows what the first showed; no image is kept so."""
    (e2e_home.path / MOMENTS_NAME).unlink()
    for name in ("dress", "hat"):
        e2e_home.submit(name)
    e2e_home.finish()
    seen = Seen.load(e2e_home.path / SEEN_NAME)
    methods = [e2e_home.store.manifest(version).method["moments_sha256"] for version in (1, 2)]
    reports = [load_report(e2e_home.spool.path(batch) / RESULT_DIR) for batch in e2e_home.spool.ids("done")]

    assert seen.batches == tuple(e2e_home.spool.ids("done"))
    assert seen.classes == 2
    assert not list(e2e_home.path.glob(f"spool/*/*/{OWN_NAME}"))
    assert methods[0] is None
    assert len(methods[1]) == 64
    assert ["images in general" in " ".join(report.warnings) for report in reports] == [True, False]


def kept_embeddings(home):
    """Batch → inode and time of the file; one is written anew wherever an image was embedded."""
    states = {path.parent.name: path.stat() for path in home.path.glob(f"exams/*/{EMBEDDINGS_NAME}")}
    return {batch: (states[batch].st_ino, states[batch].st_mtime_ns) for batch in sorted(states)}


def test_the_program_answers_with_the_new_classes(undisturbed):
    """`classes` lists what was dropped with its origin, and `classify` chooses among it."""
    listed = json.loads(undisturbed.dynlora("classes", "--json").stdout)["classes"]
    image = next((IMAGES / "heldout").rglob("*.jpg"))
    answer = json.loads(undisturbed.dynlora("classify", image, "--json").stdout)

    assert {entry["name"] for entry in listed} == {"shoes", "hat", "tomato", "carrot"}
    assert {entry["batch"] for entry in listed} == set(undisturbed.spool.ids("done"))
    assert answer["version"] == 2
    assert {p["label"] for p in answer["images"][0]["predictions"]} == {"shoes", "hat", "tomato", "carrot"}


def test_a_folder_copied_into_the_inbox_of_a_running_daemon_is_seen_by_a_client(e2e_home):
    """No command at all: `cp -r`, and a client answers with the new version without a failed request."""
    e2e_home.configure(standby="true")  # as by default
    daemon = e2e_home.start(once=False)
    try:
        with asking(e2e_home) as (seen, errors):
            shutil.copytree(IMAGES / "drop" / "clothing" / "shoes", e2e_home.path / "inbox" / "shoes")
            wait_until(lambda: 1 in seen, why=e2e_home.log)
    finally:
        daemon.terminate()
        daemon.wait(60)

    assert (seen, errors) == ([0, 1], [])
    assert daemon.returncode == 0


def test_a_batch_that_gains_too_little_is_held_with_exit_code_3_until_it_is_promoted(e2e_home, tmp_path):
    """Two steps teach nothing: held with delta and report, the live version stays, no number is used.

    An operator may publish it all the same: its exams are graded again, and who and why is on record. MLflow,
    which was not there all the while, gets one run of it in the end.
    """
    e2e_home.configure(steps=2, min_gain=0.6, exam=0.5)
    log_to(e2e_home, "http://127.0.0.1:9")
    e2e_home.submit("tomato", "carrot", "zucchini", "yoghurt")  # little known: there is room to gain
    done = e2e_home.dynlora("run", "--once", "--json", timeout=200)

    [outcome] = json.loads(done.stdout)["outcomes"]
    [batch_id] = e2e_home.spool.ids("held")
    assert (done.returncode, outcome["event"]) == (3, "held"), done.stderr
    assert "expected at least +60.0%" in outcome["why"]
    assert e2e_home.store.versions() == [0]
    assert (e2e_home.spool.path(batch_id) / "result" / "delta.safetensors").is_file()

    promoted = e2e_home.dynlora("promote", batch_id, "--why", "needed today", "--json")
    assert promoted.returncode == 0, promoted.stderr
    answer = json.loads(promoted.stdout)
    assert (answer["version"], answer["exams"][0]["batch"]) == (1, batch_id)
    manifest = e2e_home.store.live_manifest()
    assert (manifest.version, manifest.kind, e2e_home.spool.find(batch_id)) == (1, "promote", "done")
    assert manifest.decision.rules[-1].detail.endswith("decided: needed today")
    assert e2e_home.dynlora("verify").returncode == 0

    e2e_home.configure()
    log_to(e2e_home, f"sqlite:///{tmp_path}/runs.db")
    e2e_home.finish()
    [run] = runs_of(tmp_path / "runs.db")
    assert (run.name, run.status, run.tags["dynlora.decision"]) == (batch_id, "FINISHED", "promoted")
    assert (
        [step for step, _ in run.metrics["loss"]] == [step for step, _ in run.metrics["kept_rank"]] == [1, 2]
    )
    assert run.metrics["drift_norm"] == [(2, pytest.approx(manifest.drift_norm))]
    assert (run.params["settings.steps"], run.params["version"]) == ("2", "1")
    assert run.tags["dynlora.weights.sha256"] == manifest.files["weights.safetensors"].sha256


def log_to(home, uri):
    """Have runs logged there from now on."""
    with (home.path / "config.toml").open("a") as file:
        file.write(f'[mlflow]\ntracking_uri = "{uri}"\n')


@pytest.mark.nightly  # every day: the same way through a full disk, and the same sentence from load_clip
def test_init_says_what_is_wrong_with_a_model_name(e2e_home, tmp_path):
    """One sentence from the worker, exit code 2, and the path can be used again."""
    e2e_home.path = tmp_path / "other"
    done = e2e_home.dynlora("init", tmp_path / "other", "--model", "no-such-model", "--pretrained", "openai")

    assert done.returncode == 2
    assert "open_clip knows no architecture 'no-such-model'" in done.stderr
    assert not (tmp_path / "other").exists()
    assert "Traceback" not in done.stderr


@pytest.mark.nightly  # every day: the worker alone, in test_home_faults
def test_weights_of_the_live_version_cut_short_stop_learning_with_the_batch_kept(e2e_home):
    """The worker names the damaged file; the batch waits in work/, for it is not to blame."""
    weights = e2e_home.store.path(0) / "weights.safetensors"
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.truncate(1_000_000)
    e2e_home.submit("shoes")
    done = e2e_home.dynlora("run", "--once", timeout=200)

    assert done.returncode == 1
    [batch_id] = e2e_home.spool.ids("work")
    assert "weights.safetensors" in done.stderr
    assert len(list((e2e_home.spool.path(batch_id) / "images").rglob("*.jpg"))) == 35

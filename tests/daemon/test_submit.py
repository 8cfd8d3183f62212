"""`dynlora submit`: all of it or nothing, and an honest answer beforehand."""

import shutil
from pathlib import Path

import pytest

from daemon.compose import Known, KnownClass
from daemon.config import Config
from daemon.errors import InboxError, NoSpaceError
from daemon.submit import check, submit
from daemon.waiting import batches_now, find


def tree(path: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["folders", "batch", "archive"])
def test_what_is_submitted_is_taken_in_at_once(bench, tmp_path: Path, kind: str) -> None:
    """Without waiting for anything to settle; the source stays as it was."""
    folder = bench.class_folder("dress", under=tmp_path / "spring")
    source = {"folders": folder, "batch": tmp_path / "spring", "archive": tmp_path / "spring.zip"}[kind]
    if kind == "archive":
        shutil.make_archive(str(tmp_path / "spring"), "zip", tmp_path / "spring")
    before = tree(tmp_path / "spring")

    identity = submit(source, bench.inbox, submitter="Ada")

    (event,) = bench.step()
    batch = bench.only("queued")
    assert event.message == f"{batch.id} is queued: 5 images of dress"
    assert batch.id == ("000001-dress" if kind == "folders" else "000001-spring")
    assert (batch.kind, batch.producer_id, batch.submitter) == (kind, identity, "Ada")
    assert bench.names_and_counts(batch) == {"dress": 5}
    assert list(bench.inbox.iterdir()) == []
    assert tree(tmp_path / "spring") == before


def test_an_id_of_ones_own_is_learnt_once(bench, tmp_path: Path) -> None:
    """Submitting again after a doubt is safe."""
    folder = bench.class_folder("dress", under=tmp_path)
    for _ in range(2):
        assert submit(folder, bench.inbox, producer_id="order-7") == "order-7"
        bench.step()

    assert bench.spool.ids("queued") == ["000001-dress"]
    assert bench.only("done").duplicate_of == "000001-dress"


def test_templates_can_be_given_for_all_or_by_class(bench, tmp_path: Path) -> None:
    """They go over what batch.toml says."""
    spring = tmp_path / "spring"
    for name in ("dress", "hat"):
        bench.class_folder(name, under=spring)
    (spring / "batch.toml").write_text('template = "from the note: {}"\n[classes.hat]\nname = "Straw hat"\n')

    for templates in ("all: {}", {"Hat": "one: {}"}):
        submit(spring, bench.inbox, templates=templates)
        bench.class_folder("more", under=spring)
        bench.step()

    first, second = (bench.spool.load(name) for name in bench.spool.ids("queued"))
    assert {c.name: c.template for c in first.classes} == {"dress": "all: {}", "Straw hat": "all: {}"}
    assert {c.name: c.template for c in second.classes} == {
        "dress": "from the note: {}",
        "Straw hat": "one: {}",
        "more": "from the note: {}",
    }


def test_one_submission_is_one_batch(bench, tmp_path: Path) -> None:
    """Two class folders submitted are not gathered."""
    for name in ("dress", "hat"):
        submit(bench.class_folder(name, under=tmp_path), bench.inbox)

    bench.step()

    assert bench.spool.ids("queued") == ["000001-dress", "000002-hat"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("missing", "does not exist; give a folder or an archive"),
        ("photo.png", "is a single file; give a class folder, a batch folder or a .zip"),
        ("hollow", "holds no files; give a folder of images, or of class folders"),
    ],
)
def test_what_cannot_be_submitted_is_refused(bench, tmp_path: Path, name: str, told: str) -> None:
    """With what to give instead, by check as well."""
    bench.paint(tmp_path / "photo.png")
    (tmp_path / "hollow" / "dress").mkdir(parents=True)

    for refuse in (lambda path: submit(path, bench.inbox), lambda path: check(path, Config())):
        with pytest.raises(InboxError, match=told):
            refuse(tmp_path / name)
    assert list(bench.inbox.iterdir()) == []


def test_a_template_without_a_place_for_the_name_is_refused(bench, tmp_path: Path) -> None:
    """Before anything is copied."""
    folder = bench.class_folder("dress", under=tmp_path)

    for templates in ("a photo", {"dress": "{} {}"}):
        with pytest.raises(InboxError, match="cannot be used: expected exactly one"):
            submit(folder, bench.inbox, templates=templates)
    assert list(bench.inbox.iterdir()) == []


def test_a_missing_inbox_is_answered_with_how_to_make_one(bench, tmp_path: Path) -> None:
    """Not with a new folder that no daemon looks into."""
    folder = bench.class_folder("dress", under=tmp_path)

    with pytest.raises(
        InboxError, match="is not a folder; give the home of a daemon, or make one with `dynlora init`"
    ):
        submit(folder, tmp_path / "nowhere")


def test_a_full_disk_leaves_nothing_half_submitted(make_bench, tmp_path: Path, mount_tmpfs) -> None:
    """The source is untouched and the sentence says to try again."""
    bench = make_bench(mount_tmpfs("disk", 1 << 20))
    for number in range(20):
        bench.paint(tmp_path / "dress" / f"{number}.png", size=(180, 180))

    with pytest.raises(NoSpaceError, match=r"the disk is full.*free some space and submit it again"):
        submit(tmp_path / "dress", bench.inbox)

    assert list(bench.inbox.iterdir()) == []
    assert len(list((tmp_path / "dress").iterdir())) == 20


def test_what_was_submitted_may_be_moved_by_the_inboxs_group(bench, tmp_path: Path) -> None:
    """Whatever the umask of the person was: a daemon of the same group need not copy it."""
    submit(bench.class_folder("dress", under=tmp_path), bench.inbox)

    (wrapper,) = bench.inbox.iterdir()
    for path in [wrapper, *wrapper.rglob("*")]:
        assert path.stat().st_mode & 0o7777 == (0o2775 if path.is_dir() else 0o664)


def test_links_are_handed_over_as_links(bench, tmp_path: Path) -> None:
    """And set aside: what they point to is not read. A link that is itself submitted is followed."""
    folder = bench.class_folder("dress", under=tmp_path / "real")
    (folder / "link.png").symlink_to("/etc/passwd")
    (tmp_path / "shortcut").symlink_to(folder)

    submit(tmp_path / "shortcut", bench.inbox)
    bench.step()

    batch = bench.only("queued")
    assert bench.names_and_counts(batch) == {"dress": 5}
    assert [item.sentence.partition(";")[0] for item in batch.set_aside] == [
        "dress/link.png was set aside: it is a link, and links are never followed"
    ]


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_check_says_what_intake_does_and_moves_nothing(bench, tmp_path: Path, kind: str) -> None:
    """The same sentences as the batch that then comes of it."""
    spring = tmp_path / "spring"
    bench.class_folder("dress", under=spring)
    bench.class_folder("hat", 2, under=spring)
    (spring / "dress" / "text.jpg").write_text("not an image")
    bench.paint(spring / "loose.png")
    path = spring
    if kind == "archive":
        path = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", spring))
    before = tree(tmp_path)
    known = Known(classes={"dress": KnownClass("Dress", "a {}")})

    report = check(path, Config(), known=known)

    assert report.is_accepted
    assert report.classes == {"Dress": 5}
    assert len(report.set_aside) == 3
    assert report.warnings == ["'dress' exists already, as 'Dress'; this batch adds images to it"]
    assert tree(tmp_path) == before
    bench.intake.known = lambda: known
    submit(path, bench.inbox)
    bench.step()
    batch = bench.only("queued")
    assert [item.sentence for item in batch.set_aside] == report.set_aside
    assert bench.names_and_counts(batch) == report.classes


def test_check_says_why_nothing_could_be_learnt(bench, tmp_path: Path) -> None:
    """One sentence for one problem."""
    report = check(bench.class_folder("dress", 1, under=tmp_path), Config())

    assert not report.is_accepted
    assert (report.refused or "").startswith(
        "dress was set aside: it has 1 usable image; a class needs at least 4"
    )
    (tmp_path / "broken.zip").write_bytes(b"x")
    broken = check(tmp_path / "broken.zip", Config())
    assert (broken.refused or "").startswith("broken.zip is damaged or not an archive")


def test_an_id_that_was_given_wins_over_the_note(bench, tmp_path: Path) -> None:
    """One that was made up does not; the drop is found either way."""
    for given, expected in (("order-8", "order-8"), (None, "order-7")):
        bench.class_folder("dress", under=tmp_path / "spring")
        (tmp_path / "spring" / "batch.toml").write_text('id = "order-7"')
        earlier = batches_now(bench.home)

        identity = submit(tmp_path / "spring", bench.inbox, producer_id=given)
        assert find(bench.spool, identity, earlier) is None
        bench.step()

        state, batch = find(bench.spool, identity, earlier) or ("", "")
        assert bench.spool.load(batch).producer_id == expected
        assert state == "queued"


def test_an_earlier_batch_of_the_same_id_is_not_the_one_waited_for(bench, tmp_path: Path) -> None:
    """What became of that one is no answer for this one."""
    for count in (1, 5):
        earlier = batches_now(bench.home)
        submit(bench.class_folder("dress", count, under=tmp_path), bench.inbox, producer_id="order-7")
        assert find(bench.spool, "order-7", earlier) is None
        bench.step()

    assert find(bench.spool, "order-7", earlier) == ("queued", "000002-dress")

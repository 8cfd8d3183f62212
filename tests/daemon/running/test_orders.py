"""Promote, revert, rebuild: what is published on an operator's word, what is refused, who interrupts."""

import json
import time

import pytest

from daemon import requests
from daemon.audit import history
from daemon.events import EventLog
from daemon.exams import load_exams
from daemon.report import ExamResult
from daemon.requests import Answer, Request
from daemon.standby import Standby
from deploy import space
from deploy.manifest import DELTA_NAME, load_classes
from tests.daemon.running.tiny_home import TinyHome, batch_name
from tests.deploy.tiny import stage_update

HARM = ExamResult(batch=batch_name(3), images=40, correct_before=30, correct_after=10, gained=0, lost=20)


@pytest.fixture
def tiny(tmp_path):
    """A daemon on a home of versions 0 to 3."""
    tiny = TinyHome(tmp_path / "home")
    tiny.create(3)
    tiny.start()
    yield tiny
    tiny.service.stop(lambda: True)


def order(tiny, command, **fields):
    """Leave a request and tick until it is answered."""
    name = requests.leave(tiny.home, Request(command=command, who="ann", **fields))
    return wait(tiny, lambda: requests.take_answer(tiny.home, name))


def wait(tiny, found, seconds=30):
    """Tick until something is found, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, tiny.service.trouble
        tiny.tick()
        time.sleep(0.002)
    return value


def events(tiny, name):
    """The events of that name, without their time."""
    found = [dict(event) for event in EventLog(tiny.home).read() if event["event"] == name]
    return [{key: event[key] for key in event if key not in ("at", "event")} for event in found]


def test_a_promoted_batch_is_published_on_top_of_whatever_is_live_by_now(tiny):
    """Learnt on version 3, promoted onto 4: its delta is appended, its exam kept, who and why recorded."""
    batch = tiny.add("held", 4)
    order(tiny, "revert", batch=batch_name(1))

    answer = order(tiny, "promote", batch=batch, why="the exam was too small")

    manifest = tiny.store.live_manifest()
    assert answer.result["version"] == manifest.version == 5
    assert (manifest.kind, manifest.parent, manifest.operator) == ("promote", 4, "ann")
    assert [entry.batch for entry in manifest.lineage] == [batch_name(2), batch_name(3), batch]
    assert manifest.decision.rules[-1].detail == "ann decided: the exam was too small"
    assert DELTA_NAME in manifest.files
    assert tiny.spool.find(batch) == "done"
    assert batch in {exam.batch for _, exam in load_exams(tiny.home)}
    assert tiny.spool.load(batch).id == batch
    assert events(tiny, "promoted") == [
        {"batch": batch, "version": 5, "who": "ann", "why": "ann decided: the exam was too small"}
    ]


@pytest.mark.parametrize("command", ["promote", "revert"])
def test_the_worker_that_stands_by_is_given_a_promotion_or_a_revert(tiny, command):
    """As a batch would be: importing torch and opening the live version are most of what they wait for."""
    batch = tiny.add("held", 4) if command == "promote" else batch_name(3)
    given = tiny.home / "given.json"
    standby = Standby(lambda *_: ["sh", "-c", f"cat > {given}"], tiny.home)
    tiny.service._reviser._standby = standby
    standby.keep(0.0, 3)

    answer = order(tiny, command, batch=batch)

    arguments = json.loads(given.read_text())["arguments"]
    assert (arguments[0], arguments[-3:]) == (command, [batch, "--parent", "3"])
    assert standby.pid is None
    assert answer.exit_code == 1  # it said nothing of what it had done


def test_a_revert_that_loses_too_much_is_refused_with_3_unless_the_operator_insists(tiny):
    """Nothing is published, the figures are in the answer; the same with insist goes live and says so."""
    tiny.exams = [HARM]

    refused = order(tiny, "revert", batch=batch_name(2))

    assert refused.exit_code == 3
    assert "evidence of loss: 0 images gained, 20 lost of 40" in refused.error
    assert "--insist" in refused.error
    assert refused.result["exams"] == [HARM.model_dump()]
    assert (tiny.store.current(), tiny.store.versions()) == (3, [0, 1, 2, 3])
    assert not list(tiny.store.versions_dir.glob(".staging-*"))
    assert [event["who"] for event in events(tiny, "revert_refused")] == ["ann"]

    insisted = order(tiny, "revert", batch=batch_name(2), insist=True, why="mislabelled")

    assert insisted.exit_code == 0
    rules = tiny.store.live_manifest().decision.rules
    assert [(rule.rule, rule.passed) for rule in rules] == [("old_exams", False), ("operator", True)]
    names = [entry.name for entry in load_classes(tiny.store.path(4)).classes]
    assert names == ["old", "class 1", "class 3"]


def test_what_was_done_already_is_answered_well_and_done_once(tiny):
    """A request names its effect."""
    first, second = (order(tiny, "revert", batch=batch_name(2)) for _ in range(2))

    assert (first.result["version"], second.result) == (4, {"live": 4, "version": 4, "already": True})
    held = tiny.add("held", 5)
    first, second = (order(tiny, "promote", batch=held) for _ in range(2))
    assert (first.result["version"], second.result["version"], second.result["already"]) == (5, 5, True)
    assert tiny.store.versions() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("command", "batch", "sentence"),
    [
        ("promote", batch_name(9), "there is no such batch"),
        ("promote", "../serving", "there is no such batch"),
        ("revert", batch_name(9), f"was not learnt from it, but from {batch_name(1)}, {batch_name(2)}"),
        ("forget", batch_name(9), "there is no batch"),
        ("forget", "../../etc", "there is no batch"),
        ("forget", None, "there is no batch"),
        ("revert", None, "does not name a batch"),
    ],
)
def test_a_batch_that_is_not_there_is_refused_with_what_is(tiny, command, batch, sentence):
    """And nothing outside the spool can be named."""
    answer = order(tiny, command, batch=batch)

    assert answer.exit_code == 1
    assert sentence in answer.error


def test_a_batch_at_work_is_interrupted_by_a_revert_and_starts_over_from_the_new_parent(tiny):
    """Its attempt does not count as one that failed."""
    batch = tiny.add("queued", 4)
    wait(tiny, lambda: tiny.service._lifecycle.working)

    order(tiny, "revert", batch=batch_name(3))
    wait(tiny, lambda: tiny.service._lifecycle.working)

    attempts = tiny.spool.load(batch).attempts
    assert attempts[0].outcome == f"restarted: ann asked to revert {batch_name(3)}"
    assert attempts[1].outcome is None
    assert [event["parent"] for event in events(tiny, "adapting")] == [3, 4]


def test_a_command_that_no_longer_waits_ends_the_work_it_asked_for(tiny):
    """Interrupted at its terminal: the worker is gone, nothing is staged, learning goes on."""
    tiny.child = ["sleep", "300"]
    tiny.add("queued", 4)
    name = requests.leave(tiny.home, Request(command="revert", batch=batch_name(1)))
    wait(tiny, lambda: tiny.service._reviser.working)
    pid = tiny.service._reviser._job.worker.pid
    assert json.loads((tiny.home / "status.json").read_text())["revising"]["request"] == name
    command = tiny.service._reviser.working["command"]
    assert tiny.service.summary.startswith(f"{command} ")  # what `systemctl status` says

    requests.withdraw(tiny.home, name)
    wait(tiny, lambda: tiny.service._lifecycle.working)

    assert tiny.service._reviser.working is None
    with pytest.raises(ProcessLookupError):
        __import__("os").kill(pid, 0)
    assert not list(tiny.store.versions_dir.glob(".staging-*"))
    assert tiny.store.current() == 3


def test_a_request_under_way_may_take_longer_than_a_command_waits_for_a_beginning(tiny, monkeypatch):
    """How old it is matters only until it is begun."""
    tiny.child = ["sh", "-c", f"sleep 0.3; cat {tiny.home / 'said.jsonl'}"]
    monkeypatch.setattr(requests, "TIMEOUT_SECONDS", 0.2)

    answer = order(tiny, "revert", batch=batch_name(1))

    assert answer.exit_code == 0, answer.error


def test_a_worker_that_fails_leaves_the_live_version_and_its_own_words(tiny):
    """Said by the answer; the next command is carried out."""
    tiny.child = ["sh", "-c", "echo weights are broken >&2; exit 1"]

    answer = order(tiny, "revert", batch=batch_name(1))

    assert answer.exit_code == 1
    assert "its last words: weights are broken" in answer.error
    assert tiny.store.current() == 3
    tiny.child = None
    assert order(tiny, "revert", batch=batch_name(1)).exit_code == 0


def test_a_promotion_cut_short_before_the_batch_was_moved_is_finished_at_the_next_start(tiny, monkeypatch):
    """It is published, so it goes to done/, and its event is told once."""
    batch = tiny.add("held", 4)
    with monkeypatch.context() as patch:
        patch.setattr(type(tiny.spool), "move", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            order(tiny, "promote", batch=batch)
    assert (tiny.spool.find(batch), tiny.store.current()) == ("held", 4)

    tiny.start()

    assert tiny.spool.find(batch) == "done"
    assert [event["version"] for event in events(tiny, "promoted")] == [4]
    assert not (tiny.spool.path(batch) / "result" / DELTA_NAME).exists()


def test_a_pinned_store_takes_neither_promotions_nor_reverts(tiny):
    """The answer says who pinned it; a rebuild changes nothing that is live and goes on."""
    tiny.store.roll_back(to=3, who="bob", why="")
    space.thin(tiny.store, [1])

    refused = order(tiny, "revert", batch=batch_name(2))

    assert refused == Answer(
        exit_code=1, error="version 3 is pinned by bob: nothing is published until `dynlora unpin`"
    )
    found = order(tiny, "rebuild", to=1).result
    assert found == {"version": 1, "files": ["weights.safetensors"], "is_full": True}
    assert tiny.store.is_full(1)


def test_a_rebuild_that_a_thin_overtakes_does_not_call_the_version_whole(tiny):
    """Both are carried out; what the second one removed is gone, and the first one's answer says so."""
    orders = [Request(command="rebuild", who="ann", to=1), Request(command="thin", who="bob", versions=(1,))]
    first, second = (requests.leave(tiny.home, request) for request in orders)

    thinned = wait(tiny, lambda: requests.take_answer(tiny.home, second))
    rebuilt = wait(tiny, lambda: requests.take_answer(tiny.home, first))

    assert (thinned.exit_code, rebuilt.exit_code) == (0, 0)
    assert rebuilt.result == {"version": 1, "files": [], "is_full": False}
    assert not tiny.store.is_full(1)


def test_the_history_of_a_version_names_who_when_and_why(tiny):
    """Thinned, rebuilt, made live, rolled back from: everything told of it, in order."""
    order(tiny, "thin", versions=(1,), why="space")
    order(tiny, "rebuild", to=1, why="audit")
    order(tiny, "rollback", to=1, why="bad answers")
    order(tiny, "unpin", to=1)

    told = history(EventLog(tiny.home).read(), 1)

    assert [(event["event"], event.get("who"), event.get("why")) for event in told] == [
        ("published", None, None),
        ("thinned", "ann", "space"),
        ("rebuilt", "ann", "audit"),
        ("rolled_back", "ann", "bad answers"),
        ("unpinned", "ann", None),
    ]
    assert [event["event"] for event in history(EventLog(tiny.home).read(), 3)] == [
        "published",
        "rolled_back",
    ]


def test_versions_that_must_stay_are_named_with_their_reason(tiny):
    """Those that may go do, all the same."""
    answer = order(tiny, "thin", versions=(0, 1, 2, 3))

    assert answer.result["versions"] == [1]
    assert answer.result["kept"] == {
        "0": "it is the first version, and all weights are folded from it",
        "2": "it is the one before the live version, to roll back to",
        "3": "it is live",
    }


def test_what_was_held_and_published_under_another_id_meanwhile_is_not_promoted(tiny):
    """The same images would count twice."""
    held = tiny.add("held", 4)
    twin = tiny.spool.load(held).content_sha256
    staging, manifest = stage_update(tiny.store, batch_name(5), ["class 5"])
    info = manifest.batch.model_copy(update={"content_sha256": twin})
    tiny.store.publish(staging, manifest.model_copy(update={"batch": info}))

    answer = order(tiny, "promote", batch=held)

    assert answer.exit_code == 1
    assert f"{batch_name(5)} brought the same and is in the live version" in answer.error

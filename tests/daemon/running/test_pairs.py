"""Every pair of commands, left at the same moment, at every stage of a batch: each ends as the model says."""

import itertools
import shutil
import time
from dataclasses import dataclass

import pytest

from daemon import requests
from daemon.requests import Request
from daemon.spool import STATES
from deploy.lineage import fold_lineage
from deploy.manifest import WEIGHTS_NAME
from deploy.verify import check_files
from tests.daemon.running.tiny_home import TinyHome, batch_name

BATCH = batch_name(5)
COMMANDS = {
    "rollback": {"to": 0},
    "unpin": {"to": 0},
    "promote": {"batch": BATCH},
    "revert": {"batch": BATCH},
    "thin": {"versions": (1,)},
    "rebuild": {"to": 1},
    "prune": {"versions": (1,)},
    "forget": {"batch": BATCH},
}
STAGES = ("queued", "work", "held", "done")
EVERY_DAY = ("work", "held")
CHANGING = ("promote", "revert")
DONE, FAILED, UNDER_WAY = 0, 1, None


@dataclass
class Model:
    """What is known of the home, and what a command's exit code must be."""

    stage: str
    is_pinned: bool = False
    is_live: bool = False  # the batch is in the live version
    busy: str | None = None

    def begin(self, command: str) -> int | None:
        """The exit code at once; None where it takes long and is under way."""
        if command in (*CHANGING, "rebuild"):
            return self._begin_long(command)
        if command == "rollback":
            self.is_pinned, self.is_live = True, False
        elif command == "unpin":
            self.is_pinned = False
        elif command == "forget":
            if self.busy in CHANGING:
                return FAILED
            self.stage = "failed" if self.stage in ("queued", "work") else self.stage
        return DONE

    def _begin_long(self, command: str) -> int | None:
        if self.busy is not None:
            return FAILED
        if command == "promote" and self.is_live:
            return DONE
        possible = {"promote": self.stage == "held", "revert": self.is_live, "rebuild": True}[command]
        if not possible or (self.is_pinned and command in CHANGING):
            return FAILED
        self.busy = command
        return UNDER_WAY

    def end(self) -> int:
        """The exit code of what was under way."""
        is_overtaken = self.busy in CHANGING and self.is_pinned
        if not is_overtaken and self.busy == "promote":
            self.stage = "done"
        return FAILED if is_overtaken else DONE


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in EVERY_DAY else [pytest.mark.nightly]) for name in STAGES],
)
def stage(request, tmp_path_factory):
    """The name of the stage, and a home at it to be copied: versions 0 to 4, and a fifth batch."""
    home = TinyHome(tmp_path_factory.mktemp(request.param) / "home")
    home.create(5 if request.param == "done" else 4)
    if request.param == "queued":
        shutil.move(home.spool.path(home.add("queued", 6)), home.spool.state_dir("work"))
    if request.param != "done":
        home.add("queued" if request.param == "work" else request.param, 5)
    return request.param, home.home


@pytest.fixture
def tiny(stage, tmp_path):
    """A daemon on a copy, with the batch at its stage."""
    shutil.copytree(stage[1], tmp_path / "home", symlinks=True)
    tiny = TinyHome(tmp_path / "home")
    tiny.start()
    tick_until(tiny, lambda: tiny.spool.find(BATCH) == stage[0] and is_as_meant(tiny, stage[0]))
    yield tiny
    tiny.service.stop(lambda: True)


def is_as_meant(tiny, stage):
    """Where a worker is meant to be at work, it is."""
    return stage in ("held", "done") or tiny.service._lifecycle.working is not None


def tick_until(tiny, is_true, seconds=30):
    """Tick until a condition holds."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, tiny.service.trouble
        tiny.tick()
        time.sleep(0.001)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(COMMANDS, COMMANDS)))
def test_each_of_two_commands_ends_in_its_answer_and_leaves_a_sound_home(tiny, stage, first, second):
    """Exit codes as the model has them, a sentence with every refusal, and nothing half done."""
    model = Model(stage[0], is_live=stage[0] == "done")
    expected = [model.begin(first), model.begin(second)]
    expected = [model.end() if code is UNDER_WAY else code for code in expected]

    names = [requests.leave(tiny.home, Request(command=c, who="ann", **COMMANDS[c])) for c in (first, second)]
    answered = tiny.home / "requests" / "done"
    tick_until(tiny, lambda: len(list(answered.iterdir())) == len(names))
    answers = [requests.take_answer(tiny.home, name) for name in names]

    assert [answer.exit_code for answer in answers] == expected, answers
    assert all(answer.error for answer in answers if answer.exit_code)
    assert not list((tiny.home / "requests").glob("*.json"))
    assert_sound(tiny, model)


def assert_sound(tiny, model):
    """Live version whole and the fold of its lineage; the batch where it belongs, once; no leftovers."""
    store = tiny.store
    live = store.live_manifest()
    check_files(store.path(live.version), live.files)
    assert fold_lineage(store, live.version, live.lineage, tiny.home / "fold") == live.files[WEIGHTS_NAME]
    assert (store.pin() is not None) == model.is_pinned
    settled = model.stage if model.stage in ("held", "done", "failed") else None
    places = [state for state in STATES if (tiny.spool.root / state / BATCH).exists()]
    assert places in ([settled] if settled else ["queued"], [settled] if settled else ["work"])
    if tiny.spool.load(BATCH).forgotten is not None:
        assert not list(tiny.spool.path(BATCH).rglob("*.png"))
        assert not (tiny.home / "exams" / BATCH).exists()
    assert not [path for path in store.versions_dir.iterdir() if path.name.startswith(".staging-")]

"""The worker's side of learning: when it saves, what it loads."""

from daemon.adaptation import _hooks
from dynlora.learner import Progress


class Outlet:
    """Keeps what was said."""

    def __init__(self):
        self.said = []

    def step(self, **fields):
        """One training step."""
        self.said.append(fields)


class Stop:
    """Nobody asked to stop."""

    is_set = False


def test_the_last_step_is_always_kept(tmp_path):
    """Folding, verifying and examining can be done again without learning again."""
    outlet = Outlet()
    hooks = _hooks(outlet, Stop(), tmp_path / "checkpoint", 1e9)
    saves = []
    for step in (1, 2, 3):
        hooks.on_progress(Progress(step, 3, 0.5, 4.0))
        saves.append(hooks.should_save())

    assert saves == [False, False, True]
    assert [said["step"] for said in outlet.said] == [1, 2, 3]

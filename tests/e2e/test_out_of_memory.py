"""A real worker that gets no more memory: told in a sentence, and learnt once there is enough.

The kernel kills it in a memory control group of its own, or refuses it memory beyond RLIMIT_AS; the daemon
runs in this process and is none the worse for it.
"""

import errno
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from daemon.config_sources import load_config
from daemon.lifecycle import Launch
from daemon.progress import LineView
from daemon.service import Service
from daemon.standby import Standby
from daemon.supervisor import default_command
from daemon.worker import NO_MEMORY, is_refused_memory
from tests.daemon.running.conftest import Bench
from tests.e2e.conftest import ROOT

CGROUPS = Path("/sys/fs/cgroup")
# Run in place of the worker's own start: everything is imported, and then little more may be had.
LIMITED = """
import resource, sys
import daemon.adaptation, onnx
from daemon import worker
import torch
torch.ones(256, 256) @ torch.ones(256, 256)
size = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize:"))
resource.setrlimit(resource.RLIMIT_AS, (size + (int(sys.argv[1]) << 20),) * 2)
try:
    worker.main(sys.argv[2:])
except SystemExit as ended:
    worker._end(ended.code)
"""


class MemoryGroup:
    """A memory control group, of either generation."""

    def __init__(self) -> None:
        places = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
        self.is_old = "memory" in places
        base = CGROUPS / "memory" if self.is_old else CGROUPS
        self.path = base / places["memory" if self.is_old else ""].lstrip("/") / "dynlora-test"
        self.path.mkdir()

    def limit(self, megabytes: int) -> None:
        """Set how much it may have."""
        name = "memory.limit_in_bytes" if self.is_old else "memory.max"
        (self.path / name).write_text(str(megabytes << 20))

    @property
    def kills(self) -> int:
        """How often the kernel killed in it for lack of memory."""
        said = (self.path / ("memory.oom_control" if self.is_old else "memory.events")).read_text()
        return int(dict(line.split() for line in said.splitlines())["oom_kill"])

    def enter(self, command: list[str]) -> list[str]:
        """A command line that runs another one in the group."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.path), *command]


@pytest.fixture
def memory_group():
    """One of our own, or a skip where none can be made."""
    try:
        group = MemoryGroup()
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    yield group
    group.path.rmdir()


@pytest.fixture
def serve(e2e_home):
    """A function that starts the daemon of a home whose workers run as it says; stopped at the end."""
    benches = []

    def start(make_command) -> Bench:
        e2e_home.configure(steps=4)
        path = e2e_home.path / "config.toml"
        bench = Bench(e2e_home.path, load_config(path, e2e_home.path))
        launch = Launch(config_path=path, make_command=make_command)
        bench.service = Service(e2e_home.path, bench.config, view=LineView(), launch=launch)
        bench.service.start()
        benches.append(bench)
        return bench

    yield start
    for bench in benches:
        bench.service.stop(lambda: True)


def outcomes(bench, batch):
    """How its attempts ended so far."""
    return [attempt.outcome for attempt in bench.spool.load(batch).attempts if attempt.outcome]


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_worker_that_the_kernel_kills_for_lack_of_memory_is_one_failed_attempt(
    e2e_home, memory_group, serve
):
    """With enough memory the next attempt publishes; no other process was touched."""
    memory_group.limit(120)
    bench = serve(lambda *arguments: memory_group.enter(default_command(*arguments)))
    e2e_home.submit("shoes")
    bench.tick_until(lambda: bench.events().count("attempt_failed"), seconds=300)

    assert memory_group.kills >= 1
    memory_group.limit(4000)
    [batch] = bench.spool.ids("queued")
    assert outcomes(bench, batch)[0].startswith(
        "failed: the worker was killed by SIGKILL (often: out of memory)"
    )
    assert bench.store.current() == 0
    bench.tick_until(lambda: bench.store.current() == 1, seconds=300)
    assert outcomes(bench, batch)[1:] == ["published as version 1"]
    assert bench.state() == {"done": [batch]}


def test_torch_and_numpy_being_refused_memory_are_recognised():
    """Each has an error of its own for it; another error of the same kind is none."""
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 55, dtype=torch.uint8)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(1 << 55, np.uint8)

    assert is_refused_memory(of_torch.value)
    assert is_refused_memory(of_numpy.value)
    assert is_refused_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_refused_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert f"| {NO_MEMORY} |" in (ROOT / "docs" / "operations.md").read_text()


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("megabytes", [1, 60])
def test_a_worker_that_is_refused_memory_says_so(e2e_home, serve, megabytes):
    """One sentence, and what to do. Later, while it learns, native code may crash instead (docs/log.md)."""

    def limited(*arguments: str) -> list[str]:
        command = default_command(*arguments)
        begin = command.index("--parent-pid")
        return [sys.executable, "-c", LIMITED, str(megabytes), *command[begin:]]

    bench = serve(limited)
    e2e_home.submit("shoes")
    bench.tick_until(lambda: bench.events().count("attempt_failed"), seconds=300)
    [batch] = bench.spool.ids("queued")

    assert outcomes(bench, batch)[0] == f"failed: {NO_MEMORY}"
    bench.service._lifecycle.standby = Standby(default_command, e2e_home.path)
    bench.tick_until(lambda: bench.store.current() == 1, seconds=300)
    assert bench.state() == {"done": [batch]}

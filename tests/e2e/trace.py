"""Programs run under strace: which system calls changed a home, and which of them deploy.disk did not make.

Every function of deploy.disk is wrapped, in each Python that the program starts, so that it asks for a file
that does not exist right before and right after: `/door/in` and `/door/out`. In the trace of one thread, a
call between the two was made by deploy.disk; any other went around it.
"""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Picked up by every Python on whose PYTHONPATH it lies.
WRAPPER = """
import os
from deploy import disk

def marked(function):
    def call(*args, **kwargs):
        os.access("/door/in", os.F_OK)
        try:
            return function(*args, **kwargs)
        finally:
            os.access("/door/out", os.F_OK)
    return call

for name in ("open_file", "write", "write_once", "reserve", "truncate", "fsync", "begin_flush", "rename",
             "symlink", "unlink", "mkdir", "make_dirs", "remove_tree"):
    setattr(disk, name, marked(getattr(disk, name)))
"""
_OPENS = {"open", "openat", "openat2", "creat"}
_ON_PATHS = {
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "unlink", "unlinkat"),
    *("rmdir", "mkdir", "mkdirat", "mknod", "mknodat", "truncate"),
}
_ON_DESCRIPTORS = {
    *("ftruncate", "fallocate", "fsync", "fdatasync", "sync_file_range", "write", "writev", "pwrite64"),
    *("pwritev", "pwritev2", "sendfile", "copy_file_range"),
}
_MARKS = {"access", "faccessat", "faccessat2"}
_CALL = re.compile(r"(\w+)\((.*)")
_PATH = re.compile(r'(?:AT_FDCWD<([^>]*)>|\d+<([^>]*)>|AT_FDCWD)?(?:, )?"((?:[^"\\]|\\.)*)"')
_DESCRIPTOR = re.compile(r"\d+<([^>]*)>")


@dataclass
class Trace:
    """What programs did to the files below a directory.

    Attributes:
        within: system call → how often deploy.disk made it there.
        around: the calls there that it did not make, as strace shows them.
    """

    below: Path
    within: Counter[str] = field(default_factory=Counter)
    around: list[str] = field(default_factory=list)

    def read(self, thread: Path) -> None:
        """Take in the trace of one thread."""
        depth = 0
        for line in thread.read_text(errors="replace").splitlines():
            found = _CALL.match(line)
            if found is None:
                continue  # a signal, or the end
            call, rest = found.groups()
            if call in _MARKS:
                depth += ("/door/in" in rest) - ("/door/out" in rest)
            elif any(Path(path).is_relative_to(self.below) for path in _changed(call, rest)):
                if depth:
                    self.within[call] += 1
                else:
                    self.around.append(line)


def _changed(call: str, rest: str) -> Iterator[str]:
    """The paths that a system call changes."""
    if call in _ON_DESCRIPTORS and (found := _DESCRIPTOR.search(rest)):
        yield found[1]
    is_open = call in _OPENS and ("O_WRONLY" in rest or "O_RDWR" in rest or "O_CREAT" in rest)
    if call in _ON_PATHS or is_open or call == "creat":
        for cwd, directory, path in _PATH.findall(rest):
            yield str(Path(cwd or directory or "/", path))


def strace(
    command: Sequence[str],
    room: Path,
    below: Path,
    *,
    code: int = 0,
    meanwhile: Callable[[], None] = lambda: None,
    **options: Any,
) -> Trace:
    """Run a program and all that it starts; what they changed below a directory.

    Args:
        room: a new folder for the trace and the wrapper.
        code: what it must exit with.
        meanwhile: done while it runs.
        options: of subprocess.Popen; `env` has a PYTHONPATH.
    """
    room.mkdir()
    (room / "sitecustomize.py").write_text(WRAPPER)
    calls = [f"?{name}" for name in sorted(_OPENS | _ON_PATHS | _ON_DESCRIPTORS | _MARKS)]
    program = shutil.which("strace")
    assert program is not None
    options["env"] = options["env"] | {"PYTHONPATH": f"{room}:{options['env']['PYTHONPATH']}"}
    arguments = ["-ff", "-qq", "-y", "-s", "0", "--seccomp-bpf", "-e", f"trace={','.join(calls)}"]
    arguments += ["-o", str(room / "thread"), *command]
    with subprocess.Popen([program, *arguments], **options) as process:
        meanwhile()
        found = process.wait(timeout=300)
    assert found == code, f"{command} exited with {found}, not {code}"
    trace = Trace(below)
    for thread in room.glob("thread.*"):
        trace.read(thread)
    return trace

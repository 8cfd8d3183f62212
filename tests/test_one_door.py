"""What changes the disk is called in deploy/disk.py alone, proven over every call in `deploy` and `daemon`.

That nothing slips through what can be seen in the source is shown by tests/e2e/test_one_door.py, over the
system calls of a life.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
DOOR = "deploy/disk.py"
# Outside of every home.
EXCEPTIONS = {
    ("daemon/analysing.py", "out.mkdir"): "the folder that an analysis is asked to write to",
    ("daemon/cli.py", "os.open"): "/dev/null",
    ("daemon/systemd.py", "path.parent.mkdir"): "systemd's folders",
    ("daemon/systemd.py", "path.unlink"): "systemd's folders",
    ("deploy/server/banner.py", "Path.unlink"): "a socket",
    ("deploy/server/launch.py", "own_path.unlink"): "a socket",
    ("daemon/unit_archive.py", "directory.mkdir"): "the folder that make dist writes to",
}
OF_PATHS = {
    *(
        "rename",
        "unlink",
        "rmdir",
        "mkdir",
        "symlink_to",
        "hardlink_to",
        "touch",
        "write_text",
        "write_bytes",
    ),
}
OF_OS = {
    *(
        "fsync",
        "fdatasync",
        "truncate",
        "ftruncate",
        "posix_fallocate",
        "rename",
        "renames",
        "replace",
        "link",
    ),
    *(
        "symlink",
        "unlink",
        "remove",
        "removedirs",
        "rmdir",
        "mkdir",
        "makedirs",
        "mkfifo",
        "mknod",
        "sendfile",
    ),
    *("copy_file_range", "write", "writev", "pwrite", "pwritev"),
}
OF_SHUTIL = {"rmtree", "move", "copy", "copy2", "copyfile", "copytree", "copyfileobj", "unpack_archive"}


def name_of(node: ast.expr) -> str:
    """Return `a.b.c` as it stands there; for a call in it, what is called."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    if isinstance(node, ast.Call):
        return name_of(node.func)
    return node.id if isinstance(node, ast.Name) else "…"


def changes_the_disk(call: ast.Call) -> bool:
    """Tell whether a call changes the disk, as far as its name and its arguments say."""
    owner, _, name = name_of(call.func).rpartition(".")
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    if owner in ("disk", "atomic"):
        return False
    if owner == "os":
        flags = {
            node.attr for part in arguments for node in ast.walk(part) if isinstance(node, ast.Attribute)
        }
        return name in OF_OS or (name == "open" and bool(flags & {"O_WRONLY", "O_RDWR", "O_CREAT"}))
    if owner == "shutil":
        return name in OF_SHUTIL
    if name == "open":
        modes = [node.value for node in arguments if isinstance(node, ast.Constant)]
        return any(isinstance(mode, str) and len(mode) < 4 and set(mode) & set("wax+") for mode in modes)
    is_path = name in OF_PATHS or (name == "replace" and len(call.args) == 1 and not call.keywords)
    return bool(owner) and is_path


def calls(source: str) -> Iterator[str]:
    """Yield the names of what changes the disk in a source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and changes_the_disk(node):
            yield name_of(node.func)


@pytest.mark.parametrize(
    "source",
    [
        "path.rename(other)", "(a / 'b').unlink(missing_ok=True)", "path.replace(other)", "os.fsync(3)",
        "os.open(path, os.O_RDWR)", "os.open(path, flags=os.O_CREAT | 1)", "path.open('r+b')", "open(p, 'w')",
        "open(p, mode='a')", "shutil.copyfile(a, b)", "Path(p).write_text('x')", "x.parent.mkdir()",
    ],
)  # fmt: skip
def test_a_change_is_recognised(source: str) -> None:
    """Of every kind."""
    assert len(list(calls(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "text.replace('a', 'b')", "moment.replace(hour=0)", "path.open('rb')", "open(p)", "disk.unlink(path)",
        "os.open(path, os.O_RDONLY | os.O_CLOEXEC)", "atomic.rename(a, b)", "shutil.disk_usage(p)",
    ],
)  # fmt: skip
def test_what_changes_nothing_is_no_change(source: str) -> None:
    """Reading, text, and the door itself."""
    assert list(calls(source)) == []


def test_only_the_door_changes_the_disk() -> None:
    """And what it need not be used for is listed here with a reason, and still there."""
    found = {
        (path.relative_to(PROJECT).as_posix(), name)
        for package in ("deploy", "daemon")
        for path in sorted((PROJECT / package).rglob("*.py"))
        for name in calls(path.read_text(encoding="utf-8"))
    }

    assert {entry for entry in found if entry[0] != DOOR} == set(EXCEPTIONS)

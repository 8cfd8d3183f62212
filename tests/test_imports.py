"""The rooms stay apart: who may import whom, proven over every import statement in the packages."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
PACKAGES = ("daemon", "deploy", "dynlora")
LEARNING = {"torch", "torchvision", "open_clip", "timm"}
EXPORTING = {"onnx", "onnx_ir", "onnxscript"}
WORKER = "daemon.worker"  # the child process


def modules() -> dict[str, Path]:
    """Return every module of the project's packages and its file."""
    found = {}
    for package in PACKAGES:
        for path in sorted((PROJECT / package).rglob("*.py")):
            name = ".".join(path.relative_to(PROJECT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, *, only_at_import: bool = False) -> Iterator[str]:
    """Yield the full names a file imports, in functions too unless told otherwise, and names within them."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import, which this test does not follow"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "importlib.import_module",
        ):
            argument = node.args[0]
            assert isinstance(argument, ast.Constant), f"{path} imports a name computed at run time"
            yield str(argument.value)
        if not (only_at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            todo.extend(ast.iter_child_nodes(node))


def roots(path: Path, *, only_at_import: bool = False) -> set[str]:
    """Return the first parts of what a file imports."""
    return {name.split(".")[0] for name in imports(path, only_at_import=only_at_import)}


def reached_from(start: str) -> set[str]:
    """Return the project's modules that a module leads to, itself included, over imports in functions too."""
    known, reached, todo = modules(), set(), [start]
    while todo:
        name = todo.pop()
        if name in known and name not in reached:
            reached.add(name)
            todo.extend(imports(known[name]))
    return reached


def imported_by(statement: str) -> set[str]:
    """Return what is loaded after a statement in a fresh interpreter."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_walk_sees_imports_of_every_form(tmp_path: Path) -> None:
    """Plain, from, as, inside functions and classes, and by name at run time."""
    path = tmp_path / "example.py"
    path.write_text(
        "import a.b as x\nfrom c import d\nclass K:\n    def f(self):\n        import e\n"
        "if x:\n    import g\nimportlib.import_module('h.i')\n"
    )

    assert set(imports(path)) == {"a.b", "c", "c.d", "e", "g", "h.i"}
    assert roots(path, only_at_import=True) == {"a", "c", "g", "h"}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("dynlora", {"deploy", "daemon"}),
        ("deploy", {"dynlora", "daemon"}),
        ("daemon", set()),
    ],
)
def test_rooms_do_not_import_each_other(package: str, forbidden: set[str]) -> None:
    """Dynlora and deploy know neither each other nor the daemon; nothing imports tests or examples."""
    forbidden = forbidden | {"tests", "benchmarks", "examples", "conftest"}
    wrong = {
        name: roots(path) & forbidden
        for name, path in modules().items()
        if name.split(".")[0] == package and roots(path) & forbidden
    }

    assert wrong == {}


def test_deploy_imports_torch_only_to_export() -> None:
    """What serves needs no torch; onnx and its builders are for exporting and for checking structure."""
    with_torch, at_import = set(), set()
    for name, path in modules().items():
        if name.startswith("deploy"):
            with_torch |= {name} if roots(path) & LEARNING else set()
            at_import |= {name} if roots(path, only_at_import=True) & EXPORTING else set()

    assert with_torch == {"deploy.export"}
    assert at_import <= {"deploy.export", "deploy.rewriting"}


def test_nothing_in_deploy_leads_to_the_exporter() -> None:
    """No other module of deploy imports deploy.export or what it needs, not even within a function."""
    exporter = {"deploy.export", "deploy.rewriting"}
    leading = {name for name in modules() if name.startswith("deploy") and exporter & reached_from(name)}

    assert leading == exporter


def test_onnx_runtime_is_loaded_by_one_module_that_turns_its_telemetry_off_first() -> None:
    """Everything else has it from there: programs to measure, examples and tests, too."""
    own = PROJECT / "deploy/ort.py"
    folders = (*PACKAGES, "benchmarks", "examples", "tests")
    paths = {path for folder in folders for path in (PROJECT / folder).rglob("*.py")}
    source = own.read_text(encoding="utf-8")

    assert {path for path in paths if "onnxruntime" in roots(path)} == {own}
    assert source.index("os.environ.setdefault") < source.index("import onnxruntime")


def test_only_one_file_of_the_learner_imports_open_clip() -> None:
    """open_clip's ways are known in dynlora.clip alone."""
    assert {name for name, path in modules().items() if "open_clip" in roots(path)} == {"dynlora.clip"}


@pytest.mark.parametrize("entry", ["daemon.cli", "daemon.service"])
def test_the_daemon_never_leads_to_the_learner(entry: str) -> None:
    """Following every import of the parent process reaches no torch, no dynlora, and no exporter."""
    reached = reached_from(entry)
    foreign = LEARNING | EXPORTING | {"dynlora"}
    known = modules()
    # deploy.verify looks into graphs with onnx, within a function and where it is installed.
    wrong = {name for name in reached if name != "deploy.verify" and roots(known[name]) & foreign}

    assert len(reached) > 10
    assert wrong == set()
    assert not {WORKER, "deploy.export"} & reached


def test_what_learns_belongs_to_the_worker() -> None:
    """Every daemon module that imports torch, dynlora or the exporter is one that the worker leads to."""
    of_worker = reached_from(WORKER)
    learning = {
        name
        for name, path in modules().items()
        if name.startswith("daemon")
        and (roots(path) & (LEARNING | {"dynlora"}) or "deploy.export" in set(imports(path)))
    }

    assert learning <= of_worker
    assert learning != set()


@pytest.mark.parametrize("name", ["deploy", "daemon"])
def test_package_files_stay_empty(name: str) -> None:
    """Importing deploy.client runs deploy/__init__.py, so there is nothing in it but words."""
    tree = ast.parse((PROJECT / name / "__init__.py").read_text(encoding="utf-8"))

    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in tree.body)
    if name == "deploy":
        assert (PROJECT / "deploy/__init__.py").read_bytes() == b""


@pytest.mark.parametrize("statement", ["import deploy.client", "import daemon.cli", "import daemon.service"])
def test_light_processes_load_no_torch(statement: str) -> None:
    """In a fresh interpreter neither torch, open_clip nor onnx is loaded."""
    loaded = imported_by(statement)

    assert not {"torch", "torchvision", "open_clip", "onnx", "dynlora"} & loaded
    assert "deploy.errors" in loaded


def test_daemon_is_this_projects() -> None:
    """`daemon` is also the import name of the python-daemon distribution; ours must win."""
    script = (
        "from importlib.util import find_spec\n"  # what an import would run, without running it
        f"print(*(find_spec(name).origin for name in {PACKAGES}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=os.sep, capture_output=True, text=True, check=True
    )

    assert [Path(found).parent for found in done.stdout.split()] == [PROJECT / name for name in PACKAGES]


def test_no_module_hides_one_of_the_standard_library() -> None:
    """A file run as a script puts its folder first on the path: queue.py would hide the standard one."""
    hiding = {
        name for name in modules() if name.split(".")[-1] in {"queue", "types", "logging", "signal", "select"}
    }

    assert hiding == set()

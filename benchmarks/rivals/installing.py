"""The rivals' own virtual environments, made once in the user's cache; nothing of theirs comes into ours."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

_PACKAGES = {"mlserver": ["mlserver==1.7.1"], "litserve": ["litserve==0.2.19"]}
_DONE_NAME = "installed"


def _ours() -> list[str]:
    """What opening a version needs, in the releases that are here."""
    from importlib.metadata import version

    names = ("numpy", "onnxruntime", "pillow", "safetensors", "tokenizers", "pydantic", "ftfy", "regex")
    return [f"{name}=={version(name)}" for name in names]


def python_of(rival: str) -> Path:
    """Return the interpreter of an environment with this rival, made if need be."""
    wanted = [*_PACKAGES[rival], *_ours()]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{rival}-{hashlib.sha256(' '.join([sys.version, *wanted]).encode()).hexdigest()[:12]}"
    directory = cache / "dynlora" / "rivals" / name
    python = directory / "bin" / "python"
    if not (directory / _DONE_NAME).exists():
        print(f"installing {rival} into {directory}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, *wanted], check=True)
        (directory / _DONE_NAME).touch()
    return python


def release_of(rival: str) -> str:
    """The rival's release, as in `mlserver 1.7.1`."""
    return _PACKAGES[rival][0].replace("==", " ")

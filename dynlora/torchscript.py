"""OpenAI's own CLIP files are TorchScript archives; their weights are read without running what is in them.

Such a file is a zip of code, a pickle that says which tensor belongs where, and the tensors' bytes. The code
is not looked at. The pickle may name module classes, which become empty ones, and the one function that
makes tensors, for which ours stands in; whatever else it names is refused. So is an archive that unpacks to
much more than its size: weights hardly shrink.
"""

import io
import pickle
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dynlora.errors import ModelError

# What OpenAI's modules hold besides weights; all follow from the architecture.
_NOT_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}

_MOST_UNPACKED = 4  # times the archive's size


@dataclass(frozen=True)
class Weights:
    """Where open_clip finds the weights: a tag, a file, or nothing. OpenAI's models compute QuickGELU."""

    path: str | None
    is_openais: bool


@contextmanager
def readable_by_open_clip(pretrained: str | None) -> Iterator[Weights]:
    """The same tag or file; of a TorchScript archive, a safetensors copy that lives as long as the context.

    Raises:
        ModelError: it is such an archive, and holds something else than a model's weights.
    """
    if not pretrained or not _is_torchscript(Path(pretrained)):
        yield Weights(pretrained, is_openais=False)
        return
    state = read_torchscript(Path(pretrained))
    with tempfile.TemporaryDirectory(prefix="dynlora-") as directory:
        path = Path(directory) / "weights.safetensors"
        save_file(state, path)
        del state
        yield Weights(str(path), is_openais=True)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters of a TorchScript archive by their names, in the precision they are stored in.

    Raises:
        ModelError: it is damaged, a bomb, or names something else than modules and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root, size = _root(archive), path.stat().st_size
            model = _Unpickler(archive, root, _Allowance(size)).load()
            names = _Allowance(size)  # of their own: every tensor is copied out of its storage
            named = {}
            for name, tensor in _tensors(model, ""):
                names.take(tensor.numel() * tensor.element_size())
                named[name] = tensor
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise ModelError(
            f"{path} is a TorchScript archive whose weights cannot be read: {error}. "
            "Convert it to safetensors"
        ) from error
    return {name: tensor.clone() for name, tensor in named.items() if name.split(".")[-1] not in _NOT_WEIGHTS}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):  # also where there is no such file: a tag
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _root(archive: zipfile.ZipFile) -> str:
    (name,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
    return name.removesuffix("/data.pkl")


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")


class _Allowance:
    """How many bytes an archive of `size` bytes may still unpack to."""

    def __init__(self, size: int) -> None:
        self._limit = self._left = _MOST_UNPACKED * size

    def take(self, count: int) -> None:
        """Raises ValueError when there is too little left for so many bytes."""
        self._left -= count
        if self._left < 0:
            raise ValueError(
                f"it unpacks to more than {self._limit:,} bytes, {_MOST_UNPACKED} times its size"
            )


class _Module:
    """A module of the archive: its attributes, and none of its code."""


class _Unpickler(pickle.Unpickler):
    """Knows modules and tensors. Every name in the file goes through `find_class`, which has no others."""

    def __init__(self, archive: zipfile.ZipFile, root: str, allowance: _Allowance) -> None:
        self.archive, self.root, self.allowance = archive, root, allowance
        self.storages: dict[str, Tensor] = {}
        super().__init__(io.BytesIO(self._read("data.pkl")))

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for.

        Raises:
            UnpicklingError: it is neither a module, nor a tensor, nor a list of numbers.
        """
        if module.startswith("__torch__"):
            return type("_Of", (_Module,), {})  # one each: the file may set attributes of it
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _strided
        if (module, name) == ("collections", "OrderedDict"):
            return dict  # a tensor's hooks: none
        if module == "torch" and name in _DTYPES:
            return name
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a model's weights")

    def persistent_load(self, pid: Any) -> Tensor:
        """The bytes of one storage as a flat tensor."""
        kind, dtype, key, _location, _count = pid
        if kind != "storage" or dtype not in _DTYPES:
            raise pickle.UnpicklingError(f"it refers to {kind!r} of {dtype!r}; expected a known storage")
        if key not in self.storages:
            content = bytearray(self._read(f"data/{int(key)}"))
            self.storages[key] = torch.frombuffer(content, dtype=_DTYPES[dtype])
        return self.storages[key]

    def _read(self, name: str) -> bytes:
        """One member; no more bytes come out of it than its entry in the archive says."""
        member = self.archive.getinfo(f"{self.root}/{name}")
        self.allowance.take(member.file_size)
        return self.archive.read(member)


def _strided(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_rest: Any
) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)  # checks that it stays inside

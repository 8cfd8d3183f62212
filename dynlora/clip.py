"""The only file that imports open_clip: bundled model, hub tag, local checkpoint, or a published version."""

import copy
import difflib
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU
from torch import nn
from torch.overrides import TorchFunctionMode

from dynlora.attach import check_supported
from dynlora.errors import ModelError

BUNDLED_DIR = Path(__file__).parent / "bundled"
BUNDLED_CONFIG = BUNDLED_DIR / "small-clip-64.json"
BUNDLED_WEIGHTS = BUNDLED_DIR / "open_clip_model.safetensors"


@dataclass(frozen=True)
class Clip:
    """A CLIP in float32 on the CPU, in eval mode, with all that is needed to feed and rebuild it."""

    model: nn.Module
    architecture: str
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    tokenizer: Any = field(repr=False)  # open_clip's; called with a list of strings → (N, context) int64

    @property
    def context_length(self) -> int:
        """Tokens per prompt."""
        return int(self.model.context_length)  # type: ignore[arg-type]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.preprocess_cfg["size"]
        return (size, size) if isinstance(size, int) else tuple(size)


def load_clip(architecture: str = "bundled", pretrained: str | None = None) -> Clip:
    """Load a CLIP to start from.

    Args:
        architecture: `bundled`, an open_clip name such as `ViT-B-16`, `hf-hub:org/repo` or `local-dir:PATH`.
        pretrained: an open_clip tag such as `openai`, or a local checkpoint file. Bundled needs none.

    Raises:
        ModelError: unknown name, missing or broken weights, or an architecture that cannot be adapted.
    """
    if architecture == "bundled":
        open_clip.add_model_config(BUNDLED_CONFIG)
        architecture, pretrained = BUNDLED_CONFIG.stem, pretrained or str(BUNDLED_WEIGHTS)
    _refuse_by_config(architecture)
    has_weights = architecture.startswith(("hf-hub:", "local-dir:"))
    if not pretrained and not has_weights:
        raise ModelError(
            f"{architecture} was named without weights; "
            "expected --pretrained with an open_clip tag or a local file"
        )
    try:
        model = open_clip.create_model(
            architecture, pretrained=pretrained, precision="fp32", weights_only=True
        )
        tokenizer = open_clip.get_tokenizer(architecture)
    except MemoryError:
        raise
    except Exception as error:  # open_clip and the hub raise whatever they like
        raise ModelError(f"cannot load {architecture} with weights {pretrained!r}: {error}") from error
    model_cfg = _model_config(architecture, model)
    return _checked(Clip(model, architecture, model_cfg, _preprocess_config(model), tokenizer))


def load_version(config_path: Path, weights_path: Path, architecture: str) -> Clip:
    """Load a published version: `config_path` is its open_clip_config.json, `weights_path` its safetensors.

    Raises:
        ModelError: the files do not fit together, are missing, or are damaged.
        OSError, MemoryError: the machine failed; says nothing about the files.
    """
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        with _WithoutRandomWeights():  # they would be replaced at once, and take seconds for a ViT-B/16
            model = open_clip.CLIP(**config["model_cfg"])
        incompatible = open_clip.load_checkpoint(model, str(weights_path), strict=True)
    except Exception as error:
        if isinstance(error, MemoryError | OSError) and not isinstance(error, FileNotFoundError):
            raise  # the machine's fault, not the files'
        raise ModelError(f"cannot load {weights_path} as described by {config_path}: {error}") from error
    assert not incompatible or not any(incompatible), incompatible
    open_clip.set_model_preprocess_cfg(model, config["preprocess_cfg"])
    tokenizer = plain_tokenizer(config["model_cfg"]["text_cfg"].get("context_length", 77))
    return _checked(Clip(model, architecture, config["model_cfg"], config["preprocess_cfg"], tokenizer))


def reload_weights(clip: Clip, weights_path: Path) -> None:
    """Load other weights of the same architecture into a model that is in memory.

    Raises:
        ModelError: the file is damaged, or is of another model.
        OSError, MemoryError: the machine failed; says nothing about the file.
    """
    try:
        incompatible = open_clip.load_checkpoint(clip.model, str(weights_path), strict=True)
    except Exception as error:
        if isinstance(error, MemoryError | OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise ModelError(f"cannot load {weights_path} into {clip.architecture}: {error}") from error
    assert not incompatible or not any(incompatible), incompatible


def plain_tokenizer(context_length: int) -> Any:
    """CLIP's own tokenizer; all of them share one vocabulary."""
    tokenizer = copy.copy(vocabulary())
    tokenizer.context_length = context_length
    return tokenizer


@functools.cache
def vocabulary() -> Any:
    """CLIP's own tokenizer of any context length, made once: it takes a fifth of a second."""
    return open_clip.SimpleTokenizer()


class _WithoutRandomWeights(TorchFunctionMode):
    """Leaves new parameters as they lie in memory, for a model whose weights are all loaded next."""

    # The last one is what timm makes normal numbers of uniform ones with.
    _FILLS = frozenset(
        {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "erfinv_"}
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let every function run but those that fill with random numbers."""
        del types
        if getattr(func, "__name__", "") in self._FILLS and (args or kwargs):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _refuse_by_config(architecture: str) -> None:
    """Refuse by name, before anything is downloaded, what the config alone shows cannot be adapted."""
    if architecture.startswith(("hf-hub:", "local-dir:")):
        return  # known when it is built
    config = open_clip.get_model_config(architecture)
    if config is None:
        near = difflib.get_close_matches(architecture, open_clip.list_models(), n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; open_clip.list_models() names them all"
        raise ModelError(f"open_clip knows no architecture {architecture!r}{hint}")
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    obstacles = {
        "a ResNet vision tower": isinstance(vision.get("layers"), list | tuple),
        f"a Hugging Face text tower ({text.get('hf_model_name')})": "hf_model_name" in text,
        "a text tower of its own class (custom_text)": config.get("custom_text", False),
    }
    found = [name for name, is_there in obstacles.items() if is_there]
    if found:
        raise ModelError(
            f"{architecture} has {' and '.join(found)}, which cannot be adapted yet; "
            "expected open_clip's native CLIP such as ViT-B-32, ViT-B-16 or ViT-L-14"
        )
    if "timm_model_name" in vision:
        _refuse_by_blocks(config)


def _refuse_by_blocks(config: dict[str, Any]) -> None:
    """Look at a timm tower's blocks without making any weights."""
    vision = config["vision_cfg"] | {"timm_model_pretrained": False}
    with torch.device("meta"):
        check_supported(open_clip.CLIP(**config | {"vision_cfg": vision}))


def _checked(clip: Clip) -> Clip:
    if type(clip.model) is not open_clip.CLIP:
        raise ModelError(
            f"{clip.architecture} builds a {type(clip.model).__name__}; "
            "only open_clip's native CLIP can be adapted yet"
        )
    if not isinstance(clip.tokenizer, open_clip.SimpleTokenizer):
        raise ModelError(
            f"{clip.architecture} uses {type(clip.tokenizer).__name__}; expected CLIP's own BPE tokenizer"
        )
    check_supported(clip.model)
    clip.model.eval().requires_grad_(False)
    return clip


def _model_config(architecture: str, model: nn.Module) -> dict[str, Any]:
    """What rebuilds `model` by `open_clip.CLIP(**config)`, weights apart."""
    if architecture.startswith("local-dir:"):
        path = Path(architecture.removeprefix("local-dir:")) / "open_clip_config.json"
        config = dict(json.loads(path.read_text(encoding="utf-8"))["model_cfg"])
    else:
        config = dict(open_clip.get_model_config(architecture) or {})
    if not config:
        raise ModelError(f"{architecture} has no open_clip config that could be kept beside its weights")
    config.pop("custom_text", None)
    # A tag such as `openai` can switch the activation behind the config's back.
    if any(isinstance(module, QuickGELU) for module in model.modules()):
        config["quick_gelu"] = True
    return config


def _preprocess_config(model: nn.Module) -> dict[str, Any]:
    return dict(open_clip.get_model_preprocess_cfg(model))


def state_arrays(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict in float32, contiguous, detached: what a version's weights file holds."""
    return {key: value.detach().float().contiguous() for key, value in model.state_dict().items()}

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
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transformer import QuickGELU
from torch import nn
from torch.overrides import TorchFunctionMode

from dynlora import torchscript
from dynlora.attach import check_supported
from dynlora.errors import ModelError
from dynlora.obstacles import obstacles
from dynlora.tokenizer import TOKENIZER_NAME, FileTokenizer, read_published, read_tokenizer

BUNDLED_DIR = Path(__file__).parent / "bundled"
BUNDLED_CONFIG = BUNDLED_DIR / "small-clip-64.json"
BUNDLED_WEIGHTS = BUNDLED_DIR / "open_clip_model.safetensors"
BUNDLED_MOMENTS = BUNDLED_DIR / "image_moments.safetensors"  # see dynlora/moments.py
_SCHEMES = ("hf-hub:", "local-dir:")


@dataclass(frozen=True)
class Clip:
    """A CLIP in float32 on the CPU, in eval mode, with all that is needed to feed and rebuild it."""

    model: nn.Module
    architecture: str
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    # CLIP's own or a FileTokenizer; called with a list of strings → (N, context) int64
    tokenizer: Any = field(repr=False)

    @property
    def context_length(self) -> int:
        """Tokens per prompt."""
        return int(self.model.context_length)  # type: ignore[arg-type]

    @property
    def logit_bias(self) -> float | None:
        """What a model of pairwise sigmoids, such as SigLIP, adds to its logits."""
        bias = self.model.logit_bias
        return None if bias is None else float(bias)  # type: ignore[arg-type]

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
    config = _refuse_by_config(architecture)
    has_weights = architecture.startswith(_SCHEMES)
    if not pretrained and not has_weights:
        raise ModelError(
            f"{architecture} was named without weights; "
            "expected --pretrained with an open_clip tag or a local file"
        )
    tokenizer = _tokenizer(architecture, config["text_cfg"])
    try:
        with torchscript.readable_by_open_clip(pretrained) as weights:
            model = open_clip.create_model(
                architecture,
                pretrained=weights.path,
                precision="fp32",
                weights_only=True,
                force_quick_gelu=_needs_quick_gelu(architecture, pretrained) or weights.is_openais,
            )
    except (MemoryError, ModelError):
        raise
    except Exception as error:  # open_clip and the hub raise whatever they like
        raise ModelError(f"cannot load {architecture} with weights {pretrained!r}: {error}") from error
    model_cfg = _model_config(config, model)
    return _checked(Clip(model, architecture, model_cfg, _preprocess_config(model), tokenizer))


def build_model(model_cfg: dict[str, Any]) -> nn.Module:
    """The plain model of a config as `open_clip_config.json` has it; nothing is downloaded."""
    config = copy.deepcopy(model_cfg)
    build = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    model: nn.Module = build(**config)
    return model


def load_version(config_path: Path, weights_path: Path, architecture: str) -> Clip:
    """Load a published version: `config_path` is its open_clip_config.json, `weights_path` its safetensors.

    Raises:
        ModelError: the files do not fit together, are missing, or are damaged.
        OSError, MemoryError: the machine failed; says nothing about the files.
    """
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        with _WithoutRandomWeights():  # they would be replaced at once, and take seconds for a ViT-B/16
            model = build_model(config["model_cfg"])
        incompatible = open_clip.load_checkpoint(model, str(weights_path), strict=True)
        text_cfg = config["model_cfg"]["text_cfg"]
        if "hf_tokenizer_name" in text_cfg:
            tokenizer: Any = read_published(config_path.with_name(TOKENIZER_NAME), text_cfg)
        else:
            tokenizer = plain_tokenizer(text_cfg.get("context_length", 77))
    except ModelError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError | OSError) and not isinstance(error, FileNotFoundError):
            raise  # the machine's fault, not the files'
        raise ModelError(f"cannot load {weights_path} as described by {config_path}: {error}") from error
    assert not incompatible or not any(incompatible), incompatible
    open_clip.set_model_preprocess_cfg(model, config["preprocess_cfg"])
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


def _refuse_by_config(architecture: str) -> dict[str, Any]:
    """Refuse by name, before any weights are downloaded, what cannot be adapted; returns the config."""
    try:
        config = open_clip.get_model_config(architecture)
    except Exception as error:  # no such folder or repository, or no network
        raise ModelError(f"cannot read the open_clip_config.json of {architecture}: {error}") from error
    if config is None:
        near = difflib.get_close_matches(architecture, open_clip.list_models(), n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; open_clip.list_models() names them all"
        raise ModelError(f"open_clip knows no architecture {architecture!r}{hint}")
    found = obstacles(config)
    if found:
        raise ModelError(
            f"{architecture} has {' and '.join(found)}, which cannot be adapted; "
            "docs/models.md lists what can, such as ViT-B-32, ViT-B-16 or ViT-B-16-SigLIP"
        )
    try:
        with torch.device("meta"):  # the blocks, without making any weights
            model = build_model(config)
    except Exception as error:
        raise ModelError(f"open_clip cannot build {architecture} from its config: {error}") from error
    check_supported(model)
    return dict(config)


def _needs_quick_gelu(architecture: str, pretrained: str | None) -> bool:
    """Whether a tag's weights were trained with QuickGELU; open_clip only warns where the config differs.

    Raises:
        ModelError: the architecture has QuickGELU and the weights were trained without.
    """
    tag = open_clip.get_pretrained_cfg(architecture, pretrained) if pretrained else None
    if not tag:
        return False
    wanted = bool(tag.get("quick_gelu", False))
    if not wanted and open_clip.get_model_config(architecture).get("quick_gelu", False):
        plain = architecture.removesuffix("-quickgelu")
        raise ModelError(
            f"the weights {pretrained!r} were trained with GELU, {architecture} computes QuickGELU; "
            f"name the model {plain}"
        )
    return wanted


def _tokenizer(architecture: str, text_cfg: dict[str, Any]) -> Any:
    """CLIP's own, or the one whose files lie in the local folder or on the hub.

    Raises:
        ModelError: there is no tokenizer.json, or it cannot be used.
    """
    source = text_cfg.get("hf_tokenizer_name")
    if not source:
        clean = (text_cfg.get("tokenizer_kwargs") or {}).get("clean", "lower")
        if clean != "lower":
            raise ModelError(f"{architecture} cleans text by {clean!r}; expected CLIP's own 'lower'")
        return plain_tokenizer(text_cfg.get("context_length", 77))
    local = Path(architecture.removeprefix("local-dir:")) if architecture.startswith("local-dir:") else None

    def fetch(name: str) -> Path:
        if local is None:
            return Path(download_pretrained_from_hf(source, filename=name))
        if not (local / name).is_file():
            raise FileNotFoundError(f"{local / name} is missing")
        return local / name

    try:
        return read_tokenizer(fetch, text_cfg)
    except ModelError:
        raise
    except Exception as error:  # the hub raises whatever it likes
        raise ModelError(
            f"{architecture} needs the tokenizer of {source}, of which tokenizer.json and "
            f"tokenizer_config.json are not at hand: {error}. Put both into a folder with "
            "open_clip_config.json and the weights, and name it local-dir:FOLDER"
        ) from error


def _checked(clip: Clip) -> Clip:
    if type(clip.model) not in {open_clip.CLIP, open_clip.CustomTextCLIP}:
        raise ModelError(
            f"{clip.architecture} builds a {type(clip.model).__name__}; "
            "only open_clip's CLIP and CustomTextCLIP can be adapted"
        )
    if not isinstance(clip.tokenizer, open_clip.SimpleTokenizer | FileTokenizer):
        raise ModelError(
            f"{clip.architecture} uses {type(clip.tokenizer).__name__}; expected CLIP's own BPE tokenizer "
            "or a tokenizer.json"
        )
    check_supported(clip.model)
    clip.model.eval().requires_grad_(False)
    return clip


def _model_config(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """What rebuilds `model` by `build_model`, weights apart."""
    config = copy.deepcopy(config)
    if not isinstance(model, open_clip.CustomTextCLIP):
        config.pop("custom_text", None)
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    # A tag such as `openai` can switch the activation behind the config's back.
    if any(isinstance(module, QuickGELU) for module in model.modules()):
        config["quick_gelu"] = True
    return config


def _preprocess_config(model: nn.Module) -> dict[str, Any]:
    return dict(open_clip.get_model_preprocess_cfg(model))


def state_arrays(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict in float32, contiguous, detached: what a version's weights file holds."""
    return {key: value.detach().float().contiguous() for key, value in model.state_dict().items()}

"""What an open_clip config alone shows cannot be adapted, and why: no model is made, nothing downloaded."""

from typing import Any

# What open_clip's wrapper of Hugging Face tokenizers can do beyond a tokenizer.json; only `clean` is simple.
_TOKENIZER_TRICKS = ("strip_sep_token", "language", "reduction_mask")


def obstacles(config: dict[str, Any]) -> list[str]:
    """Each reason why a model of this `model_cfg` cannot be adapted, as words that follow "has"."""
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    tricks = text.get("tokenizer_kwargs") or {}
    found = {
        "a ResNet vision tower": isinstance(vision.get("layers"), list | tuple),
        f"a Hugging Face text tower ({text.get('hf_model_name')})": "hf_model_name" in text,
        "a captioning decoder (CoCa)": "multimodal_cfg" in config,
        "a text tower with a class token of its own": bool(text.get("embed_cls")),
        "a tower that gives its tokens as well": bool(
            vision.get("output_tokens") or text.get("output_tokens")
        ),
        "patch dropout, which makes every training step another model": bool(vision.get("patch_dropout")),
        f"a tokenizer in mode {text.get('tokenizer_mode')!r}": bool(text.get("tokenizer_mode")),
    }
    found |= {f"a tokenizer with {name}": bool(tricks.get(name)) for name in _TOKENIZER_TRICKS}
    return [words for words, is_there in found.items() if is_there]

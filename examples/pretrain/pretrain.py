"""Train a small CLIP from scratch: words first, then what a teacher sees, then images.

    python examples/pretrain/pretrain.py words  --work WORK
    python examples/pretrain/pretrain.py views  --work WORK --data ZIP
    python examples/pretrain/pretrain.py images --work WORK --data ZIP --names JSON
    python examples/pretrain/pretrain.py score  --work WORK --packs FOLDER
    python examples/pretrain/pretrain.py quick  --work WORK --data FOLDER --split SPLIT

`words`, `views` and `--names` are optional for `images`; `quick` is `images` without them, for a minute.
`images` goes on from its last checkpoint, `words` keeps what the sentence encoder said.
The result is WORK/open_clip_model.safetensors (float16), for small-clip-64.json.
"""

import argparse
import contextlib
import io
import json
import os
import time
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
from images import ImageSet, load, normalize
from names import from_wordnet, offsets_in, plain
from safetensors.torch import load_file, save_file
from teacher import Views, imagenet_offsets, look
from torch import Tensor
from train import Recipe, Training
from wordnet import DEFAULT_PATH, WordNet
from words import distil, targets, vocabulary

from dynlora.clip import Clip
from dynlora.prompts import encode_text, tokenize

CONFIG = Path(__file__).with_name("small-clip-64.json")
PROBES = {
    "tiny_imagenet_200.zip": "trained on its train split",
    "cifar10.zip": "never seen",
    "pacs_photo.zip": "never seen",
    "caltech_objects.zip": "never seen",
}


def main() -> None:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    {"words": words, "views": views, "images": images, "score": score, "quick": quick}[args.stage](args)


def words(args: argparse.Namespace) -> None:
    """Distil a sentence encoder into the text tower → WORK/words.safetensors."""
    clip = fresh_clip(args.seed)
    nouns, glosses = vocabulary(WordNet(args.wordnet), offsets_in(args.names) if args.names else {})
    print(f"words: {len(nouns)} nouns", flush=True)
    aims = args.work / "word_targets.safetensors"
    if not aims.exists():
        width = int(clip.model_cfg["embed_dim"])
        save_file({"target": targets(nouns, glosses, width)}, aims)
    target = load_file(aims)["target"]
    distil(clip, nouns, target, steps=args.steps, peak=args.peak, seed=args.seed)
    save_file(
        {k: v for k, v in clip.model.state_dict().items() if not k.startswith("visual.")},
        args.work / "words.safetensors",
    )


def views(args: argparse.Namespace) -> None:
    """Show the teacher some crops of every image → WORK/views.safetensors."""
    train = load(args.data, args.split, side(fresh_clip(0)))
    seen = look(train, views=args.views, seed=args.seed, scratch=args.work)
    seen.save(args.work / "views.safetensors")


def images(args: argparse.Namespace) -> None:
    """Train the vision tower → WORK/open_clip_model.safetensors.

    Several processes share every batch. On two cores two of them with a thread each see 337 images a second,
    with everything that is done to them; one process with one thread 199.
    """
    if args.processes == 1:
        train_images(args)
        return
    rendezvous = args.work / f"rendezvous-{os.getpid()}"
    torch.multiprocessing.spawn(_one_of_several, (args, rendezvous), nprocs=args.processes)
    rendezvous.unlink(missing_ok=True)


def _one_of_several(rank: int, args: argparse.Namespace, rendezvous: Path) -> None:
    torch.set_num_threads(max(1, args.threads // args.processes))
    where = f"file://{rendezvous.resolve()}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=args.processes)
    speaks = contextlib.redirect_stdout(io.StringIO()) if rank else contextlib.nullcontext()
    with speaks:  # one for all
        train_images(args)
    dist.destroy_process_group()


def train_images(args: argparse.Namespace) -> None:
    """What each process does."""
    clip = fresh_clip(args.seed)
    train = load(args.data, args.split, side(clip))
    print(f"images: {len(train.labels)} of {len(train.classes)} classes", flush=True)
    distilled = args.start or args.work / "words.safetensors"
    if distilled.exists():
        clip.model.load_state_dict(load_file(distilled), strict=False)
    recipe = Recipe(
        epochs=args.epochs,
        batch=args.batch,
        seed=args.seed,
        text=not distilled.exists(),
        peak=args.peak,
        trust=args.trust,
        feature_weight=args.feature_weight,
    )
    own = plain(train.classes)
    wordnet = WordNet(args.wordnet) if args.names else None
    if wordnet is not None:
        offsets = offsets_in(args.names)
        own = from_wordnet(wordnet, {offsets[name]: name for name in train.classes})
    training = Training(clip, train, own, recipe)
    seen = args.work / "views.safetensors"
    if wordnet is not None and seen.exists():
        theirs = imagenet_offsets()
        mapping = torch.tensor([theirs.index(offsets[name]) for name in train.classes])
        training.with_teacher(Views.load(seen), from_wordnet(wordnet, dict.fromkeys(theirs)), mapping)
    training.prepare()
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        training.restore(checkpoint)
        print(f"images: going on from step {training.step} of {training.total}", flush=True)
    run(training, args, checkpoint)


def run(training: Training, args: argparse.Namespace, checkpoint: Path) -> None:
    """The epochs that are left; weights and checkpoint after each."""
    start = time.monotonic()
    while training.step < training.total:
        for report in training.epoch():
            figures = ", ".join(f"{name} {value:.4g}" for name, value in report.items())
            print(f"images: {figures}, of {training.total}, {time.monotonic() - start:.0f} s", flush=True)
        if not dist.is_initialized() or dist.get_rank() == 0:
            training.keep(checkpoint)
            write_weights(training.average, args.work)


def quick(args: argparse.Namespace) -> None:
    """A minute's training from nothing but folders of images: shows that the recipe runs."""
    args.names = None
    images(args)


def score(args: argparse.Namespace) -> None:
    """Zero-shot top-1 of WORK's weights on the test splits of image packs, one template."""
    clip = fresh_clip(0)
    weights = args.weights or args.work / "open_clip_model.safetensors"
    open_clip.load_checkpoint(clip.model, str(weights), strict=True)
    for pack, note in PROBES.items():
        if (args.packs / pack).exists():
            test = load(args.packs / pack, "test", side(clip))
            share = 100 * accuracy(clip, test)
            print(
                f"{pack}: {share:.1f} % of {len(test.labels)}, {len(test.classes)} names, {note}", flush=True
            )


@torch.inference_mode()
def accuracy(clip: Clip, test: ImageSet) -> float:
    """Zero-shot top-1 with "a photo of a {}."."""
    clip.model.eval()
    names = encode_text(clip.model, tokenize(clip, test.classes))
    right = 0
    for rows in torch.arange(len(test.labels)).split(250):
        vectors = clip.model.encode_image(normalize(test.pixels[rows].float() / 255), normalize=True)
        right += int(((vectors @ names.T).argmax(dim=1) == test.labels[rows]).sum())
    return right / len(test.labels)


def fresh_clip(seed: int) -> Clip:
    """The architecture of small-clip-64.json with random weights."""
    torch.manual_seed(seed)
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    size = config["vision_cfg"]["image_size"]
    return Clip(open_clip.CLIP(**config), CONFIG.stem, config, {"size": size}, open_clip.SimpleTokenizer())


def side(clip: Clip) -> int:
    """Pixels the vision tower takes."""
    return clip.image_size[0]


def write_weights(state: dict[str, Tensor], work: Path) -> None:
    """Weights as float16, which is how they are shipped."""
    part = work / "open_clip_model.part"
    save_file({name: value.half().contiguous() for name, value in state.items() if name != "attn_mask"}, part)
    part.replace(work / "open_clip_model.safetensors")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["words", "views", "images", "score", "quick"])
    parser.add_argument(
        "--work", type=Path, default=Path("pretrain-work"), help="where results and checkpoints go"
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tiny_imagenet_200.zip"))
    parser.add_argument("--split", default="train", help="folder of --data that holds the classes")
    parser.add_argument("--names", type=Path, help="JSON that says what the classes are in WordNet")
    parser.add_argument("--packs", type=Path, default=Path("../shared/data"), help="image packs to score on")
    parser.add_argument("--weights", type=Path, help="score these instead of WORK's")
    parser.add_argument("--start", type=Path, help="weights to go on from, instead of WORK's words")
    parser.add_argument("--wordnet", type=Path, default=DEFAULT_PATH)
    parser.add_argument("--steps", type=int, default=4000, help="of the words stage")
    parser.add_argument("--peak", type=float, default=1.5e-3, help="learning rate")
    parser.add_argument("--trust", type=float, default=Recipe.trust)
    parser.add_argument("--feature-weight", type=float, default=Recipe.feature_weight)
    parser.add_argument("--views", type=int, default=4, help="crops of each image the teacher sees")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="of the images stage, sharing the threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()

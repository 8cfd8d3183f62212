"""What both rivals compute with: the version that `dynlora serve` serves, opened by the same code.

So graph, session options, decoding, preprocessing and ranking are the same; only the server differs.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from deploy.preprocess import decode_image
from deploy.runtime import LoadedVersion


def load() -> LoadedVersion:
    """Open and warm the version that the environment names."""
    loaded = LoadedVersion(Path(os.environ["BENCH_VERSION"]), threads=1)
    loaded.warm_up(map(int, os.environ["BENCH_BATCHES"].split()))
    return loaded


def takes_pictures() -> bool:
    """Whether bodies are JPEG files; otherwise they are the raw values of one picture (3, H, W)."""
    return os.environ["BENCH_PAYLOAD"] == "jpeg"


def pixels(loaded: LoadedVersion, body: bytes) -> Any:
    """Return (1, 3, H, W) of one request's body."""
    if takes_pictures():
        return loaded.preprocessing([decode_image(body)])
    return np.frombuffer(body, "<f4").reshape(1, 3, *loaded.preprocessing.size)


def answer(loaded: LoadedVersion, embeds: Any) -> tuple[bytes, str]:
    """Return the body and media type for one picture's embedding (1, dim)."""
    if not takes_pictures():
        return embeds.tobytes(), "application/octet-stream"
    best = [{"label": each.label, "score": each.score} for each in loaded.rank(embeds)[0]]
    return json.dumps({"predictions": [best]}).encode(), "application/json"

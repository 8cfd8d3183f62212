"""LitServe: its batched loop in one inference worker, the body as bytes, requests over its ZeroMQ queue."""

import os
from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body, Response

from benchmarks.rivals import shared


class Vision(litserve.LitAPI):
    """Decodes one by one, predicts in batches, as its documentation has it."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's signature
        """In the inference worker."""
        self.loaded = shared.load()

    def decode_request(self, request: Annotated[bytes, Body()]) -> Any:
        """One body to (1, 3, H, W)."""
        return shared.pixels(self.loaded, request)

    def batch(self, inputs: list[Any]) -> Any:
        """Several of them to one array."""
        return np.concatenate(inputs)

    def predict(self, x: Any) -> Any:
        """Embeddings (N, dim)."""
        return self.loaded.encode_pixels(x)

    def unbatch(self, output: Any) -> list[Any]:
        """One (1, dim) for each request."""
        return list(output[:, None])

    def encode_response(self, output: Any) -> Response:
        """An HTTP answer."""
        body, kind = shared.answer(self.loaded, output)
        return Response(body, media_type=kind)


if __name__ == "__main__":
    api = Vision(max_batch_size=16, batch_timeout=float(os.environ["BENCH_BATCH_SECONDS"]))
    server = litserve.LitServer(
        api, accelerator="cpu", devices=int(os.environ["BENCH_CORES"]), workers_per_device=1, fast_queue=True
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["BENCH_PORT"]),
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )

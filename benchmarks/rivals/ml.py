"""MLServer: a custom runtime whose handler takes the raw body, with adaptive batching, in one process.

Its own REST path knows JSON only, in which pixel values are several times larger and slower to read.
"""

import asyncio
from typing import Any

import numpy as np
from fastapi import Request, Response
from mlserver import MLModel
from mlserver.context import model_context
from mlserver.handlers import custom_handler
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput, ResponseOutput

from benchmarks.rivals import shared


class Vision(MLModel):
    """Batches are merged as bytes, which is the least work of what adaptive batching can merge."""

    async def load(self) -> bool:
        """Open the version."""
        self.loaded = await asyncio.to_thread(shared.load)
        return True

    @custom_handler(rest_path="/raw")
    async def raw(self, request: Request) -> Response:
        """One picture, as JPEG or as raw values."""
        body = await request.body()
        values: Any = body
        shape = [1, 3, *self.loaded.preprocessing.size]
        if shared.takes_pictures():
            values = (await asyncio.to_thread(shared.pixels, self.loaded, body)).tobytes()
        one = RequestInput(name="pixel_values", shape=shape, datatype="FP32", data=values)
        with model_context(self.settings):  # for its metrics; its own paths have it from elsewhere
            found = await self.predict(InferenceRequest(inputs=[one]))
        embeds = np.frombuffer(found.outputs[0].data.root, np.float32)[None]
        answer, kind = shared.answer(self.loaded, embeds)
        return Response(answer, media_type=kind)

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """A batch; adaptive batching puts itself in front of this."""
        given = payload.inputs[0]
        values = np.frombuffer(given.data.root, np.float32).reshape(given.shape)
        embeds = await asyncio.to_thread(self.loaded.encode_pixels, values)
        output = ResponseOutput(
            name="image_embeds",
            shape=[len(embeds), embeds.shape[1] * 4],
            datatype="UINT8",
            data=embeds.tobytes(),
        )
        return InferenceResponse(model_name=self.name, outputs=[output])

"""``/v1/embeddings``."""

from __future__ import annotations

import base64

import msgspec
import numpy as np

from ..config import SamplingParams
from .completions import gathered
from .http import Context, Reply
from .schemas import Embedding, EmbeddingRequest, EmbeddingResponse, EmbeddingUsage, encode
from .service import Job, Service

_decoder = msgspec.json.Decoder(EmbeddingRequest)


class Embeddings:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: bytes, context: Context) -> Reply:
        request = _decoder.decode(body)
        service = self._service
        adapter = service.adapter(request.model)
        prompts = await service.prompts("input", request.input, True, request.cache_salt)
        options = service.options(request.priority, request.timeout, adapter)
        what = {"pooling": request.pooling, "normalize": request.normalize, "dimensions": request.dimensions}
        jobs = [Job(service, context, prompt, SamplingParams(max_tokens=None)) for prompt in prompts]
        outputs = await gathered([job.embed(what | options) for job in jobs])
        as_text = request.encoding_format == "base64"
        data = []
        for index, output in enumerate(outputs):
            values = np.asarray(output.embedding, "<f4")
            data.append(
                Embedding(index, base64.b64encode(values.tobytes()).decode() if as_text else values.tolist())
            )  # fmt: skip
        tokens = sum(len(prompt.token_ids) for prompt in prompts)
        response = EmbeddingResponse(
            data=data, model=request.model or service.config.model_names[0], usage=EmbeddingUsage(tokens, tokens)
        )
        return Reply(encode(response))

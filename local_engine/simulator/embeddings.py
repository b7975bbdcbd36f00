"""`/v1/embeddings`: vectors that depend on the words alone.

Owns the vectors (each token adds a few hashed coordinates, so texts that share words are near each other) and that
dialect's fields. Real servers have a model for this or for chat, never both; the simulator does both. Knows no HTTP
and no engine.
"""

import base64
import hashlib
import math
import struct
from array import array
from typing import Any, Final, Literal

import msgspec

from local_engine.simulator.completions import prompts_of
from local_engine.simulator.driver import Tally
from local_engine.simulator.generation import Sampling, Served, check, decode, refuse
from local_engine.simulator.reply import Label

DIMENSIONS: Final = 384
_COORDINATES = struct.Struct("<8H")


class Request(msgspec.Struct, kw_only=True):
    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


_REQUEST: Final = msgspec.json.Decoder(Request)


class EmbeddingReply:
    """One embeddings call."""

    def __init__(self, body: bytes, served: Served, label: Label) -> None:
        request = decode(_REQUEST, body)
        self.prompts = prompts_of(request.input, "input")
        self._dimensions = DIMENSIONS if request.dimensions is None else request.dimensions
        if not 1 <= self._dimensions <= DIMENSIONS:
            raise refuse(f"`dimensions` must be between 1 and {DIMENSIONS}.", "dimensions")
        check(self.prompts, Sampling(), request.model, served)
        self._request = request
        self._label = label

    def whole(self, tally: Tally) -> dict[str, Any]:
        return {
            "id": f"embd-{self._label.key}",
            "object": "list",
            "created": self._label.created_time,
            "model": self._label.model,
            "data": [
                {"index": number, "object": "embedding", "embedding": self._encoded(prompt)}
                for number, prompt in enumerate(self.prompts)
            ],
            "usage": {
                "prompt_tokens": tally.prompt_tokens,
                "total_tokens": tally.prompt_tokens,
                "completion_tokens": 0,
                "prompt_tokens_details": None,
            },
        }

    def _encoded(self, prompt: list[int]) -> list[float] | str:
        values = vector(prompt, self._dimensions)
        if self._request.encoding_format == "float":
            return values
        return base64.b64encode(array("f", values).tobytes()).decode()


def vector(tokens: list[int], dimensions: int) -> list[float]:
    """A unit vector of `dimensions` numbers."""
    sums = [0.0] * DIMENSIONS
    for token in tokens:
        digest = hashlib.blake2b(token.to_bytes(8), digest_size=16).digest()
        for number in _COORDINATES.unpack(digest):
            sums[(number >> 1) % DIMENSIONS] += 1.0 if number & 1 else -1.0
    sums = sums[:dimensions]
    length = math.sqrt(math.fsum(value * value for value in sums))
    if length == 0:
        # What is left after cutting may cancel out; any fixed direction will do.
        return [1.0] + [0.0] * (dimensions - 1)
    return [value / length for value in sums]

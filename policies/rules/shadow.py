"""Shadow traffic: which requests are copied to which target, so that a new one is tried with real work.

Decides only; the copies are made and their answers dropped by `gateway.shadowing`. Drawn by the request's id, so what
is copied does not depend on who asks.
"""

from typing import TYPE_CHECKING, Final

import xxhash

if TYPE_CHECKING:
    from policies.routing import Model

_RANGE: Final = 2.0**64


class Shadow:
    """A share of a model's requests, to a target that is a model of its own here. At most `max_in_flight` in a worker."""

    __slots__ = ("in_flight", "max_in_flight", "model", "percent")

    def __init__(self, model: "Model", percent: float, max_in_flight: int) -> None:
        self.model = model
        self.percent = percent
        self.max_in_flight = max_in_flight
        self.in_flight = 0

    def takes(self, request_id: str) -> bool:
        return self.percent >= 100 or (
            xxhash.xxh3_64_intdigest(request_id.encode(), 1) / _RANGE * 100 < self.percent
        )

"""Which endpoints have computed which beginnings of prompts, as far as this process knows from what it sent.

Bounded for each endpoint, the beginnings not used for longest forgotten first, like the engine's own cache. What the
engines themselves say of their caches is `policies.placement.block_index`.
"""

from collections.abc import Sequence
from typing import Final

from backends.load import EndpointLoad
from policies.placement.ask import Ask

_COMMON: Final = 8


class ApproximateIndex:
    """Endpoints are told apart by `hash_key`. `capacity`: how many beginnings are remembered of each."""

    __slots__ = ("_capacity", "_held", "_holders")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._holders: dict[int, tuple[bytes, ...]] = {}  # by hash of a beginning
        self._held: dict[bytes, dict[int, None]] = {}  # by endpoint, the least recently used first

    def match(self, ask: Ask) -> dict[bytes, int]:
        """By hash key of the endpoint, how many bytes of the prompt's beginning it has; endpoints without any left out."""
        found: dict[bytes, int] = {}
        holders_of = self._holders.get
        place = len(ask.prefixes)
        for beginning in reversed(ask.prefixes):
            place -= 1
            holders = holders_of(beginning)
            if holders is not None:
                for hash_key in holders:
                    if hash_key not in found:
                        found[hash_key] = ask.prefix_bytes[place]
                if len(holders) > _COMMON:
                    break  # what so many have is a preamble, and they have its beginnings, too
        return found

    def add(self, endpoint: EndpointLoad, ask: Ask) -> None:
        """The endpoint computes this prompt now, or soon."""
        hash_key = endpoint.hash_key
        held = self._held.get(hash_key)
        if held is None:
            held = self._held[hash_key] = {}
        holders = self._holders
        # The longest first: of a prompt, the engine frees the end before the beginning.
        for beginning in reversed(ask.prefixes):
            if beginning in held:
                del held[beginning]
            else:
                holders[beginning] = (*holders.get(beginning, ()), hash_key)
            held[beginning] = None
        while len(held) > self._capacity:
            oldest = next(iter(held))
            del held[oldest]
            self._drop(oldest, hash_key)

    def forget(self, hash_key: bytes) -> None:
        """The endpoint's cache is gone: it restarted, or was reset."""
        for beginning in self._held.pop(hash_key, ()):
            self._drop(beginning, hash_key)

    def keep_only(self, endpoints: Sequence[EndpointLoad]) -> None:
        """Endpoints that left the pool are forgotten."""
        present = {endpoint.hash_key for endpoint in endpoints}
        for hash_key in self._held.keys() - present:
            self.forget(hash_key)

    def _drop(self, beginning: int, hash_key: bytes) -> None:
        left = tuple(key for key in self._holders[beginning] if key != hash_key)
        if left:
            self._holders[beginning] = left
        else:
            del self._holders[beginning]

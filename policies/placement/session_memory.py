"""Where each session was last, and how long its context was then. A bounded memory of one process.

Placing does not depend on it (that is hashed): it tells whether a session was kept, and what its cache may hold.
"""

from typing import NamedTuple

from backends.load import EndpointLoad
from policies.placement.ask import Ask


class Stay(NamedTuple):
    """`hash_key` of the endpoint; `tokens`: the prompt and its answer."""

    hash_key: bytes
    tokens: int


class SessionMemory:
    """The sessions seen last, the oldest forgotten first."""

    __slots__ = ("_capacity", "_stays")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._stays: dict[int, Stay] = {}

    def find(self, session: int) -> Stay | None:
        return self._stays.get(session)

    def cached_tokens(self, endpoint: EndpointLoad, ask: Ask) -> int:
        """What of this prompt the endpoint has seen as this session's."""
        stay = self._stays.get(ask.session)
        if stay is None or stay.hash_key != endpoint.hash_key:
            return 0
        return min(stay.tokens, ask.prompt_tokens)

    def put(self, session: int, endpoint: EndpointLoad, tokens: int) -> None:
        stays = self._stays
        stays.pop(session, None)  # to the end: a dict keeps the order of insertion
        stays[session] = Stay(endpoint.hash_key, tokens)
        if len(stays) > self._capacity:
            del stays[next(iter(stays))]

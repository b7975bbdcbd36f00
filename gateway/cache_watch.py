"""A worker's knowledge of what its engines' caches hold: one exact index for each pool that follows KV events.

Owns which index an endpoint belongs to, and keeps it as the parent's words come. Refuses to know sockets and requests.
An index lives as long as its pool follows events, so what holds it never has to be told of a new one.
"""

from array import array
from collections.abc import Mapping

from backends.pool import Pool
from gateway.control import BlocksHeld
from policies.placement.block_index import BlockIndex


class CacheWatch:
    """One per worker."""

    def __init__(self) -> None:
        self._indexes: dict[str, BlockIndex] = {}
        self._pools: dict[bytes, str] = {}  # by endpoint's hash key
        self._names: dict[bytes, str] = {}

    def declare(self, pools: Mapping[str, Pool]) -> None:
        """The pools that follow events in the configuration that now is in force. The parent tells it all again."""
        self._indexes = {name: self._indexes.get(name) or BlockIndex() for name in pools}
        members = [(endpoint, pool.name) for pool in pools.values() for endpoint in pool.endpoints]
        self._pools = {endpoint.hash_key: name for endpoint, name in members}
        self._names = {endpoint.hash_key: endpoint.name for endpoint, _ in members}
        for name, index in self._indexes.items():
            for hash_key in list(index.known):
                if self._pools.get(hash_key) != name:
                    index.forget(hash_key)

    def index(self, pool: str) -> BlockIndex | None:
        """None: its engines' caches are guessed at."""
        return self._indexes.get(pool)

    def hear(self, word: BlocksHeld) -> None:
        index = self._indexes.get(self._pools.get(word.endpoint, ""))
        if index is None:
            return  # late: a reload has taken the endpoint away
        if not word.is_followed:
            index.forget(word.endpoint)
            return
        if word.is_reset:
            index.clear(word.endpoint)
        index.follow(word.endpoint, word.block_size, is_partial=word.is_partial)
        index.adapters.update(word.adapters)
        index.change(word.endpoint, array("Q", word.added), array("Q", word.removed))

    def held(self) -> dict[str, int]:
        """By endpoint, how many blocks are known of it; those that are not followed are left out. For metrics."""
        return {
            self._names[hash_key]: index.held(hash_key)
            for index in self._indexes.values()
            for hash_key in index.known
        }

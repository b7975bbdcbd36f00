"""A prefix cache as vLLM keeps it: chained block hashes over a pool of blocks.

Owns which full blocks of tokens are held, by whom, and which one goes next (least recently used, of those nobody
holds). Knows no request, no model and no time. Hashes are vLLM's own (`sha256_cbor`), so what is predicted here
can be compared with a real engine. Invariants: a block is free or held, never both; only full blocks have a
digest; a run that matches is always a true prefix, because each digest covers everything before it.
"""

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def _head(major: int, number: int) -> bytes:
    """A CBOR head in its shortest form (RFC 8949 section 3): `major` is the type, `number` its length or value."""
    if number < 24:
        return bytes((major << 5 | number,))
    if number < 1 << 8:
        return bytes((major << 5 | 24, number))
    if number < 1 << 16:
        return bytes((major << 5 | 25,)) + number.to_bytes(2)
    if number < 1 << 32:
        return bytes((major << 5 | 26,)) + number.to_bytes(4)
    return bytes((major << 5 | 27,)) + number.to_bytes(8)


@functools.lru_cache(maxsize=1 << 14)  # the same few thousand tokens make up most text
def _token(token: int) -> bytes:
    return _head(0, token)


def _text(value: str) -> bytes:
    data = value.encode()
    return _head(3, len(data)) + data


# What the first block is chained to when PYTHONHASHSEED is unset.
ROOT_DIGEST = hashlib.sha256(_text("vllm-none-hash")).digest()


class BlockHasher:
    """Extends one sequence's chain of digests, a block at a time.

    `salt` is in the first block only, `lora` (name, path) in every block, as in vLLM.
    """

    __slots__ = ("_block_size", "_lora", "_salt", "digests")

    def __init__(
        self, block_size: int, *, salt: str | None = None, lora: tuple[str, str] | None = None
    ) -> None:
        self._block_size = block_size
        self._salt = salt
        self._lora = lora
        self.digests: list[bytes] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Hash the full blocks of `tokens` (the whole sequence so far) that have no digest yet."""
        size = self._block_size
        for start in range(len(self.digests) * size, len(tokens) - size + 1, size):
            parent = self.digests[-1] if start else ROOT_DIGEST
            parts = [b"\x83\x58\x20", parent, _head(4, size)]
            parts += map(_token, tokens[start : start + size])
            parts.append(self._extra(is_first=start == 0))
            self.digests.append(hashlib.sha256(b"".join(parts)).digest())

    def _extra(self, *, is_first: bool) -> bytes:
        keys: list[bytes] = []
        if self._lora is not None:
            keys.append(_head(4, 3) + _text("lora") + _text(self._lora[0]) + _text(self._lora[1]))
        if self._salt is not None and is_first:
            keys.append(_head(4, 2) + _text("cache_salt") + _text(self._salt))
        return _head(4, len(keys)) + b"".join(keys) if keys else b"\xf6"


class Block:
    """Room for one block of tokens. `digest` is set while it can be found in the cache."""

    __slots__ = ("digest", "holders")

    def __init__(self) -> None:
        self.digest: bytes | None = None
        self.holders = 0


class BlockPool:
    """A fixed number of blocks, shared by all sequences."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free: OrderedDict[Block, None] = OrderedDict((Block(), None) for _ in range(capacity))
        self._cached: dict[bytes, Block] = {}

    @property
    def used(self) -> int:
        """Blocks that somebody holds; a cached block nobody holds counts as free."""
        return self.capacity - len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    def match(self, digests: Iterable[bytes]) -> list[Block]:
        """The cached blocks of the longest leading run. They are not held yet: claim them before allocating."""
        run: list[Block] = []
        for digest in digests:
            block = self._cached.get(digest)
            if block is None:
                break
            run.append(block)
        return run

    def has_room(self, run: Iterable[Block], count: int) -> bool:
        """Whether `count` blocks could be allocated once the blocks of `run` are claimed."""
        return count <= len(self._free) - sum(block.holders == 0 for block in run)

    def claim(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if block.holders == 0:
                del self._free[block]
            block.holders += 1

    def allocate(self, count: int) -> list[Block] | None:
        """Take `count` blocks, forgetting the least recently used; None (and nothing taken) if too few are free."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            if block.digest is not None:
                del self._cached[block.digest]
                block.digest = None
            block.holders = 1
            taken.append(block)
        return taken

    def publish(self, block: Block, digest: bytes) -> bool:
        """Make a full block findable. False if the same content already is: the copy stays private."""
        if digest in self._cached:
            return False
        self._cached[digest] = block
        block.digest = digest
        return True

    def release(self, blocks: Sequence[Block]) -> None:
        """Let go of a sequence's blocks, the last first, so that the tail of a prefix is forgotten before its head."""
        for block in reversed(blocks):
            block.holders -= 1
            if block.holders == 0:
                self._free[block] = None
                # A block nobody can find again is the best one to take next.
                if block.digest is None:
                    self._free.move_to_end(block, last=False)

    def clear(self) -> None:
        """Forget every cached prefix. Blocks in use stay with their holders."""
        for block in self._cached.values():
            block.digest = None
        self._cached.clear()

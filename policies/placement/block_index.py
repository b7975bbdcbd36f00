"""Which endpoints hold which blocks of prompts, by the engines' own word: the exact counterpart of `ApproximateIndex`.

Fed with the changes of each endpoint's cache, asked with a prompt as a chain of blocks. Refuses to know where either
comes from. Bounded by the engines' memory: it holds what they hold.

Invariant it relies on: an engine frees the end of a prompt before its beginning, so it holds a chain up to some block
and nothing after it, and a search by halves finds that block.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from backends.kv_blocks import Chain

# Prompts of an endpoint that were just answered and that its events have not told of yet.
_ASSUMED: Final = 8
# Words of an endpoint after which what was assumed of it must have been told.
_WORDS: Final = 16


class _Assumed(msgspec.Struct):
    """A prompt's blocks that an endpoint must hold, since it has answered; `words` have come from it since."""

    names: Sequence[int]
    words: int = 0


class BlockIndex:
    """Of one pool. Endpoints are told apart by `hash_key`; `block_size` is 0 until an engine has said it.

    An endpoint is `known` while its events are followed. `partial` are those that had blocks before we listened: of
    these a hit is true, and a miss may not be.
    """

    def __init__(self) -> None:
        self.block_size = 0
        self.adapters: set[str] = set()  # LoRA adapters whose blocks are named after them
        self.partial: set[bytes] = set()
        self._bits: dict[bytes, int] = {}  # by endpoint, its bit in the masks
        self._holders: dict[int, int] = {}  # by block, a mask of endpoints
        self._held: dict[bytes, int] = {}
        self._assumed: dict[bytes, deque[_Assumed]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def known(self) -> Iterable[bytes]:
        return self._bits.keys()

    def follow(self, hash_key: bytes, block_size: int, *, is_partial: bool) -> None:
        """From now on this endpoint's changes come; blocks of another size than the pool's would never match."""
        self.block_size = block_size or self.block_size
        if hash_key not in self._bits:
            taken = set(self._bits.values())
            bit = 1
            while bit in taken:
                bit <<= 1
            self._bits[hash_key] = bit
            self._held[hash_key] = 0
        if is_partial:
            self.partial.add(hash_key)
        else:
            self.partial.discard(hash_key)

    def change(self, hash_key: bytes, added: Iterable[int], removed: Iterable[int]) -> None:
        """Of an endpoint that is followed; of another nothing is kept."""
        bit = self._bits.get(hash_key)
        if bit is None:
            return
        assumed = self._assumed.get(hash_key)
        if assumed:
            self._check(hash_key, assumed, set(removed))
        holders = self._holders
        count = self._held[hash_key]
        for name in added:
            mask = holders.get(name, 0)
            if not mask & bit:
                holders[name] = mask | bit
                count += 1
        for name in removed:
            mask = holders.get(name, 0)
            if mask & bit:
                count -= 1
                if mask == bit:
                    del holders[name]
                else:
                    holders[name] = mask ^ bit
        self._held[hash_key] = count

    def assume(self, hash_key: bytes, chain: Chain) -> None:
        """The endpoint has answered this prompt, so it holds its blocks; the events that say so may come after the next
        prompt. Believed until they have come, or must have."""
        bit, names = self._bits.get(hash_key, 0), chain.names
        if (
            bit
            and names
            and chain.block_size == self.block_size
            and not self._holders.get(names[-1], 0) & bit
        ):
            self._assumed.setdefault(hash_key, deque(maxlen=_ASSUMED)).append(_Assumed(names))

    def clear(self, hash_key: bytes) -> None:
        """Its cache is empty, as far as we know."""
        self._assumed.pop(hash_key, None)
        bit = self._bits.get(hash_key, 0)
        if not bit or not self._held[hash_key]:
            return
        gone = [name for name, mask in self._holders.items() if mask & bit]
        self.change(hash_key, (), gone)

    def forget(self, hash_key: bytes) -> None:
        """Its events are not followed any more: what it holds is not known."""
        self.clear(hash_key)
        self._bits.pop(hash_key, None)
        self._held.pop(hash_key, None)
        self.partial.discard(hash_key)

    def held(self, hash_key: bytes) -> int:
        return self._held.get(hash_key, 0)

    def match(self, chain: Chain) -> dict[bytes, int]:
        """By endpoint that is known, how many tokens of this prompt it would report as cached."""
        found = dict.fromkeys(self._bits, 0)
        if chain.block_size != self.block_size or not found:
            return found
        names, holders = chain.names, self._holders
        for hash_key, bit in self._bits.items():
            blocks = _longest(names, holders, bit)
            for assumed in self._assumed.get(hash_key, ()):
                blocks = max(blocks, _common(names, assumed.names))
            if blocks:
                found[hash_key] = chain.cacheable_tokens(blocks)
        return found

    def _check(self, hash_key: bytes, assumed: deque[_Assumed], removed: set[int]) -> None:
        """Drops what a word of the endpoint has confirmed, or contradicts."""
        bit = self._bits[hash_key]
        for known in list(assumed):
            known.words += 1
            is_told = self._holders.get(known.names[-1], 0) & bit
            if is_told or known.words > _WORDS or not removed.isdisjoint(known.names):
                assumed.remove(known)


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """How many blocks two prompts begin with together: a name covers all before it."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == two[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _longest(names: Sequence[int], holders: dict[int, int], bit: int) -> int:
    """How many leading blocks the endpoint of this bit holds."""
    held_of = holders.get
    if not names or not held_of(names[0], 0) & bit:
        return 0
    low, high = 1, len(names)
    while low < high:
        middle = (low + high + 1) // 2
        if held_of(names[middle - 1], 0) & bit:
            low = middle
        else:
            high = middle - 1
    return low

"""Which endpoints hold which blocks of prompts, by the engines' own word: the exact counterpart of `ApproximateIndex`.

Fed with the changes of each endpoint's cache, asked with a prompt as a chain of blocks. Refuses to know where either
comes from. Bounded by the engines' memory: it holds what they hold.

Invariant it relies on: an engine frees the end of a prompt before its beginning, so it holds a chain up to some block
and nothing after it, and a search by halves finds that block.
"""

from collections.abc import Iterable, Sequence

from backends.kv_blocks import Chain


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

    def clear(self, hash_key: bytes) -> None:
        """Its cache is empty, as far as we know."""
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
            if blocks:
                found[hash_key] = chain.cacheable_tokens(blocks)
        return found


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

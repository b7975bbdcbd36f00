"""Prompts and caches as chains of blocks that have the same names everywhere.

An engine names a block by a hash of its own (sha256 of a pickle, xxhash with a seed of that process, ...). Events
carry the tokens, so blocks are named again here: the same tokens after the same beginning have the same name on
every engine and in every process of ours, whatever the engine's algorithm. `HeldBlocks` is one engine's cache by these
names, `Chain` a prompt. Refuses to know sockets, endpoints and text.

Invariant: a name covers everything before it (adapter and salt included), so a prompt is cached as far as its blocks'
names are held.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import msgspec
import xxhash

from backends.kv_events import BlockName, Cleared, Event, Extra, Removed, Stored

# The first block follows this.
ROOT: Final = 0
_hash: Final = xxhash.xxh3_64_intdigest
_encode: Final = msgspec.msgpack.Encoder().encode
_KIND: Final = "I"  # of array: 32 bits a token
_TOKEN_BYTES: Final = array(_KIND).itemsize


def _with(extra: Extra) -> int:
    return _hash(_encode(list(extra))) if extra else 0


class Chain:
    """A prompt's blocks. Immutable: `extended` makes another.

    `names` are those of the full blocks, `tail` the tokens after them. `every` goes into each block (an adapter's
    name), `first` into the first one only (a salt).
    """

    __slots__ = ("_every", "_first", "block_size", "names", "tail")

    def __init__(
        self,
        block_size: int,
        *,
        every: str | None = None,
        first: str | None = None,
    ) -> None:
        self.block_size = block_size
        self.names: array[int] = array("Q")
        self.tail: array[int] = array(_KIND)
        own = [every] if every else []
        self._every = _with(own)
        self._first = _with([*own, first] if first else own)

    @property
    def root(self) -> int:
        """The same for prompts that may share blocks."""
        return self._first

    @property
    def tokens(self) -> int:
        return len(self.names) * self.block_size + len(self.tail)

    @property
    def size_bytes(self) -> int:
        """Of memory, about."""
        return 200 + 8 * len(self.names) + _TOKEN_BYTES * len(self.tail)

    def extended(self, tokens: Iterable[int]) -> "Chain":
        """This prompt and these tokens after it. Costs what is new, and a copy of the names."""
        longer = Chain(self.block_size)
        longer._every, longer._first = self._every, self._first
        rest = self.tail + array(_KIND, tokens)
        names = array("Q", self.names)
        step = self.block_size
        full = len(rest) - len(rest) % step
        data = memoryview(rest).cast("B")
        name = names[-1] if names else ROOT
        for start in range(0, full, step):
            extra = self._every if names else self._first
            name = _hash(data[start * _TOKEN_BYTES : (start + step) * _TOKEN_BYTES], name ^ extra)
            names.append(name)
        longer.names = names
        longer.tail = rest[full:]
        return longer

    def is_same(self, other: "Chain") -> bool:
        """Of the same tokens; both of the same block size."""
        return self.names == other.names and self.tail == other.tail

    def cacheable_tokens(self, blocks: int) -> int:
        """What an engine reports as cached if it holds so many of the blocks: never the whole prompt."""
        step = self.block_size
        return min(blocks * step, max(self.tokens - 1, 0) // step * step)


class Change(NamedTuple):
    """Names that an engine now has and did not have before, and the other way round."""

    added: Sequence[int]
    removed: Sequence[int]
    is_cleared: bool = False


class HeldBlocks:
    """One engine's (or rank's) cache, from its events.

    An engine may hold the same block more than once, and says of each copy when it is gone. `orphans` counts blocks
    that follow one that was never told of: they cannot be named, and so are missed.
    """

    __slots__ = ("_copies", "_names", "adapters", "block_size", "orphans")

    def __init__(self) -> None:
        self._names: dict[BlockName, int] = {}  # by the engine's own
        self._copies: dict[BlockName, int] = {}  # beyond the first
        self.adapters: set[str] = set()  # LoRA adapters that anything was computed with
        self.block_size = 0
        self.orphans = 0

    def __len__(self) -> int:
        return len(self._names)

    def names(self) -> Iterable[int]:
        return self._names.values()

    def adopt(self, events: Iterable[Event]) -> Change:
        added: dict[int, None] = {}
        removed: dict[int, None] = {}
        is_cleared = False
        for event in events:
            match event:
                case Stored():
                    for name in self._store(event):
                        added[name] = None
                        removed.pop(name, None)
                case Removed():
                    for gone in event.names:
                        lost = self._remove(gone)
                        if lost is not None:
                            added.pop(lost, None)
                            removed[lost] = None
                case Cleared():
                    self.clear()
                    added, removed, is_cleared = {}, {}, True
        return Change(list(added), list(removed), is_cleared)

    def clear(self) -> None:
        self._names.clear()
        self._copies.clear()

    def _store(self, event: Stored) -> list[int]:
        name = ROOT
        if event.parent is not None:
            parent = self._names.get(event.parent)
            if parent is None:
                self.orphans += len(event.names)
                return []
            name = parent
        self.block_size = step = event.block_size
        if event.adapter:
            self.adapters.add(event.adapter)
        data = memoryview(array(_KIND, event.tokens)).cast("B")
        added = []
        extras = [_with(extra) for extra in event.extras] if any(event.extras) else None
        for place, theirs in enumerate(event.names):
            at = place * step * _TOKEN_BYTES
            extra = extras[place] if extras else 0
            name = _hash(data[at : at + step * _TOKEN_BYTES], name ^ extra)
            if theirs in self._names:
                self._copies[theirs] = self._copies.get(theirs, 0) + 1
            else:
                self._names[theirs] = name
                added.append(name)
        return added

    def _remove(self, theirs: BlockName) -> int | None:
        copies = self._copies.get(theirs, 0)
        if copies > 1:
            self._copies[theirs] = copies - 1
            return None
        if copies:
            del self._copies[theirs]
            return None
        return self._names.pop(theirs, None)

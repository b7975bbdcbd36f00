"""Broken builds of what follows KV events: (owner, name, what it is instead)."""

from typing import Any

from backends.kv_blocks import HeldBlocks
from backends.kv_stream import KvStream
from policies.placement.block_index import BlockIndex

_take, _remove = KvStream.take, HeldBlocks._remove


def passes_over_gaps(self, message):
    self.next_number = message.number
    return _take(self, message)


def forgets_with_the_first_copy(self, theirs):
    self._copies.pop(theirs, None)
    return _remove(self, theirs)


def fills_gaps_from_another_publisher(self, repeated):
    if not self.next_number or not repeated or repeated[0].number != self.repair_from:
        return None
    return self._adopt_all(repeated[1:])


def keeps_what_is_cleared(self, hash_key):
    del self, hash_key


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "passes_over_gaps": (KvStream, "take", passes_over_gaps),
    "forgets_with_the_first_copy": (HeldBlocks, "_remove", forgets_with_the_first_copy),
    "fills_gaps_from_another_publisher": (KvStream, "resume", fills_gaps_from_another_publisher),
    "keeps_what_is_cleared": (BlockIndex, "clear", keeps_what_is_cleared),
}

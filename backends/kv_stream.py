"""One publisher's messages in their order: what may be believed, and when something is missing.

Owns the rule for gaps, repetitions and restarts. A message that does not follow the last one calls for a repair: the
publisher repeats from the last one we had, and if that is the same one, what follows fills the gap; if it is gone or
another, everything is forgotten and built again from the beginning of what the publisher still has. Refuses to know
sockets and clocks.

Invariant: `blocks` is what the publisher told up to `next_number`, without a hole; `is_complete` if it was told from
its very first message on.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import xxhash

from backends.kv_blocks import Change, HeldBlocks
from backends.kv_events import EventError, read_batch

NO_CHANGE: Final = Change((), ())


class Message(NamedTuple):
    """`number` counts a publisher's messages from 0."""

    number: int
    payload: bytes


class KvStream:
    """Begins with `restart`; until then there is nothing to believe."""

    __slots__ = ("_last_digest", "_last_time", "blocks", "is_complete", "next_number", "unreadable")

    def __init__(self) -> None:
        self.blocks = HeldBlocks()
        self.is_complete = False
        self.next_number: int | None = None  # None: whatever comes next is taken
        self.unreadable = 0  # payloads that were none
        self._last_time = 0.0
        self._last_digest = 0

    def take(self, message: Message) -> Change | None:
        """None: something is missing before it, or another publisher speaks; what it says is lost until the repair."""
        if self.next_number is None:
            self.is_complete = message.number == 0
        elif message.number > self.next_number:
            return None
        elif message.number < self.next_number:
            # What was repeated already may come once more by the ordinary way; what is new cannot have an old number.
            return NO_CHANGE if self._time_of(message) <= self._last_time else None
        return self._adopt(message)

    @property
    def repair_from(self) -> int:
        """The first message to have repeated."""
        return max((self.next_number or 0) - 1, 0)

    def resume(self, repeated: Sequence[Message]) -> Change | None:
        """Fills a gap with messages from `repair_from` on. None: they do not go on from what we have."""
        if not self.next_number or not repeated:
            return None
        if repeated[0].number != self.repair_from or _digest(repeated[0]) != self._last_digest:
            return None
        return self._adopt_all(repeated[1:])

    def restart(self, repeated: Sequence[Message] | None) -> Change:
        """Forgets everything and begins with these, all that the publisher has; None: it cannot repeat."""
        self.blocks = HeldBlocks()
        self._last_time, self._last_digest = 0.0, 0
        self.is_complete = repeated is not None and (not repeated or repeated[0].number == 0)
        self.next_number = None if repeated is None else 0
        change = NO_CHANGE
        if repeated:
            self.next_number = repeated[0].number
            change = self._adopt_all(repeated) or NO_CHANGE
        return change._replace(is_cleared=True)

    def _adopt_all(self, messages: Sequence[Message]) -> Change | None:
        """One change for all of them; None if they have a hole themselves."""
        added: dict[int, None] = {}
        removed: dict[int, None] = {}
        is_cleared = False
        for message in messages:
            if message.number != self.next_number:
                return None
            change = self._adopt(message)
            if change.is_cleared:
                added, removed, is_cleared = {}, {}, True
            for name in change.removed:
                added.pop(name, None)
                removed[name] = None
            for name in change.added:
                removed.pop(name, None)
                added[name] = None
        return Change(list(added), list(removed), is_cleared)

    def _adopt(self, message: Message) -> Change:
        self.next_number = message.number + 1
        self._last_digest = _digest(message)
        try:
            batch = read_batch(message.payload)
        except EventError:
            self.unreadable += 1
            return NO_CHANGE
        self._last_time = batch.time
        return self.blocks.adopt(batch.events)

    def _time_of(self, message: Message) -> float:
        try:
            return read_batch(message.payload).time
        except EventError:
            return self._last_time


def _digest(message: Message) -> int:
    return xxhash.xxh3_64_intdigest(message.payload)

"""Writes of one turn of the event loop, sent one after the other at its end.

Writing at once would cost the kernel a wake-up of the peer for each message while the loop works on the next one:
sent together, the peer is woken once and still awake for the rest. Measured on one core: 76 us of CPU per proxied
request instead of 96. Nothing is merged, and when a turn has one message it goes out with that turn.

Order is kept for everything that goes through the same outbox, so one transport belongs to one outbox. Whoever
closes a transport flushes first.
"""

import asyncio


class Outbox:
    """What waits for the end of the turn. Belongs to the loop of its first write."""

    __slots__ = ("_loop", "_waiting")

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.Transport, bytes]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def write(self, transport: asyncio.Transport, data: bytes) -> None:
        """Sends `data` at the end of this turn; not at all if the transport is closed by then."""
        waiting = self._waiting
        if not waiting:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self.flush)
        waiting.append((transport, data))

    def flush(self) -> None:
        """Sends what waits, now."""
        waiting, self._waiting = self._waiting, []
        for transport, data in waiting:
            if not transport.is_closing():
                transport.write(data)

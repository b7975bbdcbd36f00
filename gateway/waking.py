"""A worker's word to the parent that a pool is wanted of which no endpoint takes requests: its engines may be asleep.

Owns how often that is said. Whoever has requests for a pool may say it: the waiting room's newcomers, the queue. Refuses
to know whether anything can be woken: the parent does.
"""

import time
from collections.abc import Callable
from typing import Final

from gateway.control import Wanted

# Somebody who waits says it again, in case the engine fell asleep just after it was said.
_AGAIN_S: Final = 1.0


class Waking:
    """One per worker."""

    def __init__(self) -> None:
        self._tell: Callable[[Wanted], None] | None = None
        self._said_at: dict[str, float] = {}

    def attach(self, tell: Callable[[Wanted], None]) -> None:
        """How the parent is reached."""
        self._tell = tell

    def want(self, pool: str) -> None:
        now = time.monotonic()
        if self._tell is not None and now - self._said_at.get(pool, -_AGAIN_S) >= _AGAIN_S:
            self._said_at[pool] = now
            self._tell(Wanted(pool))

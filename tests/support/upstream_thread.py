"""Scripted upstreams on a thread of their own, for tests that block: synchronous SDKs, clients in other processes.

Same process as the test, so an upstream's times (`time.perf_counter()`) and the test's own can be compared.
"""

import asyncio
import ssl
import threading
from collections.abc import Coroutine
from typing import Any, Self

from tests.support.scripted_upstream import Answer, Ended, Record, ScriptedUpstream

__all__ = ["Answer", "BlockingUpstream", "Record", "UpstreamThread"]


class UpstreamThread:
    """The thread and its event loop. Used by `with`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="upstreams", daemon=True)
        self._upstreams: list[ScriptedUpstream] = []

    def start(self, *, tls: ssl.SSLContext | None = None) -> "BlockingUpstream":
        upstream = self.run(ScriptedUpstream.start(tls=tls))
        self._upstreams.append(upstream)
        return BlockingUpstream(upstream, self)

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float = 40.0) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def gate(self) -> "ThreadGate":
        return ThreadGate(self._loop)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for upstream in self._upstreams:
            self.run(upstream.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class ThreadGate(asyncio.Event):
    """For `Answer.gate_after`: `set` may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._owner = loop

    def set(self) -> None:
        self._owner.call_soon_threadsafe(super().set)


class BlockingUpstream:
    """One of the thread's upstreams; what waits, blocks."""

    def __init__(self, upstream: ScriptedUpstream, thread: UpstreamThread) -> None:
        self._upstream = upstream
        self._thread = thread
        self.url = upstream.url
        self.script = upstream.script
        self.clear = upstream.clear

    @property
    def journal(self) -> list[Record]:
        return self._upstream.journal

    @property
    def last(self) -> Record:
        return self._upstream.journal[-1]

    def wait_for(self, count: int = 1) -> Record:
        """The `count`-th request since the last `clear`."""
        return self._thread.run(self._upstream.wait_for(count))

    def wait_end(self, record: Record) -> Ended:
        """Why that answer ended; TimeoutError if it does not within seconds."""
        return self._thread.run(record.wait_end())

    def gate(self) -> ThreadGate:
        return self._thread.gate()

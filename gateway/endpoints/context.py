"""What an endpoint may use: the pipeline, the current snapshot of the configuration, readiness."""

import os
import time
from dataclasses import dataclass

from gateway.overflow.doors import Doors
from gateway.pipeline import Pipeline
from gateway.runtime import Runtime


@dataclass(slots=True)
class Context:
    """One per worker. `runtime` is replaced whole by a reload."""

    pipeline: Pipeline
    runtime: Runtime
    is_ready: bool = False
    doors: Doors | None = None  # None: there is no queue


class _Entropy:
    """Random digits for ids, fetched from the system for many at a time: a call for each costs more than the id."""

    def __init__(self) -> None:
        self._digits = ""
        self._at = 0

    def hex(self, digits: int) -> str:
        at = self._at
        if at + digits > len(self._digits):
            self._digits, at = os.urandom(4096).hex(), 0
        self._at = end = at + digits
        return self._digits[at:end]


_entropy = _Entropy()


def new_request_id() -> str:
    """Milliseconds, then 80 random bits: nobody guesses another's, and the ledger's key grows at its end.

    In random order a row costs the writer four times as much once the table is large.
    """
    return f"req_{time.time_ns() // 1_000_000:012x}{_entropy.hex(20)}"

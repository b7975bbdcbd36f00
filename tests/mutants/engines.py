"""Broken builds of the supervisor that its tests must catch: what is patched, and with what. Applied in their process."""

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

from local_engine.engine_process import EngineProcess
from local_engine.replica import Replica, State


def kills_by_pid(self: EngineProcess) -> None:
    """The process that was started, and not its group."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(self.pid, signal.SIGKILL)


async def drains_as_a_candidate(self: Replica) -> State:
    """Waits for the requests to end while new ones keep coming."""
    await self._drained(self.plan.drain_timeout_s)
    return "stopping"


async def takes_health_for_readiness(self: Replica) -> State:
    """An engine that answers `/health` is sent requests."""
    return "ready"


MUTANTS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "kills_by_pid": (EngineProcess, "kill", kills_by_pid),
    "drains_as_a_candidate": (Replica, "_draining", drains_as_a_candidate),
    "takes_health_for_readiness": (Replica, "_probing", takes_health_for_readiness),
}

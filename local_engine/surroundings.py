"""What a replica is surrounded by, as it needs it: processes, probes, candidates, the clock.

Owns the seams between deciding (`replica`, `supervisor`) and doing (`engine_process`, `probing`, the gateway). A test puts
a script behind each.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from local_engine.plan import ReplicaPlan
from local_engine.start_causes import Cause


class Process(Protocol):
    """An engine's processes."""

    @property
    def pid(self) -> int: ...
    async def wait(self) -> int | None:
        """The exit code; None where nobody could see it."""

    def terminate(self) -> None: ...
    def kill(self) -> None:
        """The whole group."""

    async def observe(self) -> None:
        """Remember what must be cleaned up after its end."""

    def tail(self) -> str:
        """The end of its log."""

    async def clean(self) -> None:
        """After its end: nothing of it is left."""


class Launcher(Protocol):
    """Where processes come from."""

    def adopt(self, plan: ReplicaPlan) -> Process | None: ...
    async def launch(self, plan: ReplicaPlan) -> Process:
        """OSError: the system cannot."""


class Work(NamedTuple):
    """What an engine has to do and has done: `requests` there, `steps` computed since its start, both by its label."""

    requests: int
    steps: float


class Prober(Protocol):
    """How an engine is spoken to. Nothing here raises."""

    async def is_up(self, plan: ReplicaPlan) -> bool: ...
    async def generate(self, plan: ReplicaPlan) -> str:
        """One token; empty: it came, else why not."""

    async def work(self, plan: ReplicaPlan) -> Mapping[str, Work] | None:
        """By engine label; None: no answer."""

    async def sleep(self, plan: ReplicaPlan) -> bool: ...
    async def wake(self, plan: ReplicaPlan) -> bool: ...


class Rotation(Protocol):
    """The candidates of all workers."""

    def open(self, plan: ReplicaPlan) -> None: ...
    def close(self, plan: ReplicaPlan) -> None: ...
    async def in_flight(self, plan: ReplicaPlan) -> int | None:
        """Requests at its endpoints; None: not known."""


class Clock(Protocol):
    def now(self) -> float: ...
    async def sleep(self, seconds: float) -> None: ...


class Event(NamedTuple):
    """Something an operator may want to know. `kind`: ready, died, start_failed, hung, crash_looped, cut."""

    kind: str
    replica: str
    cause: Cause | None = None


class Surroundings(NamedTuple):
    """What replicas share."""

    launcher: Launcher
    prober: Prober
    rotation: Rotation
    clock: Clock
    starts: asyncio.Semaphore
    tell: Callable[[Event], None]

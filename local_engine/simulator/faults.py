"""Failures on demand, for tests of whoever fronts the simulator.

Owns the names of the faults, what each does to an answer, and the list of those still to come. A fault is named by
the `x-sim-fault` header of a request or queued through `POST /sim/fault`; a condition is the whole engine's, and is
set through `POST /sim/condition`. All of it only exists with `--allow-faults`. Knows no dialect.
"""

import asyncio
import os
import re
import signal
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec
from aiohttp import web

from local_engine.simulator.driver import EngineStoppedError
from local_engine.simulator.generation import ApiError, refuse

_FAULT: Final = re.compile(
    r"(?P<kind>status|hang_after|reset_after|error_event_after|slow)=(?P<number>\d{1,6})|(?P<plain>hang|reset|exit)"
)
# Closing with unsent data thrown away: the peer sees a reset, not an end.
_NO_LINGER: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` with its number: a status, a count of events, or for `slow` milliseconds before each event."""

    kind: str
    number: int = 0

    @classmethod
    def parse(cls, text: str) -> "Fault":
        found = _FAULT.fullmatch(text.strip())
        if found is None:
            raise refuse(
                f"{text!r} is not a fault. Use status=N, hang, hang_after=N, reset, reset_after=N, "
                "error_event_after=N, slow=MS or exit.",
                "x-sim-fault",
            )
        if found["plain"]:
            return cls(found["plain"])
        fault = cls(found["kind"], int(found["number"]))
        if fault.kind == "status" and not 400 <= fault.number <= 599:
            raise refuse("status= takes an error status, 400 to 599.", "x-sim-fault")
        return fault

    async def before_answer(self, request: web.BaseRequest, *, is_streamed: bool) -> None:
        """Act before a byte of the answer."""
        if self.kind == "status":
            raise ApiError(self.number, "A fault was asked for.")
        if self.kind == "error_event_after" and not is_streamed:
            raise EngineStoppedError("A fault was asked for.")
        if self.kind == "hang":
            await forever()
        if self.kind == "reset":
            await reset(request)

    async def before_event(self, request: web.BaseRequest, sent: int) -> None:
        """Act when `sent` events of a stream have gone out. An unstreamed answer counts as two halves."""
        if self.kind == "slow":
            await asyncio.sleep(self.number / 1000)
        elif self.kind == "exit" or sent < self.number:
            return
        elif self.kind == "hang_after":
            await forever()
        elif self.kind == "reset_after":
            await reset(request)
        elif self.kind == "error_event_after":
            raise EngineStoppedError("A fault was asked for.")

    async def deliver(
        self, request: web.BaseRequest, parts: list[bytes], write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Write the parts of an unstreamed answer, failing on the way."""
        for sent, part in enumerate(parts):
            await self.before_event(request, sent)
            await write(part)
        if self.kind == "exit":
            os.kill(os.getpid(), signal.SIGKILL)  # the answer is out, and nothing more will be


class Condition(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How the engine as a whole is; each request of `/sim/condition` says all of it."""

    slowness: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0
    metrics: Literal["live", "stale", "gone"] = "live"
    forget: bool = False  # drop the prefix cache now, as a restart does


class FaultQueue:
    """Faults for the next requests that name none themselves."""

    def __init__(self) -> None:
        self._fault: Fault | None = None
        self._left: int | None = None

    def set(self, fault: Fault | None, count: int | None) -> None:
        """Apply `fault` to the next `count` requests, or to all until it is set to None."""
        self._fault, self._left = fault, count

    def take(self) -> Fault | None:
        if self._left is not None:
            if self._left <= 0:
                return None
            self._left -= 1
        return self._fault


async def forever() -> None:
    """Until the client leaves, which cancels the handler."""
    await asyncio.Event().wait()


async def reset(request: web.BaseRequest) -> None:
    transport = request.transport
    if transport is not None:
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        transport.abort()
    await forever()

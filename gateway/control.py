"""The channel between the parent and a worker: typed messages over a socket pair.

Owns the messages and their framing (four bytes of length, then MessagePack). Refuses to know what anybody does
with them. The configuration, secrets included, reaches a worker this way only: never by argv or environment.
When one end dies the other sees the channel close; that is how no worker outlives its parent.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any, Final, cast

import msgspec

MAX_MESSAGE_BYTES: Final = 64 << 20
# Beyond this the other end is not reading: periodic reports are left out rather than piled up.
CONGESTED_BYTES: Final = 1 << 20
_LENGTH: Final = struct.Struct("!I")


class Configure(msgspec.Struct, tag=True):
    """Parent to worker, first and once: build the application from this."""

    config: bytes


class Reload(msgspec.Struct, tag=True):
    """Parent to worker: swap in this configuration, which the parent has validated. Answered by `Reloaded`."""

    number: int
    config: bytes


class Drain(msgspec.Struct, tag=True):
    """Parent to worker: stop accepting after `pre_stop_s`, let what is open end within `timeout_s`, then exit.

    A second one replaces the first: a shorter timeout cuts a drain short. `is_shutdown` is False when only this
    worker is rotated out: the service as a whole stays ready.
    """

    timeout_s: float
    pre_stop_s: float = 0.0
    is_shutdown: bool = True


class Report(msgspec.Struct, tag=True):
    """Parent to worker: send your `Metrics` now."""

    number: int


class Ready(msgspec.Struct, tag=True):
    """Worker to parent: accepting connections."""


class Failed(msgspec.Struct, tag=True):
    """Worker to parent: cannot start, and why, as a sentence for the operator."""

    message: str


class Reloaded(msgspec.Struct, tag=True):
    """Worker to parent: `error` is empty when the new configuration is in force."""

    number: int
    error: str = ""


class Heartbeat(msgspec.Struct, tag=True):
    """Worker to parent, every second: proof of a loop that turns."""

    loop_lag_s: float  # the worst since the last heartbeat
    open_connections: int


class Samples(msgspec.Struct):
    """One metric family as a worker counted it: label values -> a number, or a histogram's counts and sum.

    A histogram has one count for each bound, one for what is beyond the last, and the sum of the values.
    """

    kind: str  # counter | gauge | histogram
    help: str
    labels: list[str]
    samples: list[tuple[list[str], int | float | list[int | float]]]
    bounds: list[float] = []


Snapshot = dict[str, Samples]


class Metrics(msgspec.Struct, tag=True):
    """Worker to parent: all that was counted since the worker started. `number` is 0 when nobody asked."""

    snapshot: Snapshot
    number: int = 0


class EndpointState(msgspec.Struct, tag=True):
    """Worker to parent: what it now thinks of an endpoint, by its name; the parent passes it on to the other workers.

    `state` is a `policies.health.endpoint.State`; `for_s` is how long it is out at least.
    """

    endpoint: str
    state: str
    reason: str = ""
    for_s: float = 0.0


class Probed(msgspec.Struct, tag=True):
    """Parent to worker: what came of looking at an endpoint. `is_trial`: it was asked to generate, or what stands for it."""

    endpoint: str
    reason: str  # empty: all is well
    is_trial: bool = False


class Scraped(msgspec.Struct, tag=True):
    """Parent to worker: an engine's own figures, of this moment; not to be believed after `fresh_s`."""

    endpoint: str
    running: int
    waiting: int
    kv_usage: float
    fresh_s: float


class Membership(msgspec.Struct, tag=True):
    """Parent to worker: whether an endpoint of a pool that Headgate runs takes requests. Its engine may be starting,
    draining or asleep, and stays in the pool meanwhile: a session that lives there comes back to it."""

    endpoint: str
    is_open: bool


class CountInFlight(msgspec.Struct, tag=True):
    """Parent to worker: how many requests do you have at these endpoints? Answered by `InFlight`.

    What was told before on this channel is in force when they are counted.
    """

    number: int
    endpoints: list[str]


class InFlight(msgspec.Struct, tag=True):
    """Worker to parent: the sum."""

    number: int
    requests: int


class Wanted(msgspec.Struct, tag=True):
    """Worker to parent: somebody waits for this pool, of which no endpoint takes requests."""

    pool: str


class BlocksHeld(msgspec.Struct, tag=True):
    """Parent to worker: blocks that an engine's cache now has or lacks, by the names of `backends.kv_blocks`.

    The endpoint is named by its `hash_key`, which no reload gives to another. Names are 64-bit integers in the
    machine's own order. `is_reset`: what was told of it before is void.
    """

    endpoint: bytes
    added: bytes = b""
    removed: bytes = b""
    is_reset: bool = False
    is_followed: bool = True
    is_partial: bool = False
    block_size: int = 0
    adapters: list[str] = []


class Draw(msgspec.Struct, tag=True):
    """Parent to worker: whether jobs are to be drawn from the queue from now on."""

    is_on: bool


class Drained(msgspec.Struct, tag=True):
    """Worker to parent, last: everything is settled and flushed. `cut` requests did not end by themselves."""

    cut: int = 0


OfHealth = EndpointState | Probed | Scraped | Membership
OfEndpoint = OfHealth | BlocksHeld
Told = EndpointState | Wanted
ToWorker = Configure | Reload | Drain | Report | Draw | CountInFlight | OfEndpoint
ToParent = Ready | Failed | Reloaded | Heartbeat | Metrics | InFlight | Told | Drained


class Channel(asyncio.Protocol):
    """One end. `accepts` is the union of messages the other end may send; anything else closes the channel."""

    def __init__(self, accepts: Any, on_message: Callable[[Any], None], on_close: Callable[[], None]) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(accepts)
        self._encoder = msgspec.msgpack.Encoder()
        self._on_message = on_message
        self._on_close = on_close
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    @property
    def is_congested(self) -> bool:
        return self._transport is not None and self._transport.get_write_buffer_size() > CONGESTED_BYTES

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message; when the other end is gone it is dropped, and `on_close` has been or will be called."""
        if self._transport is None or self._transport.is_closing():
            return
        payload = self._encoder.encode(message)
        self._transport.write(_LENGTH.pack(len(payload)) + payload)

    def close(self) -> None:
        """Send what is queued, then close."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not an isinstance: uvloop's transports do not derive from asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            end = _LENGTH.size + size
            if size > MAX_MESSAGE_BYTES:
                self._abort()
                return
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                message = self._decoder.decode(payload)
            except msgspec.MsgspecError:
                self._abort()
                return
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc  # any end of the channel is the end of the other side
        self._on_close()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def open_channel(
    sock: socket.socket, accepts: Any, on_message: Callable[[Any], None], on_close: Callable[[], None]
) -> Channel:
    """Take over one end of a socket pair. Both callbacks run on the event loop; `on_close` exactly once."""
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    _, channel = await loop.create_unix_connection(lambda: Channel(accepts, on_message, on_close), sock=sock)
    return channel

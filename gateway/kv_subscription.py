"""A subscription to one publisher of KV events, over ZeroMQ.

Needs the optional `pyzmq` (`pip install 'headgate[kv-events]'`), so nothing imports this module at start-up:
`gateway.kv_feeds` loads it where events are followed. Owns the sockets; what messages mean is `backends.kv_stream`'s.
Frames and replay: vLLM `distributed/kv_events.py`.
"""

import asyncio
from types import TracebackType
from typing import Any, Final

import zmq
import zmq.asyncio

from backends.kv_stream import Message

_REPLAY_S: Final = 5.0
_WAIT_MS: Final = 500
_HIGH_WATER: Final = 100_000
_END: Final = (-1).to_bytes(8, "big", signed=True)
_MOST_AT_ONCE: Final = 256
_GONE: Final = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED


class Subscription:
    """Open from `async with` on. `is_bound`: the publisher connects to us, not we to it."""

    def __init__(self, endpoint: str, replay: str | None, topic: str, *, is_bound: bool) -> None:
        self._endpoint = endpoint
        self._replay = replay
        self._topic = topic.encode()
        self._is_bound = is_bound
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.SUB)
        self._monitor: Any = None
        self._poller = zmq.asyncio.Poller()
        self.is_lost = False

    @property
    def can_repeat(self) -> bool:
        return self._replay is not None

    async def __aenter__(self) -> "Subscription":
        """OSError if there is no such address here."""
        socket = self._socket
        socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
        socket.setsockopt(zmq.SUBSCRIBE, self._topic)
        socket.setsockopt(zmq.LINGER, 0)
        self._monitor = socket.get_monitor_socket(_GONE)
        self._poller.register(socket, zmq.POLLIN)
        if self._is_bound:
            socket.bind(self._endpoint)
        else:
            self._poller.register(self._monitor, zmq.POLLIN)
            socket.connect(self._endpoint)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.disable_monitor()
        self._context.destroy(linger=0)

    async def received(self) -> list[Message]:
        """What came, in order; nothing if nothing came for a while. `is_lost` says when the publisher went."""
        ready = dict(await self._poller.poll(_WAIT_MS))
        if self._monitor in ready:
            self.is_lost = True
        found: list[Message] = []
        if self._socket in ready:
            try:
                while len(found) < _MOST_AT_ONCE:
                    message = _message(await self._socket.recv_multipart(zmq.NOBLOCK))
                    if message is not None:
                        found.append(message)
            except zmq.Again:
                pass
        return found

    async def repeated(self, first: int) -> list[Message] | None:
        """Everything the publisher still has from number `first` on; None if it does not answer."""
        if self._replay is None:
            return None
        socket: zmq.asyncio.Socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        found: list[Message] = []
        try:
            socket.connect(self._replay)
            async with asyncio.timeout(_REPLAY_S):
                await socket.send_multipart([b"", first.to_bytes(8, "big")])
                while True:
                    frames = await socket.recv_multipart()
                    if frames[-2:-1] == [_END]:
                        return found
                    message = _message(frames)
                    if message is not None:
                        found.append(message)
        except TimeoutError:
            return None
        finally:
            socket.close()


def _message(frames: list[bytes]) -> Message | None:
    """`[topic, number, payload]`, after an empty frame where it is repeated. None: something else."""
    if len(frames) < 3 or len(frames[-2]) != 8:
        return None
    return Message(int.from_bytes(frames[-2], "big"), frames[-1])

"""A publisher of KV events as vLLM's is, with the faults that tests want: lost messages, a short memory, sudden ends."""

import threading
import time
from collections import deque
from typing import Any

import msgspec
import zmq

_END = (-1).to_bytes(8, "big", signed=True)


class Publisher:
    """Binds on a thread of its own, like vLLM's. `keeps` messages can be repeated; with `replay` None, none."""

    def __init__(
        self, endpoint: str, replay: str | None = None, *, keeps: int = 1000, connects: bool = False
    ) -> None:
        self.endpoint, self.replay = endpoint, replay
        self.numbers = 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=keeps)
        self._queue: deque[tuple[list[Any], bool]] = deque()
        self._connects = connects
        self._is_over = threading.Event()
        self._is_bound = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._is_bound.wait(30)

    def publish(self, *events: Any, is_lost: bool = False) -> None:
        """One message of these events; a lost one can only be had again by replay."""
        self._queue.append((list(events), is_lost))
        deadline = time.monotonic() + 30
        while self._queue:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join(30)

    def _run(self) -> None:
        context = zmq.Context()
        publisher, router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
        (publisher.connect if self._connects else publisher.bind)(self.endpoint)
        self.endpoint = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
        if self.replay is not None:
            router.bind(self.replay)
            self.replay = router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._is_bound.set()
        while not self._is_over.is_set():
            if self.replay is not None and router.poll(0):
                self._repeat(router)
            if not self._queue:
                time.sleep(0.001)
                continue
            events, is_lost = self._queue[0]
            payload = msgspec.msgpack.encode([time.time(), events, 0])
            self._kept.append((self.numbers, payload))
            if not is_lost:
                publisher.send_multipart([b"kv", self.numbers.to_bytes(8, "big"), payload])
            self.numbers += 1
            self._queue.popleft()
        context.destroy(linger=0)

    def _repeat(self, router: zmq.Socket[bytes]) -> None:
        client, _, first = router.recv_multipart()
        for number, payload in list(self._kept):
            if number >= int.from_bytes(first, "big"):
                router.send_multipart([client, b"", b"kv", number.to_bytes(8, "big"), payload])
        router.send_multipart([client, b"", b"", _END, b""])

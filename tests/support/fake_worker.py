"""A worker of the real kind around a tiny application, so that processes can be tested without the stack.

Answers: `/` its name and configuration, `/stream?n` n chunks of 50 ms each, `/crash` by dying, `/hang` by
blocking its loop. Refuses to start when the configuration's first key is named `refuse`.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

from gateway.control import Membership
from gateway.worker import main

CHUNK_S = 0.05


class Connection(asyncio.Protocol):
    def __init__(self, app: "FakeApp") -> None:
        self.app = app

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.app.connections.add(self)
        self.task = None
        self.is_closing = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.app.connections.discard(self)
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        for line in data.split(b"\r\n"):
            if line.startswith(b"GET "):
                self.answer(line.split(b" ")[1].decode())

    def answer(self, path: str) -> None:
        self.app.requests += 1
        if path == "/crash":
            os._exit(7)
        if path == "/hang":
            time.sleep(60)
        if path.startswith("/stream?"):
            self.task = asyncio.ensure_future(self.stream(int(path.partition("?")[2])))
            return
        if path == "/fds":
            self.respond(
                " ".join(
                    sorted(
                        os.readlink(f"/proc/self/fd/{fd}")
                        for fd in os.listdir("/proc/self/fd")
                        if os.path.lexists(f"/proc/self/fd/{fd}")
                    )
                )
            )
            return
        status = "503 Not Ready" if path == "/readyz" and not self.app.is_ready else "200 OK"
        self.respond(f"{self.app.name} {os.getpid()} {self.app.label}", status)

    def respond(self, text: str, status: str = "200 OK") -> None:
        close = "connection: close\r\n" if self.app.is_draining else ""
        head = f"HTTP/1.1 {status}\r\ncontent-length: {len(text.encode())}\r\n{close}\r\n"
        self.transport.write(head.encode() + text.encode())
        if self.app.is_draining:
            self.transport.close()

    async def stream(self, chunks: int) -> None:
        self.app.streams.add(self)
        try:
            self.transport.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
            for number in range(chunks):
                await asyncio.sleep(CHUNK_S)
                if self.app.is_cutting:
                    self.transport.write(b"cut\n")
                    self.app.cut += 1
                    return
                self.transport.write(b"%d\n" % number)
            self.transport.write(b"end\n")
        finally:
            self.transport.close()
            self.app.streams.discard(self)


class FakeApp:
    def __init__(self, config, worker, telemetry, access_log) -> None:
        self.config = config
        self.name = worker
        self.label = config.keys[0].name if config.keys else "-"
        self.connections: set[Connection] = set()
        self.streams: set[Connection] = set()
        self.is_ready = True
        self.is_draining = self.is_cutting = False
        self.requests = self.cut = 0
        self.heard = None
        telemetry.watch("fake_requests_total", "counter", "Requests.", lambda: self.requests)
        telemetry.watch("fake_connections", "gauge", "Connections.", lambda: len(self.connections))

    @property
    def open_connections(self) -> int:
        return len(self.connections)

    def server(self) -> Connection:
        return Connection(self)

    def attach(self, tell) -> None:
        self.tell = tell

    def hear(self, word) -> None:
        self.heard = word

    def in_flight(self, endpoints: list[str]) -> int:
        """Streams stand for requests, until a word says that the endpoint is closed."""
        is_closed = isinstance(self.heard, Membership) and not self.heard.is_open
        return 0 if is_closed or endpoints != ["gpu/0"] else len(self.streams)

    async def start(self) -> None:
        if self.label == "refuse":
            raise ValueError("The configuration is not to this application's taste.")
        if self.label == "bug":
            raise RuntimeError("sk-secret")

    def reload(self, config) -> None:
        if config.keys and config.keys[0].name == "refuse":
            raise RuntimeError("sk-secret")
        self.label = config.keys[0].name if config.keys else "-"

    def unready(self) -> None:
        self.is_ready = False

    def announce_drain(self) -> None:
        self.is_draining = True

    async def drain(self, timeout_s: float) -> int:
        self.is_draining = True
        for connection in list(self.connections - self.streams):
            connection.transport.close()
        deadline_at = time.monotonic() + timeout_s
        while self.streams and time.monotonic() < deadline_at:
            await asyncio.sleep(0.01)
        self.is_cutting = True
        while self.streams:
            await asyncio.sleep(0.01)
        return self.cut

    async def stop(self) -> None:
        note = os.environ.get("FAKE_WORKER_NOTES")
        if note:
            Path(note, self.name).write_text(f"{self.requests} {self.cut}")


if __name__ == "__main__":
    sys.exit(main(sys.argv, FakeApp))

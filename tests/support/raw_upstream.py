"""A scripted server that sends exact bytes, for tests of what speaks to upstreams.

Each connection is handed to a script with a `Peer`. Nothing here understands HTTP beyond the end of a request.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from typing import Self


class Peer:
    """The server's side of one connection. `number` counts connections from 1."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self._reader = reader
        self._writer = writer

    async def head(self) -> bytes:
        """A request head with its blank line; EOFError (IncompleteReadError) when the client is gone."""
        return await self._reader.readuntil(b"\r\n\r\n")

    async def request(self) -> bytes:
        """A whole request, its body by content-length."""
        head = await self.head()
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                return head + await self._reader.readexactly(int(line.partition(b":")[2]))
        return head

    async def read(self, size: int) -> bytes:
        return await self._reader.readexactly(size)

    def send(self, *data: bytes) -> None:
        self._writer.write(b"".join(data))

    async def drain(self) -> None:
        await self._writer.drain()

    async def gone(self) -> None:
        """Returns when the client has closed or reset the connection."""
        with contextlib.suppress(OSError):
            while await self._reader.read(65536):
                pass

    def close(self) -> None:
        self._writer.close()

    def cut(self) -> None:
        """FIN without whatever TLS would say before it."""
        self._writer.transport.abort()

    def reset(self) -> None:
        """RST: what is in flight is lost."""
        linger = struct.pack("ii", 1, 0)
        raw = self._writer.get_extra_info("socket")
        with socket.socket(fileno=socket.dup(raw.fileno())) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """From here on the connection is a TLS server's."""
        await self._writer.start_tls(context)

    @property
    def streams(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return self._reader, self._writer


Script = Callable[[Peer], Awaitable[None]]


class RawUpstream:
    """`async with RawUpstream(script) as upstream:`; a script's failure is raised on leaving."""

    def __init__(self, script: Script, *, tls: ssl.SSLContext | None = None) -> None:
        self._script = script
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: list[Exception] = []
        self.connections = 0
        self.open_connections = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://localhost:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        if self._failures:
            raise self._failures[0]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open_connections += 1
        try:
            await self._script(Peer(self.connections, reader, writer))
        except (asyncio.IncompleteReadError, OSError):
            pass  # the client went away, as many tests want it to
        except asyncio.CancelledError:
            pass  # the test is over
        except Exception as error:
            self._failures.append(error)
        finally:
            self.open_connections -= 1
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()


def answering(*answers: bytes) -> Script:
    """Answers the n-th request of every connection with the n-th bytes, then waits for the client to go."""

    async def script(peer: Peer) -> None:
        for answer in answers:
            await peer.request()
            peer.send(answer)
        await peer.gone()

    return script


def always(answer: bytes) -> Script:
    """Answers every request of every connection with the same bytes."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            peer.send(answer)

    return script


def sized(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    """A content-length answer."""
    fields = [b"HTTP/1.1 " + status, b"content-length: %d" % len(body), *headers]
    return b"\r\n".join(fields) + b"\r\n\r\n" + body


def chunked_head(*headers: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", b"transfer-encoding: chunked", *headers]) + b"\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"

"""The inbound server on a real socket, with raw clients: what the tests of `gateway.inbound` stand on."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from gateway.inbound import Limits, Request, Server
from tests.support.rawcli import RawClient

POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n"


def post(body: bytes = b"{}", *fields: bytes) -> bytes:
    lines = b"".join(field + b"\r\n" for field in fields)
    return POST + lines + b"content-length: %d\r\n\r\n" % len(body) + body


def chunked(*chunks: bytes) -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return POST + b"transfer-encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


def refuse(status: int, code: str, message: str, path: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    body = {"error": {"code": code, "message": message, "path": path.decode()}}
    headers = [(b"content-type", b"application/json"), (b"x-request-id", b"req_edge")]
    return headers, json.dumps(body).encode()


async def echo(request: Request) -> None:
    """Says what it received."""
    body = await request.body()
    told = f"{request.method} {request.path} {request.query} {len(body)} ".encode() + body
    request.respond(200, [(b"content-type", b"text/plain")], told)


class Edge:
    """A running server; `journal` is for handlers to write to."""

    def __init__(self, server: Server, port: int) -> None:
        self.server = server
        self.port = port
        self._clients: list[RawClient] = []

    async def connect(self, **options: object) -> RawClient:
        client = await RawClient.connect(self.port, **options)
        self._clients.append(client)
        return client

    async def exchange(self, *data: bytes):
        """One request on a connection of its own."""
        client = await self.connect()
        answer = await client.exchange(*data)
        client.close()
        return answer

    def close_clients(self) -> None:
        for client in self._clients:
            client.close()


@contextlib.asynccontextmanager
async def serving(handle=echo, **limits: float) -> AsyncIterator[Edge]:
    """Fails when a connection or a handler is left over at the end."""
    server = Server(handle, refuse, Limits(**limits))
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    edge = Edge(server, listener.sockets[0].getsockname()[1])
    try:
        yield edge
    finally:
        edge.close_clients()
        listener.close()
        left = await server.wait_closed(5.0)
        server.abort_all()
        await server.wait_closed(1.0)
    assert left == 0, f"{left} connections were left over"


class Journal:
    """What happened in handlers, in order; tests wait for it instead of sleeping."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._changed = asyncio.Event()

    def note(self, event: str) -> None:
        self.events.append(event)
        self._changed.set()

    async def until(self, event: str, timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            while event not in self.events:
                self._changed.clear()
                await self._changed.wait()

"""A fake provider that says exactly what a test scripts, fails exactly where it is told to, and remembers everything.

`ScriptedUpstream` serves `Answer`s by path (and model or header) on a free loopback port, and keeps a journal: what
was asked, byte for byte, how much of the answer went out, and when the peer vanished. What is not scripted is answered
from the catalogue. `python -m tests.support.scripted_upstream --port N` runs it as a process, whose journal is told
by `GET /journal`.
"""

import argparse
import asyncio
import contextlib
import json
import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import httptools

from tests.support.catalogue import answer_for
from tests.support.scripted_answer import Answer, Cut, Gate, Hang, Part, Pause, Reset

__all__ = ["Answer", "Cut", "Gate", "Hang", "Part", "Pause", "Record", "Reset", "Script", "ScriptedUpstream"]

# Longest first: /v1/messages/count_tokens is no message.
DIALECT_PATHS = {
    "/messages/count_tokens": "count_tokens",
    "/chat/completions": "chat",
    "/completions": "completions",
    "/embeddings": "embeddings",
    "/responses": "responses",
    "/messages": "messages",
    "/models": "models",
}
Ended = Literal["complete", "peer gone", "reset", "cut", "open"]


@dataclass(eq=False)
class Record:
    """One request as it came, and what became of its answer. Times are `time.perf_counter()`."""

    number: int
    connection: int  # which connection it came on, counted from 1
    method: str
    target: str  # with the query
    headers: list[tuple[str, str]]  # names as sent, in order
    body: bytes
    received_at: float
    bytes_sent: int = 0  # of the body
    parts_sent: int = 0
    ended: Ended = "open"
    ended_at: float | None = None
    _end: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def dialect(self) -> str | None:
        return next((name for end, name in DIALECT_PATHS.items() if self.path.endswith(end)), None)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def fields(self) -> dict[str, Any]:
        """The body's fields; none if it is not a JSON object."""
        try:
            document = json.loads(self.body)
        except ValueError:
            return {}
        return document if isinstance(document, dict) else {}

    @property
    def model(self) -> str | None:
        return self.fields.get("model")

    def header(self, name: str) -> str | None:
        """The only value; AssertionError if it was sent twice."""
        values = [value for key, value in self.headers if key.lower() == name]
        assert len(values) <= 1, f"{name} was sent {len(values)} times"
        return values[0] if values else None

    async def wait_end(self, timeout_s: float = 30.0) -> Ended:
        """Why the answer ended; TimeoutError if it has not."""
        async with asyncio.timeout(timeout_s):
            await self._end.wait()
        return self.ended

    def end(self, how: Ended) -> None:
        if self.ended == "open":
            self.ended, self.ended_at = how, time.perf_counter()
            self._end.set()

    def summary(self) -> dict[str, Any]:
        """For the journal of a process of its own."""
        names = ("number", "connection", "method", "target", "headers", "bytes_sent", "parts_sent", "ended")
        told = {name: getattr(self, name) for name in names}
        return {**told, "body": self.body.decode(errors="replace")}


Script = Answer | Callable[[Record], Answer]


@dataclass
class _Rule:
    """Answers for what matches: in turn, the last one for ever."""

    key: str
    model: str | None
    header: tuple[str, str] | None
    scripts: list[Script]

    def matches(self, record: Record) -> bool:
        if self.key not in (record.dialect, record.path, "*"):
            return False
        if self.model is not None and record.model != self.model:
            return False
        return self.header is None or self.header in [(name.lower(), value) for name, value in record.headers]


class ScriptedUpstream:
    """The server. Also an async context manager."""

    def __init__(self) -> None:
        self.journal: list[Record] = []
        self.connections = 0  # ever accepted
        self.url = ""
        self._rules: list[_Rule] = []
        self._server: asyncio.Server | None = None
        self._protocols: set[_Connection] = set()
        self._arrivals: list[tuple[int, asyncio.Future[None]]] = []
        self._all_gone = asyncio.Event()

    @classmethod
    async def start(cls, *, port: int = 0, tls: ssl.SSLContext | None = None) -> Self:
        """`url` has no path: dialects are told by how the path ends, so any base path will do."""
        upstream = cls()
        loop = asyncio.get_running_loop()
        upstream._server = await loop.create_server(lambda: _Connection(upstream), "127.0.0.1", port, ssl=tls)
        bound = upstream._server.sockets[0].getsockname()[1]
        upstream.url = f"{'https' if tls else 'http'}://{'localhost' if tls else '127.0.0.1'}:{bound}"
        return upstream

    def script(
        self, key: str, *scripts: Script, model: str | None = None, header: tuple[str, str] | None = None
    ) -> None:
        """Answer requests for `key` (a dialect's name, a whole path, or "*") with these in turn, then the last again.

        With `model` or `header` (lower-case name, value) only those requests. What was scripted last wins.
        """
        assert scripts, "a script needs an answer"
        self._rules.insert(0, _Rule(key, model, header, list(scripts)))

    def clear(self) -> None:
        """Forget scripts and journal."""
        self._rules.clear()
        self.journal.clear()

    async def wait_for(self, count: int = 1, timeout_s: float = 30.0) -> Record:
        """The `count`-th request; TimeoutError if it does not come."""
        if len(self.journal) < count:
            arrival = asyncio.get_running_loop().create_future()
            self._arrivals.append((count, arrival))
            async with asyncio.timeout(timeout_s):
                await arrival
        return self.journal[count - 1]

    def choose(self, record: Record) -> Answer:
        for rule in self._rules:
            if rule.matches(record):
                script = rule.scripts.pop(0) if len(rule.scripts) > 1 else rule.scripts[0]
                return script if isinstance(script, Answer) else script(record)
        return answer_for(record.dialect, record.fields)

    def note(self, record: Record) -> None:
        self.journal.append(record)
        for count, arrival in self._arrivals:
            if len(self.journal) >= count and not arrival.done():
                arrival.set_result(None)

    def joined(self, connection: "_Connection") -> int:
        """A connection came; its number."""
        self._protocols.add(connection)
        self._all_gone.clear()
        self.connections += 1
        return self.connections

    def left(self, connection: "_Connection") -> None:
        self._protocols.discard(connection)
        if not self._protocols:
            self._all_gone.set()

    @property
    def open_connections(self) -> int:
        return len(self._protocols)

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._server is not None:
            self._server.close()
        for protocol in list(self._protocols):
            protocol.drop()
        if self._protocols:
            await self._all_gone.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Connection(asyncio.Protocol):
    """One client connection: requests in order, one answer at a time."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self._upstream = upstream
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""
        self._headers: list[tuple[str, str]] = []
        self._body = b""
        self._waiting: list[Record] = []
        self._current: Record | None = None
        self._task: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._number = self._upstream.joined(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream.left(self)
        if self._current is not None:
            self._current.end("peer gone")
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.write(
                b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            )
            self._transport.close()

    def on_message_begin(self) -> None:
        self._target, self._headers, self._body = b"", [], b""

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        if ("expect", "100-continue") in [(name.lower(), value) for name, value in self._headers]:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        record = Record(
            len(self._upstream.journal) + 1,
            self._number,
            self._parser.get_method().decode(),
            self._target.decode("latin-1"),
            self._headers,
            self._body,
            time.perf_counter(),
        )
        self._waiting.append(record)
        if self._task is None:
            self._task = asyncio.ensure_future(self._serve())

    async def _serve(self) -> None:
        while self._waiting:
            self._current = record = self._waiting.pop(0)
            if record.target == "/journal":
                answer = Answer.of_json([each.summary() for each in self._upstream.journal])
            else:
                if record.target != "/metrics":  # a pool's endpoints are scraped at any time
                    self._upstream.note(record)
                answer = self._upstream.choose(record)
            if not await self._answer(record, answer):
                return
            record.end("complete")
            self._current = None
            if answer.framing in ("close", "raw"):
                self._transport.close()
        self._task = None

    async def _answer(self, record: Record, answer: Answer) -> bool:
        """False once the connection has been broken off."""
        for part in answer.before_head:
            if not await self._send(record, part, chunked=False):
                return False
        if answer.framing != "raw":
            self._transport.write(_head(answer))
        for part in answer.parts:
            if not await self._send(record, part, chunked=answer.framing == "chunked"):
                return False
        if answer.framing == "chunked":
            self._transport.write(b"0\r\n\r\n")
        return True

    async def _send(self, record: Record, part: Part, *, chunked: bool) -> bool:
        match part:
            case bytes():
                await self._writable.wait()
                self._transport.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
                record.bytes_sent += len(part)
                record.parts_sent += 1
                # One write, one packet: the next part must not ride along.
                await asyncio.sleep(0)
            case Pause(seconds):
                await asyncio.sleep(seconds)
            case Gate(event):
                await event.wait()
            case Hang():
                await asyncio.Event().wait()
            case Reset():
                record.end("reset")
                self._reset()
                return False
            case Cut():
                record.end("cut")
                self._transport.close()
                return False
        return True

    def _reset(self) -> None:
        connection = self._transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def drop(self) -> None:
        self._transport.abort()


def _head(answer: Answer) -> bytes:
    lines = [f"HTTP/1.1 {answer.status} Scripted"]
    lines += [f"{name}: {value}" for name, value in answer.headers]
    if answer.framing == "chunked":
        lines.append("transfer-encoding: chunked")
    elif answer.framing == "length":
        length = len(answer.body) if answer.content_length is None else answer.content_length
        lines.append(f"content-length: {length}")
    else:
        lines.append("connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _serve_forever(port: int) -> None:
    async with await ScriptedUpstream.start(port=port) as upstream:
        print(f"scripted upstream ready on {upstream.url}", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A fake provider; pick its answers by model name.")
    parser.add_argument("--port", type=int, default=0)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve_forever(parser.parse_args().port))


if __name__ == "__main__":
    main()

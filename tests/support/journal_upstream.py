"""A fast fake provider in a process of its own, whose journal on disk is the independent witness of the kill tests.

    python -m tests.support.journal_upstream JOURNAL

Says `ready PORT` on standard output. What a request costs and how it is answered is written in the request itself
(`Plan`), so that client, upstream and ledger can be compared without asking each other. Journal lines: `begin ID
SERIAL` once the request is whole, `end ID` once the last byte of its answer was written. ID is the gateway's
x-request-id.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

import httptools
import uvloop

from tests.support import recordings
from tests.support.recordings import Tokens


class Plan(NamedTuple):
    """What one request asks for; its text is the prompt."""

    serial: int
    tokens: Tokens
    pause_ms: int  # before each event of a stream, or before a plain answer

    @property
    def text(self) -> str:
        tokens = self.tokens
        return f"plan {self.serial} {tokens.prompt} {tokens.cached} {tokens.output} {self.pause_ms}"

    @classmethod
    def found_in(cls, body: bytes) -> "Plan":
        match = re.search(rb"plan (\d+) (\d+) (\d+) (\d+) (\d+)", body)
        assert match is not None
        serial, prompt, cached, output, pause_ms = map(int, match.groups())
        return cls(serial, Tokens(prompt, output, cached), pause_ms)


class JournalUpstream:
    """The process, and what its journal says. Used by `with`."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self.url = ""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.support.journal_upstream", str(self._journal)]
        self._process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{self._process.stdout.readline().split()[1].decode()}"
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()

    def begun(self) -> list[tuple[str, int]]:
        """Request id and serial number of every request, in order."""
        return [(line[1], int(line[2])) for line in self._lines() if line[0] == "begin"]

    def finished(self) -> set[str]:
        """Ids of the requests whose answer went out whole."""
        return {line[1] for line in self._lines() if line[0] == "end"}

    def _lines(self) -> list[list[str]]:
        return [line.split() for line in self._journal.read_text().splitlines()]


def answer_parts(path: str, is_stream: bool, tokens: Tokens) -> list[bytes]:
    text = "one two three four five six seven eight nine ten"
    if path.endswith("/chat/completions"):
        if is_stream:
            return recordings.chat_events(text, tokens=tokens)
        return [_json(recordings.chat(text, tokens=tokens))]
    if path.endswith("/responses"):
        if is_stream:
            return recordings.response_events(text, tokens=tokens)
        return [_json(recordings.response(text, tokens=tokens))]
    if path.endswith("/messages"):
        if is_stream:
            return recordings.message_events(text, tokens=tokens)
        return [_json(recordings.message(text, tokens=tokens))]
    assert path.endswith("/embeddings"), path
    return [_json(recordings.embeddings(tokens=tokens.prompt))]


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()


def _answer(body: bytes, kind: bytes = b"text/plain") -> bytes:
    head = b"content-type: %b\r\ncontent-length: %d\r\n\r\n" % (kind, len(body))
    return b"HTTP/1.1 200 OK\r\n" + head + body


def _idle() -> bytes:
    """What an engine with nothing to do says of itself."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return _answer("".join(f"vllm:{name} 0\n" for name in names).encode())


class Connection(asyncio.Protocol):
    """Answers requests in order; there is at most one under way, as the gateway does not pipeline."""

    def __init__(self, journal: int) -> None:
        self._journal = journal
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._target = b""
        self._request_id = b""
        self._body = b""
        self._parts: list[bytes] = []
        self._next: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next is not None:
            self._next.cancel()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._target = self._request_id = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-request-id":
            self._request_id = value

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._parser.get_method() == b"GET":
            self._transport.write(_idle() if self._target.endswith(b"/metrics") else _answer(b""))
            return
        plan = Plan.found_in(self._body)
        os.write(self._journal, b"begin %b %d\n" % (self._request_id, plan.serial))
        is_stream = json.loads(self._body).get("stream", False)
        parts = answer_parts(self._target.decode(), is_stream, plan.tokens)
        if is_stream:
            head = b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            self._parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
            self._parts[0] = b"HTTP/1.1 200 OK\r\n" + head + self._parts[0]
            self._parts[-1] += b"0\r\n\r\n"
        else:
            self._parts = [_answer(parts[0], b"application/json")]
        self._step(plan.pause_ms / 1000)

    def _step(self, pause_s: float) -> None:
        loop = asyncio.get_running_loop()
        if pause_s:
            self._next = loop.call_later(pause_s, self._write, pause_s)
        else:
            self._next = None
            self._write(0.0)

    def _write(self, pause_s: float) -> None:
        part = self._parts.pop(0)
        if not self._parts:
            os.write(self._journal, b"end %b\n" % self._request_id)
        self._transport.write(part)
        if self._parts:
            self._step(pause_s)


async def main(journal: str) -> None:
    descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(descriptor), "127.0.0.1", 0, backlog=1024)
    print(f"ready {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))

"""Structured logs: JSON lines on stderr (text for people on a terminal), by allow-list of fields.

Owns what a log line may hold. A line has a message written in our code and fields named below; never a prompt,
a key, a header or an exception's text, which may quote any of them: of an exception the type and the places it
passed are logged. Nothing blocks: lines go to a bounded buffer that a thread writes out; what does not fit is
counted and told.
"""

import asyncio
import logging
import os
import re
import select
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import orjson

from policies.exchange import Exchange

Style = Literal["auto", "json", "text"]

# The fields a line may have, by `extra={...}`. Every one is bounded, and none is a client's text.
FIELDS: Final = frozenset(
    {
        "address",
        "attempts",
        "child",
        "count",
        "delay_s",
        "duration_ms",
        "endpoint",
        "engine",
        "error_kind",
        "exit_code",
        "key_id",
        "model",
        "path",
        "pid",
        "pool",
        "port",
        "provider",
        "reason",
        "receiver",
        "replicas",
        "request_id",
        "rows",
        "setting",
        "signal",
        "status",
        "timeout_s",
        "version",
        "waiting",
        "was",
        "webhook",
        "worker",
        "workers",
    }
)
MAX_BUFFERED_LINES: Final = 8192
FLUSH_S: Final = 0.1
# A write of at most this many bytes to a pipe is never interleaved with another process's (PIPE_BUF).
_ATOMIC_BYTES: Final = 4096
_OURS: Final = ("gateway", "policies", "backends", "local_engine")
_log: Final = logging.getLogger(__name__)
_ROOT: Final = Path(__file__).resolve().parent.parent


class LineWriter:
    """A bounded buffer of lines and the thread that writes them to a descriptor.

    `put` may be called from any thread and never blocks. When the reader of the descriptor stops reading, lines
    beyond `limit` are dropped and counted.
    """

    def __init__(self, descriptor: int, limit: int = MAX_BUFFERED_LINES) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._limit = limit
        self._lines: deque[bytes] = deque()
        self._wake = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """`line` ends with a newline."""
        if len(self._lines) >= self._limit:
            self.dropped += 1
            return
        self._lines.append(line)
        if not self._wake.is_set():
            self._wake.set()

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what is buffered, waiting at most `timeout_s` for a reader that does not read."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        told = 0
        while True:
            self._wake.wait()
            self._wake.clear()
            if not self._is_closing:
                # Gathers a burst into few writes, and keeps this thread away from the event loop's lock.
                time.sleep(FLUSH_S)
            dropped = self.dropped
            if dropped > told:
                self._lines.append(_dropped_line(dropped - told))
                told = dropped
            try:
                self._write_lines()
            except OSError:
                return  # nobody will ever read them; the buffer fills and the drops are counted
            if self._is_closing and not self._lines:
                return

    def _write_lines(self) -> None:
        lines = self._lines
        while lines:
            batch = lines.popleft()
            while lines and len(batch) + len(lines[0]) <= _ATOMIC_BYTES:
                batch += lines.popleft()
            self._write(batch)

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                # Another process made the terminal or pipe we share non-blocking.
                select.select([], [self._descriptor], [], 1.0)


class AccessLog:
    """One line for each request, when the operator wants them."""

    __slots__ = ("_render", "_writer", "is_on")

    def __init__(self, writer: LineWriter | None, render: "Render") -> None:
        self.is_on = writer is not None
        self._writer = writer
        self._render = render

    def write(self, exchange: Exchange) -> None:
        if self._writer is not None:
            self._writer.put(self._render("INFO", "access", "request", _access_fields(exchange)))


class Logs:
    """The process's logging, between `start_logging` and `close`."""

    def __init__(self, writer: LineWriter, render: "Render", *, has_access: bool) -> None:
        self.access = AccessLog(writer if has_access else None, render)
        self._writer = writer

    @property
    def dropped(self) -> int:
        """Lines that were not written because nobody read the others."""
        return self._writer.dropped

    def close(self) -> None:
        self._writer.close()


Render = Callable[[str, str, str, Mapping[str, Any]], bytes]


def start_logging(level: str, style: Style, *, source: str, has_access: bool, descriptor: int = 2) -> Logs:
    """Send what the standard library's loggers get in this process through one writer. `source` names the process.

    Level WARNING and up of other libraries, `level` and up of ours.
    """
    is_text = style == "text" or (style == "auto" and os.isatty(descriptor))
    render = _text if is_text else _json
    writer = LineWriter(descriptor)
    root = logging.getLogger()
    root.handlers[:] = [_Handler(writer, render, source)]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())
    return Logs(writer, render, has_access=has_access)


def watch_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Unhandled errors of callbacks and tasks: asyncio's own report would print their arguments."""

    def report(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        _log.error(_words(context.get("message", "")), exc_info=context.get("exception"))

    loop.set_exception_handler(report)


class _Handler(logging.Handler):
    """Records of our loggers whole, those of other libraries without their arguments."""

    def __init__(self, writer: LineWriter, render: Render, source: str) -> None:
        super().__init__()
        self._writer = writer
        self._render = render
        self._source = source

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {}
        if record.name.split(".", 1)[0] in _OURS:
            message = record.getMessage()
            fields = {name: value for name, value in vars(record).items() if name in FIELDS}
        else:
            template = str(record.msg)
            message = f"{record.name}: {template if record.args else _words(template)}"
        if record.exc_info and record.exc_info[1] is not None:
            fields |= _error_fields(record.exc_info[1])
        self._writer.put(self._render(record.levelname, self._source, message, fields))


def _access_fields(exchange: Exchange) -> dict[str, Any]:
    caller = exchange.caller
    candidate = exchange.candidate
    usage = exchange.usage
    received_at = exchange.received_at
    cost_nanousd = exchange.cost_nanousd
    return {
        "request_id": exchange.request_id,
        "key_id": caller.key_id if caller is not None else None,
        "team": caller.team if caller is not None else None,
        "dialect": exchange.dialect.name,
        # The catalog's name: what the client wrote there may be anything.
        "model": exchange.model.name if exchange.model is not None else None,
        "endpoint": candidate.endpoint.name if candidate is not None else None,
        "stream": exchange.is_stream,
        "session": exchange.session_state,
        "status": exchange.status,
        "ended": exchange.ended,
        "error_kind": exchange.error_kind or None,
        "attempts": exchange.attempts,
        "prompt_tokens": usage.prompt_tokens if usage is not None else None,
        "cached_tokens": usage.cache_read_tokens if usage is not None else None,
        "output_tokens": usage.output_tokens if usage is not None else None,
        "cost_usd": cost_nanousd / 1e9 if cost_nanousd is not None else None,
        "first_byte_us": int((exchange.relayed_at - received_at) * 1e6) if exchange.relayed_at else None,
        "duration_us": int((exchange.ended_at - received_at) * 1e6),
        "overhead_us": int(exchange.overhead_s * 1e6),
    }


def _error_fields(error: BaseException) -> dict[str, Any]:
    """Type and places; the text only where it is the operating system's own."""
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    fields: dict[str, Any] = {"error": type(error).__qualname__}
    if isinstance(error, OSError) and error.strerror:
        fields["error_text"] = error.strerror
    return fields | {"at": [f"{_place(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames]}


def _place(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else "/".join(path.parts[-2:])


def _words(text: str) -> str:
    """The plain words a text begins with: what comes after may be the repr of anything."""
    match = re.match(r"[A-Za-z ,.!'-]+", text)
    return match[0].strip() if match else "error"


def _json(level: str, source: str, message: str, fields: Mapping[str, Any]) -> bytes:
    line = {"time": _now(), "level": level, "source": source, "message": message, **fields}
    return orjson.dumps(line, default=str, option=orjson.OPT_APPEND_NEWLINE)


def _text(level: str, source: str, message: str, fields: Mapping[str, Any]) -> bytes:
    told = " ".join(f"{name}={_plain(value)}" for name, value in fields.items() if value not in (None, ""))
    line = f"{time.strftime('%H:%M:%S')} {level:7} {source:9} {message}"
    return f"{line}  {told}\n".encode() if told else f"{line}\n".encode()


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    # A line stays a line, whatever is in a field.
    return text if text.isprintable() and " " not in text else orjson.dumps(text).decode()


_last_second: tuple[int, str] = (0, "")


def _now() -> str:
    """UTC, RFC 3339 with milliseconds; the date part is made once a second."""
    global _last_second  # noqa: PLW0603 - a cache of one value; formatting the date costs more than the line
    now = time.time()
    second = int(now)
    cached, text = _last_second
    if cached != second:
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        _last_second = (second, text)
    return f"{text}.{int((now - second) * 1000):03d}Z"


def _dropped_line(count: int) -> bytes:
    return _json("WARNING", "log", "log lines were dropped: stderr is read too slowly", {"count": count})

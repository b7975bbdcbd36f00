import asyncio
import contextlib
import io
import logging
import os
import pty
import threading
import time
from types import SimpleNamespace

import orjson
import pytest

from backends.dialect import CHAT
from backends.usage import Usage
from gateway.logs import FIELDS, LineWriter, Logs, start_logging, watch_loop
from policies.exchange import Caller, Exchange

CANARY = "sk-canary-7f3a"


class Pipe:
    """A descriptor to log to, and what came out of it."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def read(self) -> str:
        os.close(self.writer)
        with open(self.reader, encoding="utf-8") as file:
            return file.read()


@contextlib.contextmanager
def logging_to(pipe: Pipe, style="json", level="DEBUG", *, has_access=True):
    """Leaves the process's loggers as they were: pytest has handlers of its own."""
    root = logging.getLogger()
    kept = root.handlers[:], root.level
    logs = start_logging(level, style, source="worker-1", has_access=has_access, descriptor=pipe.writer)
    try:
        yield logs
    finally:
        logs.close()
        root.handlers[:], level_before = kept
        root.setLevel(level_before)
        for name in ("gateway", "policies", "backends", "local_engine"):
            logging.getLogger(name).setLevel(logging.NOTSET)


def lines_of(pipe: Pipe) -> list[dict]:
    return [orjson.loads(line) for line in pipe.read().splitlines()]


def an_exchange() -> Exchange:
    exchange = Exchange("req_1", CHAT, 100.0, time.time())
    exchange.caller = Caller("k_1", "my key", team="ml")
    exchange.model_name = CANARY
    exchange.model = SimpleNamespace(name="demo")
    exchange.candidate = SimpleNamespace(endpoint=SimpleNamespace(name="demo/0"))
    exchange.is_stream = True
    exchange.read_at, exchange.dispatched_at = 100.0001, 100.0003
    exchange.ready_at, exchange.relayed_at = 100.5, 100.5001
    exchange.end(101.25)
    exchange.status, exchange.ended, exchange.attempts = 200, "completed", 1
    exchange.usage = Usage(input_tokens=10, cache_read_tokens=90, output_tokens=5)
    exchange.cost_nanousd = 1_250_000
    return exchange


def test_a_line_is_json_with_time_level_source_message_and_the_allowed_fields():
    pipe = Pipe()
    with logging_to(pipe):
        logging.getLogger("gateway.server").warning("a worker died", extra={"worker": "w3", "exit_code": -9})
    (line,) = lines_of(pipe)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "WARNING",
        "source": "worker-1",
        "message": "a worker died",
        "worker": "w3",
        "exit_code": -9,
    }


def test_fields_that_are_not_on_the_list_are_left_out():
    pipe = Pipe()
    assert "authorization" not in FIELDS
    with logging_to(pipe):
        logging.getLogger("gateway.x").error("no", extra={"authorization": CANARY, "request_id": "req_1"})
    (line,) = lines_of(pipe)
    assert line["request_id"] == "req_1"
    assert CANARY not in str(line)


def test_secrets_do_not_reach_the_log_by_way_of_exceptions_or_other_libraries():
    pipe = Pipe()
    with logging_to(pipe):
        try:
            {}[f"Authorization: Bearer {CANARY}"]
        except KeyError:
            logging.getLogger("gateway.pipeline").exception("a request failed through a bug")
        logging.getLogger("aiohttp.server").error("Error handling %s", CANARY)
        preformatted = f"Task exception was never retrieved\nfuture: <Task {CANARY}>"
        logging.getLogger("asyncio").error(preformatted)
        logging.getLogger("aiohttp.access").info("GET /?key=%s", CANARY)
    text = pipe.read()
    assert CANARY not in text
    bug, aiohttp, loop = map(orjson.loads, text.splitlines())
    assert bug["error"] == "KeyError"
    assert bug["at"][-1].startswith("tests/gateway/test_logs.py:")
    assert aiohttp["message"] == "aiohttp.server: Error handling %s"
    assert loop["message"] == "asyncio: Task exception was never retrieved"


def test_what_the_operating_system_said_is_logged():
    pipe = Pipe()
    with logging_to(pipe):
        try:
            os.stat("/nonexistent/file")
        except OSError:
            logging.getLogger("gateway.x").exception("cannot write")
    (line,) = lines_of(pipe)
    assert line["error_text"] == "No such file or directory"


async def test_errors_nobody_handled_in_the_loop_are_logged_without_their_arguments():
    pipe = Pipe()
    loop = asyncio.get_running_loop()

    def bug(secret: str) -> None:
        raise RuntimeError(secret)

    with logging_to(pipe):
        watch_loop(loop)
        loop.call_soon(bug, CANARY)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        loop.set_exception_handler(None)
    text = pipe.read()
    assert CANARY not in text
    assert orjson.loads(text)["error"] == "RuntimeError"


def test_an_access_line_tells_who_what_how_it_ended_and_what_it_cost():
    pipe = Pipe()
    with logging_to(pipe, level="ERROR") as logs:
        logs.access.write(an_exchange())
    text = pipe.read()
    assert CANARY not in text, "the model's name as the client wrote it may be anything"
    line = orjson.loads(text)
    del line["time"]
    assert line == {
        "level": "INFO",
        "source": "access",
        "message": "request",
        "request_id": "req_1",
        "key_id": "k_1",
        "team": "ml",
        "dialect": "chat",
        "model": "demo",
        "endpoint": "demo/0",
        "stream": True,
        "session": "none",
        "status": 200,
        "ended": "completed",
        "error_kind": None,
        "attempts": 1,
        "prompt_tokens": 100,
        "cached_tokens": 90,
        "output_tokens": 5,
        "cost_usd": 0.00125,
        "first_byte_us": pytest.approx(500100, abs=2),
        "duration_us": 1250000,
        "overhead_us": pytest.approx(300, abs=2),
    }


def test_a_request_that_got_nowhere_has_an_access_line_too():
    pipe = Pipe()
    with logging_to(pipe) as logs:
        exchange = Exchange("req_2", CHAT, 100.0, time.time())
        exchange.status, exchange.ended, exchange.ended_at = 401, "denied", 100.001
        logs.access.write(exchange)
    (line,) = lines_of(pipe)
    assert (line["status"], line["model"], line["cost_usd"]) == (401, None, None)


def test_access_lines_are_only_written_when_asked_for():
    pipe = Pipe()
    with logging_to(pipe, has_access=False) as logs:
        logs.access.write(an_exchange())
    assert pipe.read() == ""


def test_text_lines_are_for_people_and_stay_lines():
    pipe = Pipe()
    with logging_to(pipe, style="text"):
        logging.getLogger("gateway.x").info("ready", extra={"port": 8080, "reason": "two\nlines"})
    text = pipe.read()
    assert text.count("\n") == 1
    assert text.endswith('INFO    worker-1  ready  port=8080 reason="two\\nlines"\n')


def test_the_style_follows_the_terminal_unless_it_is_set():
    master, terminal = pty.openpty()
    root = logging.getLogger()
    kept = root.handlers[:], root.level
    logs = start_logging("INFO", "auto", source="parent", has_access=False, descriptor=terminal)
    logging.getLogger("gateway.x").info("hello")
    logs.close()
    root.handlers[:], level = kept
    root.setLevel(level)
    shown = os.read(master, 4096).decode()
    os.close(master)
    os.close(terminal)
    assert shown.endswith("INFO    parent    hello\r\n")


def test_a_reader_that_stops_reading_costs_lines_but_never_blocks_and_the_loss_is_told():
    reader, descriptor = os.pipe()
    writer = LineWriter(descriptor, limit=100)
    line = b"x" * 1023 + b"\n"
    for _ in range(5000):  # far more than a pipe holds
        writer.put(line)
    assert writer.dropped > 4000
    collected = io.BytesIO()

    def drain() -> None:
        while data := os.read(reader, 65536):
            collected.write(data)

    thread = threading.Thread(target=drain)
    thread.start()
    writer.close(timeout_s=10)
    os.close(descriptor)
    thread.join()
    os.close(reader)
    lines = collected.getvalue().splitlines()
    told = [orjson.loads(each) for each in lines if each.startswith(b"{")]
    assert sum(each["count"] for each in told) == writer.dropped
    assert all(each == line[:-1] for each in lines if not each.startswith(b"{"))


def test_closing_writes_what_was_buffered():
    pipe = Pipe()
    writer = LineWriter(pipe.writer)
    for number in range(1000):
        writer.put(b"%d\n" % number)
    writer.close()
    assert pipe.read().splitlines() == [str(number) for number in range(1000)]


def test_a_broken_descriptor_ends_the_writer_quietly():
    reader, descriptor = os.pipe()
    os.close(reader)
    writer = LineWriter(descriptor, limit=10)
    for _ in range(20):
        writer.put(b"line\n")
    writer.close()
    os.close(descriptor)


def test_logs_tell_how_many_lines_were_lost():
    pipe = Pipe()
    with logging_to(pipe) as logs:
        assert isinstance(logs, Logs)
        assert logs.dropped == 0
    pipe.read()

"""The load generator and the mock: right answers count, wrong ones are noticed."""

import http.client
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import bodies, native
from bench.processes import cores
from bench.targets import Mock, start_mock

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="the bench needs a C compiler"
)

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens_details":{"cached_tokens":1}}}\n\n'
FINISH = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"


def content(index: int) -> bytes:
    return b'data: {"choices":[{"delta":{"content":"~T%019d#%05d~"}}]}\n\n' % (1, index)


def framed(*events: bytes, last: bytes = b"0\r\n\r\n") -> bytes:
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events) + last


def plain(status: int, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, size, body)


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    started = start_mock(cores()[1])
    yield started
    started.process.kill()
    started.process.communicate()


def load(port: int, directory: Path, body: bytes, *options: str) -> dict[str, object]:
    path = directory / "body.json"
    path.write_bytes(body)
    command = [str(native.compile_program("load")), "--port", str(port), "--body", str(path), *options]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    return json.loads(done.stdout)


def canned(answer: bytes) -> tuple[int, threading.Thread]:
    """A server that gives one connection this answer to one request and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(65536)

    thread = threading.Thread(target=serve)
    thread.start()
    return listener.getsockname()[1], thread


@pytest.mark.parametrize(
    ("fault", "answer"),
    [
        ("none", framed(content(0), content(1), FINISH, USAGE, DONE)),
        ("none", framed(content(0) + content(1) + FINISH[:20], FINISH[20:] + USAGE + DONE)),
        ("wrong_status", plain(500, b"{}")),
        ("short", framed(content(0), FINISH, USAGE, DONE)),
        ("short", framed(content(0), content(1), FINISH, USAGE)),
        ("short", framed(content(0), content(1), USAGE, DONE)),
        ("short", framed(content(1), content(0), FINISH, USAGE, DONE)),
        ("short", framed(content(0), content(1), b'data: {"error":{}}\n\n', FINISH, USAGE, DONE)),
        ("no_usage", framed(content(0), content(1), FINISH, DONE)),
        ("broken", framed(content(0), content(1), FINISH, USAGE, DONE, last=b"")),
        ("broken", framed(content(0), last=b"nonsense\r\n")),
        ("broken", b""),
    ],
)
def test_a_wrong_stream_is_told_by_its_fault(tmp_path: Path, fault: str, answer: bytes) -> None:
    port, thread = canned(answer)
    result = load(
        port, tmp_path, b"{}", "--connections", "1", "--repeat", "1", "--stream", "2", "--grace", "20"
    )
    thread.join()
    assert result["completed"] == (fault == "none")
    assert {name for name, count in result["faults"].items() if count} == {fault} - {"none"}


@pytest.mark.parametrize(
    ("fault", "answer"),
    [
        ("none", plain(200, b'{"usage":{"cached_tokens":1},"x":"%b"}' % (b"a" * 400))),
        ("no_usage", plain(200, b'{"x":"%b"}' % (b"a" * 400))),
        ("short", plain(200, b'{"usage":{"cached_tokens":1}}')),
        ("broken", plain(200, b'{"usage":{"cached_tokens":1}}', length=900)),
        ("wrong_status", plain(429, b'{"error":{}}')),
    ],
)
def test_a_wrong_json_answer_is_told_by_its_fault(tmp_path: Path, fault: str, answer: bytes) -> None:
    port, thread = canned(answer)
    result = load(port, tmp_path, b"{}", "--connections", "1", "--repeat", "1", "--grace", "20")
    thread.join()
    assert {name for name, count in result["faults"].items() if count} == {fault} - {"none"}


def test_every_stream_of_the_mock_is_whole_and_each_chunk_has_its_delay(mock: Mock, tmp_path: Path) -> None:
    before = mock.stats()
    body = bodies.request_body("paced-5-2", 1000, stream=True)
    result = load(mock.port, tmp_path, body, "--connections", "20", "--repeat", "3", "--stream", "5")
    assert (result["completed"], result["chunks"]) == (60, 300)
    assert result["relay_us"]["count"] == 300
    assert 0 < result["relay_us"]["p50"] < 1e6
    assert result["latency_us"]["p50"] >= 10_000
    after = mock.stats()
    assert after["requests"] - before["requests"] == 60
    assert after["cut_streams"] == before["cut_streams"]


def test_open_loop_latency_counts_from_the_due_time(mock: Mock, tmp_path: Path) -> None:
    """One connection and 50 ms a request, but an arrival every 10 ms: the wait for the connection is part of the latency."""
    body = bodies.request_body("delay-50", 1000, stream=False)
    result = load(mock.port, tmp_path, body, "--connections", "1", "--rate", "100", "--seconds", "0.5")
    assert result["completed"] > 20
    assert result["latency_us"]["max"] > 500_000


@pytest.mark.parametrize("is_asked", [True, False])
def test_the_mock_gives_usage_only_when_asked(mock: Mock, is_asked: bool) -> None:
    body = {"model": "burst-3", "stream": True, "stream_options": {"include_usage": is_asked}, "messages": []}
    text = post(mock.port, json.dumps(body).encode())
    assert text.endswith(b"data: [DONE]\n\n")
    assert text.count(b"~T") == 3
    assert (b'"usage":{' in text) is is_asked


def test_the_mock_takes_chunked_bodies_and_pipelined_requests(mock: Mock) -> None:
    body = b'{"model":"bench","stream":false}'
    request = b"POST /v1/x HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (
        len(body),
        body,
    )
    with socket.create_connection(("127.0.0.1", mock.port), timeout=30) as connection:
        connection.sendall(request * 3)
        received = b""
        while received.count(b'"object":"chat.completion"') < 3:
            received += connection.recv(65536)
    assert received.count(b"HTTP/1.1 200 OK") == 3


def test_routed_fields_are_found_behind_a_large_body(mock: Mock) -> None:
    body = b'{"messages":[{"role":"user","content":"%b"}],"model":"burst-2","stream":true}' % (b"x" * 500_000)
    assert post(mock.port, body).count(b"~T") == 2


@pytest.mark.parametrize("size", [1000, 2000, 200_000, 1_000_000])
def test_bodies_have_the_size_asked_for_and_are_always_the_same(size: int) -> None:
    body = bodies.request_body("bench", size, stream=False)
    assert abs(len(body) - size) <= size * 0.04
    assert body == bodies.request_body("bench", size, stream=False)
    assert [message["role"] for message in json.loads(body)["messages"]][:2] == ["system", "user"]


def post(port: int, body: bytes) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/v1/chat/completions", body)
        return connection.getresponse().read()
    finally:
        connection.close()

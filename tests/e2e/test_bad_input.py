"""Malformed requests, bodies, configurations and upstream answers: each gets a clear error, and nothing else happens.

Never a traceback, a hang, a leaked connection, and the gateway serves the next request as if nothing had been.
"""

import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.commands.app import app
from tests.e2e.bad_input import answers, bodies, configs, doors, requests
from tests.support.gateway_process import KEY, ROOT, Gateway
from tests.support.rawcli import Answer, RawClient
from tests.support.upstream_thread import BlockingUpstream, UpstreamThread

pytestmark = pytest.mark.e2e

NARROW_KEY = "sk-narrow-0a1b2c3d4e5f6071"  # may use one model
PRICE = {"input": 1.0, "cached_input": 0.1, "output": 2.0}
INTERNALS = re.compile(
    r'Traceback|File "|\.py\b|site-packages|\bException\b|0x[0-9a-f]{6}|' + re.escape(str(ROOT))
)


@pytest.fixture(scope="module")
def target() -> Iterator[BlockingUpstream]:
    with UpstreamThread() as thread:
        yield thread.start()


@pytest.fixture(scope="module")
def strict(target: BlockingUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with little patience. What it leaves open or logs is looked at when all is over."""
    gateway = Gateway(
        tmp_path_factory.mktemp("bad-input"),
        server={"limits": {"header_s": 0.6, "body_s": 0.6, "body_bytes": 65536, "response_bytes": 1 << 20}},
        keys=[{"name": "narrow", "key": NARROW_KEY, "models": ["m"]}],
        queue={"enabled": True},
        pools={
            "up": {
                "type": "vllm",
                "endpoints": [f"{target.url}/v1"],
                "deadlines": {"connect_s": 1, "first_byte_s": 0.5, "idle_s": 0.5, "total_s": 2},
            },
            "claudes": {"type": "anthropic", "endpoints": [target.url]},
        },
        models={
            "m": {"targets": [{"pool": "up", "model": "scripted-1"}], "price": PRICE},
            "claude": {"targets": [{"pool": "claudes", "model": "scripted-1"}], "price": PRICE},
        },
    )
    with gateway:
        yield gateway
        open_at_the_end = _settled(gateway)
    log = gateway.log()
    assert open_at_the_end == {}, "left open when all clients had gone"
    assert "Traceback" not in log
    assert '"level":"ERROR"' not in log


@pytest.fixture(scope="module")
def due(strict: Gateway) -> Iterator[Callable[..., None]]:
    """Notes what the row of an answer must say; all rows are looked at together, as they take a moment each."""
    expected: dict[str, dict[str, Any]] = {}

    def note(answer: Answer, **columns: Any) -> None:
        expected[answer.headers["x-request-id"]] = columns

    yield note
    if expected:
        strict.row(next(reversed(expected)))
    rows = {row["request_id"]: row for row in strict.rows()}
    found = {i: {name: rows[i][name] for name in columns} for i, columns in expected.items()}
    assert found == expected


def _settled(gateway: Gateway, within_s: float = 60.0) -> dict[str, float]:
    """What is still open once idle connections had time to expire (upstream connections are kept for 4 s)."""
    deadline = time.monotonic() + within_s
    while True:
        gauges = {
            name: value
            for name, value in gateway.metrics().items()
            if value
            and name.startswith(
                ("headgate_connections", "headgate_requests_in_flight", "headgate_upstream_connections")
            )
        }
        if not gauges or time.monotonic() > deadline:
            return gauges
        time.sleep(0.2)


def check_envelope(answer: Answer, status: int, code: str | None, family: str) -> dict[str, Any]:
    """The error, in the family's own form; Workers AI's may have several, the first counts."""
    assert answer.is_complete
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    document = json.loads(answer.body)
    error = document["errors"][0] if family == "workers_ai" else document["error"]
    if family == "workers_ai":
        assert document.keys() == {"result", "success", "errors", "messages"}
        assert (document["result"], document["success"]) == (None, False)
        assert error.keys() == {"code", "message", "headgate_code"}
    elif family == "anthropic":
        assert document.keys() == {"type", "error", "request_id"}
        assert document["type"] == "error"
        assert error.keys() == {"type", "message"}
        assert answer.headers["request-id"] == document["request_id"]
    else:
        assert document.keys() == {"error"}
        assert error.keys() == {"message", "type", "param", "code"}
        assert code is None or error["code"] == code
    check_message(error["message"])
    return error


def check_message(message: str) -> None:
    assert len(message) > 15
    assert not INTERNALS.search(message), message


async def check_alive(gateway: Gateway) -> None:
    """A good request on a new connection is answered."""
    async with connected(gateway) as client:
        answer = await client.exchange(
            requests.request(path="/v1/embeddings", body=b'{"model":"m","input":"hi"}')
        )
        assert answer.status == 200, answer.body


@contextlib.asynccontextmanager
async def connected(gateway: Gateway) -> AsyncIterator[RawClient]:
    """Every wait of the client's ends within five seconds."""
    client = await RawClient.connect(gateway.port, timeout_s=5)
    try:
        yield client
    finally:
        client.close()


REQUESTS = {**requests.VECTORS, **doors.VECTORS}


@pytest.mark.parametrize("vector", REQUESTS.values(), ids=REQUESTS)
async def test_a_request_that_is_not_acceptable_is_told_why(strict, vector) -> None:
    async with connected(strict) as client:
        await client.send(vector.data)
        check_envelope(await client.read_answer(), vector.status, vector.code, vector.family)
    await check_alive(strict)


BODIES = [
    *((f"{name}, {d}", d, vector) for name, vector in bodies.EVERYWHERE.items() for d in bodies.DIALECTS),
    *((name, "chat", vector) for name, vector in bodies.ONCE.items()),
    *((f"another dialect's model, {d}", d, vector) for d, vector in bodies.ELSEWHERE.items()),
]


@pytest.mark.parametrize(("name", "dialect", "vector"), BODIES, ids=[each[0] for each in BODIES])
async def test_a_body_that_is_not_acceptable_is_told_why(strict, name, dialect, vector) -> None:
    key = NARROW_KEY if "may not use" in name else KEY
    data = requests.request(path=bodies.PATHS[dialect], body=vector.body, key=key)
    family = "anthropic" if dialect in ("messages", "count_tokens") else "openai"
    async with connected(strict) as client:
        error = check_envelope(await client.exchange(data), vector.status, vector.code, family)
        if family == "openai" and vector.param is not None:
            assert error["param"] == vector.param
        # The connection is good for the next request.
        assert (await client.exchange(requests.request())).status == 200


async def ask(gateway: Gateway, *, is_stream: bool) -> Answer:
    body = {"model": "m", "messages": [], "stream": is_stream, "stream_options": {"include_usage": True}}
    if not is_stream:
        del body["stream_options"]
    async with connected(gateway) as client:
        return await client.exchange(requests.request(body=json.dumps(body).encode()))


def check_given_up(target: BlockingUpstream) -> None:
    """The gateway does not hold on to a connection whose answer it could not use."""
    for record in target.journal:
        target.wait_end(record)


@pytest.mark.parametrize("vector", answers.NO_ANSWER.values(), ids=answers.NO_ANSWER)
async def test_no_usable_answer_is_a_502_or_504_with_the_cause(strict, target, due, vector) -> None:
    target.clear()
    target.script("chat", vector.answer)
    answer = await ask(strict, is_stream=vector.is_stream)
    error = check_envelope(answer, vector.status, f"upstream_{vector.code}", "openai")
    assert "`up`" in error["message"]
    due(answer, ended="upstream_failed", status=vector.status, error_kind=vector.code, cost_nanousd=0)
    check_given_up(target)
    await check_alive(strict)


@pytest.mark.parametrize("name", ["silence", "binary rubbish", "302", "a page"])
async def test_a_message_is_told_in_anthropics_form(strict, target, due, name) -> None:
    target.clear()
    vector = answers.NO_ANSWER[name]
    target.script("messages", vector.answer)
    async with connected(strict) as client:
        answer = await client.exchange(requests.request(path=requests.MESSAGES))
    check_envelope(answer, vector.status, None, "anthropic")
    due(answer, ended="upstream_failed", status=vector.status, error_kind=vector.code, cost_nanousd=0)


@pytest.mark.parametrize(("status", "answer"), answers.PAGES.values(), ids=answers.PAGES)
async def test_an_error_in_no_form_of_the_apis_becomes_one_and_keeps_its_status(
    strict, target, due, status, answer
) -> None:
    target.clear()
    target.script("chat", answer)
    told = await ask(strict, is_stream=False)
    error = check_envelope(told, status, "upstream_error", "openai")
    assert "`up`" in error["message"]
    due(told, ended="completed", status=status, cost_nanousd=0)


@pytest.mark.parametrize("vector", answers.BROKEN.values(), ids=answers.BROKEN)
async def test_a_stream_that_breaks_never_looks_complete(strict, target, due, vector) -> None:
    target.clear()
    target.script("chat", vector.answer)
    answer = await ask(strict, is_stream=True)
    assert answer.status == 200
    assert not answer.is_complete
    assert b"[DONE]" not in answer.body
    if answer.body.endswith(b"\n\n"):
        error = json.loads(answer.body.rpartition(b"data: ")[2])["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] == f"upstream_{vector.kind or 'incomplete'}"
        check_message(error["message"])
    due(answer, ended="incomplete", status=200, error_kind=vector.kind)
    check_given_up(target)
    await check_alive(strict)


@pytest.mark.parametrize("vector", answers.PASSED.values(), ids=answers.PASSED)
async def test_an_odd_answer_is_relayed_as_it_is_and_billed_only_if_that_is_honest(
    strict, target, due, vector
) -> None:
    target.clear()
    target.script("chat", vector.answer)
    answer = await ask(strict, is_stream=vector.is_stream)
    assert answer.status == 200
    assert answer.is_complete
    if vector.answer.framing != "raw":
        assert answer.body == vector.answer.body
    due(answer, ended="completed", status=200, is_estimated=0, cost_nanousd=vector.cost)
    await check_alive(strict)


@pytest.mark.parametrize(("text", "words"), configs.VECTORS.values(), ids=configs.VECTORS)
def test_a_configuration_that_cannot_be_meant_is_refused_with_its_place(
    tmp_path, monkeypatch, text, words
) -> None:
    monkeypatch.setenv("SECRET", configs.SECRET)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = CliRunner().invoke(app, ["check", "--config", str(path)])
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    for word in words:
        assert word in result.output
    assert configs.SECRET not in result.output
    assert "hunter2secret" not in result.output
    check_message(result.output.replace(str(path), ""))


def test_the_configuration_these_begin_with_is_a_good_one(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(configs.GOOD)
    assert CliRunner().invoke(app, ["check", "--config", str(path)]).exit_code == 0


def test_there_are_two_hundred_of_them_and_more() -> None:
    counts = {
        "requests": len(REQUESTS),
        "bodies": len(BODIES),
        "configurations": len(configs.VECTORS),
        "answers": sum(map(len, (answers.NO_ANSWER, answers.PAGES, answers.BROKEN, answers.PASSED))),
    }
    print(counts)
    assert sum(counts.values()) >= 200

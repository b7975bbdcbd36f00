"""What becomes of a request whose upstream fails, and of the upstream: inference-routing's checklist, items 18 to 25.

Every test has a pool or provider of its own, so that none finds endpoints that another has spoilt.
"""

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.support import recordings
from tests.support.gateway_process import KEY, Gateway, free_port
from tests.support.rawcli import Answer as Seen
from tests.support.rawcli import RawClient
from tests.support.upstream_thread import Answer, BlockingUpstream, UpstreamThread

pytestmark = pytest.mark.e2e

PRICE = {"input": 1.0, "output": 2.0}
# One worker: the counts of a test are whole.
QUIET = {"probe": "none", "scrape": "none"}
POOLS = (
    "broken", "full", "shed", "page", "late", "silent", "torn", "whole", "gone", "cool", "total", "mid", "left", "spent", "own",
)  # fmt: skip
SAID = Answer.of_json(recordings.chat())
STREAMED = Answer.of_events(recordings.chat_events())
FULL = Answer.of_error(503)
KEYS = ("sk-first-1111111111", "sk-second-2222222222", "sk-third-3333333333")
_numbers = itertools.count()  # each request begins a conversation, so that they go to both upstreams


class Upstreams(NamedTuple):
    first: BlockingUpstream
    second: BlockingUpstream


@pytest.fixture(scope="module")
def upstreams() -> Iterator[Upstreams]:
    with UpstreamThread() as thread:
        yield Upstreams(thread.start(), thread.start())


@pytest.fixture(scope="module")
def gateway(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    pools: dict[str, Any] = {
        name: {
            "endpoints": [f"{upstream.url}/{name}/v1" for upstream in upstreams],
            "deadlines": {"first_byte_s": 1, "idle_s": 1, "connect_s": 1},
            "health": QUIET,
        }
        for name in POOLS
    }
    pools["gone"]["endpoints"] = [f"http://127.0.0.1:{free_port()}/v1", f"{upstreams.second.url}/gone/v1"]
    pools["total"]["deadlines"] = {"first_byte_s": 5, "total_s": 0.6}
    pools["spent"]["health"] = {**QUIET, "retry_floor": 0, "failures": 1000}
    models: dict[str, Any] = {name: {"targets": [{"pool": name}], "price": PRICE} for name in POOLS}
    models["own"]["targets"][0]["deadlines"] = {"first_byte_s": 0.1}
    account = {"type": "openai", "base_url": f"{upstreams.first.url}/keys/v1", "health": QUIET}
    providers = {
        name: {**account, "api_key": KEYS[0], "more_api_keys": [*KEYS[1:], ""]}
        for name in ("limited", "refused")
    }
    with Gateway(
        tmp_path_factory.mktemp("failures"),
        pools=pools,
        providers=providers,
        models=models,
        logging={"access": False},
    ) as running:
        yield running
        assert "Traceback" not in running.log(), running.log()[-4000:]


@pytest.fixture(autouse=True)
def _forget(upstreams: Upstreams) -> None:
    for upstream in upstreams:
        upstream.clear()


async def ask(gateway: Gateway, model: str, *, stream: bool = False, session: str = "") -> Seen:
    client = await RawClient.connect(gateway.port)
    body = json.dumps(
        {
            "model": model,
            "stream": stream,
            "messages": [{"role": "user", "content": f"conversation {next(_numbers)}"}],
        }
    ).encode()
    named = f"x-session-id: {session}\r\n" if session else ""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {KEY}\r\n{named}"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    try:
        return await client.exchange(head.encode(), body)
    finally:
        client.close()


def both(upstreams: Upstreams, answer: Any) -> None:
    for upstream in upstreams:
        upstream.script("chat", answer)


def first_fails(upstreams: Upstreams, failure: Answer, then: Answer) -> list[int]:
    """Whichever is asked first fails, from then on; the other answers. Returns who was asked, as it happens."""
    asked: list[int] = []

    def script(number: int) -> Any:
        def answer(_: Any) -> Answer:
            asked.append(number)
            return failure if number == asked[0] else then

        return answer

    for number, upstream in enumerate(upstreams):
        upstream.script("chat", script(number))
    return asked


def out(gateway: Gateway) -> dict[str, str]:
    """Why endpoints are out, by name."""
    return {e["name"]: e["reason"] for e in gateway.manage("/api/status")["endpoints"] if e["state"] == "out"}


def moved(gateway: Gateway, before: dict[str, float], name: str) -> float:
    return gateway.metrics().get(name, 0) - before.get(name, 0)


def outcome(kind: str) -> str:
    return f'headgate_retries_total{{outcome="{kind}"}}'


async def test_18_a_connection_that_is_refused_takes_the_replica_out_at_once_and_nobody_sees_it(
    gateway, upstreams
):
    both(upstreams, SAID)
    answers = [await ask(gateway, "gone") for _ in range(8)]
    assert {answer.status for answer in answers} == {200}
    assert sum(answer.headers["x-headgate-attempts"] == "2" for answer in answers) <= 1
    assert out(gateway)["gone/0"] == "connect"
    name = 'headgate_endpoint_ejections_total{endpoint="gone/0",reason="connect"}'
    assert gateway.metrics()[name] == 1


async def test_18_a_replica_that_answers_500_is_out_after_three_and_its_requests_are_answered_elsewhere(
    gateway, upstreams
):
    asked = first_fails(upstreams, Answer.of_error(500), SAID)
    answers = [await ask(gateway, "broken") for _ in range(12)]
    ill = asked[0]
    assert {answer.status for answer in answers} == {200}  # three retries are there even for a few requests
    assert asked.count(ill) == 3
    assert out(gateway)[f"broken/{ill}"] == "500"
    assert {a.headers["x-headgate-target"] for a in answers[-3:]} == {f"broken/{1 - ill}"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "failure", "then"),
    [
        ("silent", lambda a: a.hang_before_head(), "first_byte_timeout"),
        ("late", lambda a: a.hang_after(0), None),
        ("torn", lambda a: a.cut_after(0), None),
    ],
)
async def test_19_while_nothing_was_relayed_another_replica_is_asked(
    gateway, upstreams, model, failure, then, stream
):
    good = STREAMED if stream else SAID.claiming(len(SAID.body))  # a promise is kept, or seen to be broken
    asked = first_fails(upstreams, failure(good), good)
    answer = await ask(gateway, model, stream=stream)
    assert (answer.status, answer.is_complete) == (200, True)
    assert sorted(asked) == [0, 1]
    row = gateway.row(answer.headers["x-request-id"])
    (failed,) = json.loads(row["failed_attempts"])
    assert failed[0] == f"{model}/{asked[0]}"
    assert failed[1] == (then or failed[1])
    assert (row["attempts"], row["place_reason"], row["endpoint"]) == (2, "retry", f"{model}/{asked[1]}")


async def test_19_an_unstreamed_answer_that_breaks_off_in_its_body_is_asked_for_again(gateway, upstreams):
    first_fails(upstreams, SAID.cut_after(1).claiming(100_000), SAID)
    answer = await ask(gateway, "whole")
    assert answer.status == 200
    row = gateway.row(answer.headers["x-request-id"])
    assert (row["attempts"], json.loads(row["failed_attempts"])[0][1]) == (2, "incomplete")


async def test_19_after_the_first_relayed_byte_nothing_is_sent_again(gateway, upstreams):
    both(upstreams, STREAMED.cut_after(2))
    answer = await ask(gateway, "mid", stream=True)
    assert (answer.status, answer.is_complete) == (200, False)
    assert len(upstreams.first.journal) + len(upstreams.second.journal) == 1


async def test_19_a_failed_attempt_is_waste_in_the_ledger_and_never_on_the_callers_bill(gateway, upstreams):
    first_fails(upstreams, SAID.reset_before_head(), SAID)
    before = gateway.metrics()
    answer = await ask(gateway, "left")
    row = gateway.row(answer.headers["x-request-id"])
    assert row["cost_nanousd"] == 25 * 1000 + 8 * 2000
    ((endpoint, reason, took_us, nanousd),) = json.loads(row["failed_attempts"])
    assert reason == "reset"
    assert took_us > 0
    assert nanousd == row["wasted_nanousd"] > 0  # the prompt had been sent
    assert moved(gateway, before, f'headgate_wasted_nanousd_total{{endpoint="{endpoint}"}}') == nanousd


async def test_19_a_refusal_for_load_goes_where_there_is_room_and_not_in_circles(gateway, upstreams):
    both(upstreams, FULL)
    answers = [await ask(gateway, "shed") for _ in range(6)]
    assert {answer.status for answer in answers} == {503}
    # The first was offered to both. From then on both rest, and each further request is one attempt.
    assert [answer.headers["x-headgate-attempts"] for answer in answers] == ["2", "1", "1", "1", "1", "1"]
    assert not [name for name in out(gateway) if name.startswith("shed")]


async def test_19_retries_stay_within_their_budget(gateway, upstreams):
    both(upstreams, Answer.of_error(500))
    before = gateway.metrics()
    answers = [await ask(gateway, "spent") for _ in range(30)]
    attempts = sum(int(answer.headers["x-headgate-attempts"]) for answer in answers)
    assert 30 < attempts <= 36
    assert moved(gateway, before, outcome("no_budget")) == 60 - attempts


async def test_20_429_and_client_errors_never_take_an_endpoint_out(gateway, upstreams):
    for status in (400, 404, 413, 422, 429):
        both(upstreams, Answer.of_error(status))
        for _ in range(6):
            assert (await ask(gateway, "full")).status == status
    assert not [name for name in out(gateway) if name.startswith("full")]
    both(upstreams, SAID)
    assert (await ask(gateway, "full")).status == 200


async def test_20_an_endpoint_that_names_a_time_is_left_alone_until_then(gateway, upstreams):
    asked = first_fails(upstreams, Answer.of_error(429, retry_after="1"), SAID)
    began_at = time.monotonic()
    assert (await ask(gateway, "cool")).headers["x-headgate-attempts"] == "2"
    while time.monotonic() - began_at < 0.9:
        assert (await ask(gateway, "cool")).headers["x-headgate-attempts"] == "1"
    assert asked.count(asked[0]) == 1
    deadline = began_at + 10
    while asked.count(asked[0]) == 1:
        assert time.monotonic() < deadline, "it never came back"
        await ask(gateway, "cool")


async def test_20_a_proxys_503_is_a_broken_endpoint_and_the_apis_a_full_one(gateway, upstreams):
    page = Answer((b"<html>no backend</html>",), 503, (("content-type", "text/html"),))
    asked = first_fails(upstreams, page, SAID)
    for _ in range(14):
        await ask(gateway, "page")
    assert out(gateway)[f"page/{asked[0]}"] == "503"


async def test_22_a_client_that_leaves_says_nothing_about_the_endpoint(gateway, upstreams):
    both(upstreams, SAID.hang_before_head())
    for _ in range(8):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(gateway, "left"), 0.1)
    for upstream in upstreams:
        for record in list(upstream.journal):
            assert upstream.wait_end(record) == "peer gone"
    assert not [name for name in out(gateway) if name.startswith("left")]
    waiting = [v for name, v in gateway.metrics().items() if name.startswith("headgate_attempts_unanswered")]
    assert sum(waiting) == 0


async def test_23_all_attempts_together_get_the_time_of_one_request(gateway, upstreams):
    both(upstreams, SAID.hang_before_head())
    began_at = time.monotonic()
    answer = await ask(gateway, "total")
    assert answer.status == 504
    assert time.monotonic() - began_at < 15
    row = gateway.row(answer.headers["x-request-id"])
    assert (row["attempts"], row["error_kind"], row["cost_nanousd"]) == (1, "total_timeout", 0)
    assert len(json.loads(row["failed_attempts"])) == 1


async def test_23_a_target_may_have_deadlines_of_its_own(gateway, upstreams):
    both(upstreams, SAID.late(0.3))
    answer = await ask(gateway, "own")
    assert answer.status == 504
    assert json.loads(answer.body)["error"]["code"] == "upstream_first_byte_timeout"


async def test_a_key_that_is_short_of_quota_rests_and_the_next_one_is_used(gateway, upstreams):
    def by_key(record: Any) -> Answer:
        return (
            Answer.of_error(429, retry_after="30")
            if record.header("authorization") == f"Bearer {KEYS[0]}"
            else SAID
        )

    upstreams.first.script("chat", by_key)
    before = gateway.metrics()
    answers = [await ask(gateway, "limited/gpt-5") for _ in range(4)]
    assert [answer.status for answer in answers] == [200] * 4
    assert [answer.headers["x-headgate-attempts"] for answer in answers] == ["2", "1", "1", "1"]
    used = [record.header("authorization") for record in upstreams.first.journal]
    assert used == [f"Bearer {KEYS[0]}"] + [f"Bearer {KEYS[1]}"] * 4
    assert moved(gateway, before, outcome("rotated")) == 1
    assert not any(key in gateway.log() for key in KEYS)


async def test_keys_that_are_all_refused_are_each_tried_once_and_the_client_is_told(gateway, upstreams):
    upstreams.first.script("chat", Answer.of_error(401))
    answers = [await ask(gateway, "refused/gpt-5") for _ in range(3)]
    assert [answer.status for answer in answers] == [401] * 3
    assert [answer.headers["x-headgate-attempts"] for answer in answers] == ["3", "1", "1"]
    assert {record.header("authorization") for record in upstreams.first.journal} == {
        f"Bearer {key}" for key in KEYS
    }

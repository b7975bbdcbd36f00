"""`Idempotency-Key`: sent twice, carried out once, over two workers and with the SDKs' own errors."""

import asyncio
import contextlib
import uuid

import anthropic
import openai
import pytest

from tests.e2e.conftest import UPSTREAM_KEY
from tests.e2e.raw import USER
from tests.support import recordings
from tests.support.gateway_process import KEY, Gateway
from tests.support.redis_server import RedisServer
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e


def fresh() -> dict[str, str]:
    return {"Idempotency-Key": f"test-{uuid.uuid4()}"}


def ask(client: openai.OpenAI, headers: dict[str, str], model: str = "acme/plain", text: str = "hi"):
    create = client.chat.completions.with_raw_response.create
    return create(model=model, messages=[{"role": "user", "content": text}], extra_headers=headers)


def test_a_repetition_gets_the_first_answer_and_reaches_nobody(client, gateway, upstream):
    headers = fresh()
    first, *others = [ask(client, headers) for _ in range(6)]
    assert len(upstream.journal) == 1
    for answer in others:
        assert answer.content == first.content
        assert answer.headers["idempotency-replayed"] == "true"
        assert answer.headers["x-headgate-replay-of"] == first.headers["x-request-id"]
        assert answer.headers["x-request-id"] != first.headers["x-request-id"]
        assert "x-headgate-cost-usd" not in answer.headers
    row = gateway.row(others[0].headers["x-request-id"])
    assert (row["ended"], row["status"], row["cost_nanousd"], row["attempts"]) == ("replayed", 200, 0, 0)
    assert gateway.row(first.headers["x-request-id"])["cost_nanousd"] > 0


def test_a_stream_is_replayed_byte_by_byte(client, upstream):
    headers = fresh()

    def stream() -> tuple[bytes, str | None]:
        create = client.chat.completions.with_streaming_response.create
        with create(model="acme/plain", messages=USER, stream=True, extra_headers=headers) as answer:
            return answer.read(), answer.headers.get("idempotency-replayed")

    first, again = stream(), stream()
    assert first == (again[0], None)
    assert again[1] == "true"
    assert first[0].endswith(b"data: [DONE]\n\n")
    assert len(upstream.journal) == 1


def test_messages_are_replayed_too(claude, upstream):
    headers = fresh()
    answers = [
        claude.messages.create(model="claude/plain", messages=USER, max_tokens=9, extra_headers=headers)
        for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert len(upstream.journal) == 1


def test_another_body_under_the_same_key_is_refused(client, claude, upstream):
    headers = fresh()
    ask(client, headers)
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        ask(client, headers, text="something else")
    assert refused.value.code == "idempotency_key_reused"
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert len(upstream.journal) == 1
    claude.messages.create(
        model="claude/plain", messages=USER, max_tokens=9, extra_headers=headers
    )  # another path
    with pytest.raises(anthropic.UnprocessableEntityError):
        claude.messages.create(model="claude/plain", messages=USER, max_tokens=8, extra_headers=headers)


def test_callers_do_not_meet_each_others_answers(client, gateway, upstream):
    headers = fresh()
    ask(client, headers)
    with openai.OpenAI(
        base_url=gateway.base_url, api_key="sk-narrow-41b2a3c4d5e6f708", max_retries=0
    ) as other:
        answer = ask(other, headers)
    assert "idempotency-replayed" not in answer.headers
    assert len(upstream.journal) == 2


async def test_while_the_first_runs_the_others_are_told_so_and_sdks_come_back(gateway, upstream):
    """Fifty at once, over both workers: one call upstream, one charge, and everybody has the answer."""
    upstream.script("chat", Answer.of_json(recordings.chat("hi")).late(0.5))
    headers = fresh()
    async with openai.AsyncOpenAI(base_url=gateway.base_url, api_key=KEY, max_retries=4, timeout=30) as sdk:
        answers = await asyncio.gather(
            *(
                sdk.chat.completions.with_raw_response.create(
                    model="acme/any", messages=USER, extra_headers=headers
                )
                for _ in range(50)
            )
        )
    assert len({answer.content for answer in answers}) == 1
    assert len(upstream.journal) == 1
    firsts = [answer for answer in answers if "idempotency-replayed" not in answer.headers]
    assert len(firsts) == 1


def test_a_second_request_meanwhile_is_a_conflict(client, gateway, upstream):
    headers = fresh()
    create = client.chat.completions.create
    stream = create(model="acme/hang-after-3", messages=USER, stream=True, extra_headers=headers)
    next(iter(stream))
    with pytest.raises(openai.ConflictError) as conflict:
        create(model="acme/hang-after-3", messages=USER, stream=True, extra_headers=headers)
    assert conflict.value.code == "idempotency_key_in_use"
    assert conflict.value.response.headers["retry-after"] == "1"
    stream.close()
    gateway.row(stream.response.headers["x-request-id"])
    # The client that left gave its key back: it was never answered.
    again = create(model="acme/hang-after-3", messages=USER, stream=True, extra_headers=headers)
    assert "idempotency-replayed" not in again.response.headers
    again.close()
    assert len(upstream.journal) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_answer_that_asks_to_be_tried_again_is_not_kept(client, upstream, status):
    headers = fresh()
    upstream.script("chat", Answer.of_error(status), Answer.of_json(recordings.chat("hi")))
    with pytest.raises(openai.APIStatusError):
        ask(client, headers, "acme/any")
    assert ask(client, headers, "acme/any").http_response.status_code == 200
    assert len(upstream.journal) == 2


def test_a_providers_final_no_is_kept(client, upstream):
    headers = fresh()
    for _ in range(2):
        with pytest.raises(openai.BadRequestError):
            ask(client, headers, "acme/status-400")
    assert len(upstream.journal) == 1


def test_a_stream_that_broke_off_is_carried_out_again(client, upstream):
    headers = fresh()
    for _ in range(2):
        with pytest.raises((openai.APIError, Exception)):
            list(
                client.chat.completions.create(
                    model="acme/cut-after-3", messages=USER, stream=True, extra_headers=headers
                )
            )
    assert len(upstream.journal) == 2


@pytest.mark.parametrize("key", ["a b", "x" * 256, "é"])
def test_a_malformed_key_is_an_error_that_says_so(gateway, upstream, key):
    status, _, body = gateway.post(
        "/v1/chat/completions", {"model": "acme/plain", "messages": USER}, {"idempotency-key": key}
    )
    assert status == 400
    assert b"invalid_idempotency_key" in body
    assert not upstream.journal


def test_two_nodes_on_redis_carry_a_request_out_once(upstreams, upstream, tmp_path):
    provider = {"type": "openai", "api_key": UPSTREAM_KEY, "base_url": f"{upstreams.main.url}/v1"}
    headers = fresh()
    with RedisServer(tmp_path / "redis") as redis, contextlib.ExitStack() as running:
        nodes = []
        for name in ("a", "b"):
            storage = {"directory": str(tmp_path / name), "redis": {"url": redis.url, "node": name}}
            (tmp_path / f"node-{name}").mkdir()
            node = Gateway(tmp_path / f"node-{name}", storage=storage, providers={"acme": provider})
            nodes.append(running.enter_context(node))
        answers = []
        for node in nodes:
            with openai.OpenAI(base_url=node.base_url, api_key=KEY, max_retries=0, timeout=60) as sdk:
                answers += [ask(sdk, headers), ask(sdk, headers)]
    assert [answer.headers.get("idempotency-replayed") for answer in answers] == [
        None,
        "true",
        "true",
        "true",
    ]
    assert len({answer.content for answer in answers}) == 1
    assert len(upstream.journal) == 1

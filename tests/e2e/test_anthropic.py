"""Messages through anthropic-python: the API's own shapes, headers and errors, and what was billed."""

import json

import anthropic
import pytest

from tests.e2e.conftest import NARROW_KEY, UPSTREAM_KEY
from tests.e2e.raw import MESSAGES, USER, ask, called
from tests.support import recordings
from tests.support.catalogue import TWO_TOOLS
from tests.support.gateway_process import KEY
from tests.support.recordings import Tokens
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e

WEATHER = {"name": "get_weather", "input_schema": {"type": "object", "properties": {}}}
CLASSES = {
    400: anthropic.BadRequestError,
    401: anthropic.AuthenticationError,
    403: anthropic.PermissionDeniedError,
    404: anthropic.NotFoundError,
    409: anthropic.ConflictError,
    413: anthropic.RequestTooLargeError,
    422: anthropic.UnprocessableEntityError,
    429: anthropic.RateLimitError,
    500: anthropic.InternalServerError,
    503: anthropic.ServiceUnavailableError,
    504: anthropic.DeadlineExceededError,
    529: anthropic.OverloadedError,
}


def say(claude, model="claude/plain", **fields):
    return claude.messages.create(model=model, messages=USER, max_tokens=64, **fields)


def test_a_message_is_answered_with_the_upstreams_own_bytes(claude, gateway, upstream):
    raw = claude.messages.with_raw_response.create(model="claude/plain", messages=USER, max_tokens=64)
    message = raw.parse()
    assert raw.http_response.content == json.dumps(recordings.message(model="plain")).encode()
    assert message.content[0].text == "Hello from upstream"
    assert upstream.last.path == "/v1/messages"
    assert upstream.last.json == {"model": "plain", "messages": USER, "max_tokens": 64}
    row = gateway.row(message._request_id)
    assert (row["dialect"], row["ended"], row["provider"]) == ("messages", "completed", "claude")
    assert (row["input_tokens"], row["output_tokens"]) == (25, 8)


def test_a_streamed_message_comes_together(claude):
    with claude.messages.stream(model="claude/plain", messages=USER, max_tokens=64) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "Hello from upstream"
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 8)


async def test_the_asynchronous_sdk_gets_the_same(async_claude):
    message = await say(async_claude)
    async with async_claude.messages.stream(model="claude/plain", messages=USER, max_tokens=64) as stream:
        final = await stream.get_final_message()
    assert final.content[0].text == message.content[0].text == "Hello from upstream"


async def test_a_streamed_message_passes_byte_for_byte_and_is_billed_from_its_last_usage(gateway, upstream):
    answer = await ask(gateway, MESSAGES, called(MESSAGES, "claude/plain", stream=True))
    assert answer.body == b"".join(recordings.message_events(model="plain"))
    assert upstream.last.json == called(MESSAGES, "plain", stream=True)
    row = gateway.row(answer.headers["request-id"])
    assert (row["ended"], row["output_tokens"], row["is_estimated"]) == ("completed", 8, 0)


def test_cache_reads_and_writes_are_billed_at_their_own_prices_streamed_or_not(claude, gateway):
    message = say(claude, "claude/cached")
    with claude.messages.stream(model="claude/cached", messages=USER, max_tokens=64) as stream:
        stream.until_done()
        streamed = gateway.row(stream.request_id)
    row = gateway.row(message._request_id)
    buckets = ("input_tokens", "cache_read_tokens", "cache_write_5m_tokens", "output_tokens", "cost_nanousd")
    cost = 48 * 2500 + 1024 * 250 + 128 * 3125 + 8 * 10_000
    assert [row[name] for name in buckets] == [48, 1024, 128, 8, cost]
    assert [streamed[name] for name in buckets] == [48, 1024, 128, 8, cost]


def test_usage_that_the_last_event_repeats_is_not_added_up(claude, gateway, upstream):
    events = recordings.message_events(tokens=Tokens(100, 8, cached=60))
    repeated = recordings.message_usage(Tokens(100, 20, cached=60))
    delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": repeated}
    upstream.script(
        "messages", Answer.of_events([*events[:-2], recordings.sse(delta, "message_delta"), events[-1]])
    )
    with claude.messages.stream(model="claude/any", messages=USER, max_tokens=64) as stream:
        stream.until_done()
    row = gateway.row(stream.request_id)
    assert (row["input_tokens"], row["cache_read_tokens"], row["output_tokens"]) == (40, 60, 20)


def test_tool_use_is_relayed_whole_and_streamed_in_pieces(claude, upstream):
    message = say(claude, "claude/parallel-tools", tools=[WEATHER])
    with claude.messages.stream(
        model="claude/parallel-tools", messages=USER, max_tokens=64, tools=[WEATHER]
    ) as stream:
        final = stream.get_final_message()
    assert upstream.last.json["tools"] == [WEATHER]
    for each in (message, final):
        blocks = [block for block in each.content if block.type == "tool_use"]
        assert [block.name for block in blocks] == [tool.name for tool in TWO_TOOLS]
        assert [block.input for block in blocks] == [json.loads(tool.arguments) for tool in TWO_TOOLS]


def test_tokens_are_counted_for_nothing(claude, gateway, upstream):
    raw = claude.messages.with_raw_response.count_tokens(model="claude/plain", messages=USER)
    assert raw.parse().input_tokens == 25
    assert upstream.last.path == "/v1/messages/count_tokens"
    row = gateway.row(raw.headers["request-id"])
    assert (row["dialect"], row["cost_nanousd"]) == ("count_tokens", 0)


def test_the_version_and_the_betas_a_client_asks_for_reach_the_upstream(claude, upstream):
    say(claude, extra_headers={"anthropic-beta": "context-1m,files-api"})
    assert upstream.last.header("anthropic-version") == "2026-10-21"
    assert upstream.last.header("anthropic-beta") == "context-1m,files-api"
    claude.beta.messages.create(model="claude/plain", messages=USER, max_tokens=9, betas=["files-api"])
    assert upstream.last.header("anthropic-beta") == "files-api"


async def test_a_client_that_names_no_version_gets_the_oldest_stable_one(gateway, upstream):
    await ask(gateway, MESSAGES, called(MESSAGES, "claude/plain"))
    assert upstream.last.header("anthropic-version") == "2023-06-01"
    assert upstream.last.header("anthropic-beta") is None


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
@pytest.mark.parametrize(
    ("path", "model"), [(MESSAGES, "claude/plain"), ("/v1/chat/completions", "acme/plain")]
)
async def test_the_key_is_taken_from_either_header_on_every_route_and_never_sent_on(
    gateway, upstream, header, path, model
):
    value = f"Bearer {KEY}" if header == "authorization" else KEY
    answer = await ask(gateway, path, called(path, model), key=None, **{header: value})
    assert answer.status == 200
    names = {name for name, _ in upstream.last.headers}
    assert len(names & {"authorization", "x-api-key"}) == 1
    assert UPSTREAM_KEY in dict(upstream.last.headers).get("x-api-key", "") + dict(upstream.last.headers).get(
        "authorization", ""
    )


def test_both_keys_at_once_count_if_one_is_good(claude, upstream):
    claude.with_options(default_headers={"x-api-key": "sk-of-another-service"}).messages.create(
        model="claude/plain", messages=USER, max_tokens=9
    )
    assert upstream.last.header("x-api-key") == UPSTREAM_KEY


def test_the_request_id_is_where_the_sdk_looks_for_it(claude, gateway):
    message = say(claude)
    assert message._request_id.startswith("req_")
    with pytest.raises(anthropic.NotFoundError) as caught:
        say(claude, "nobody/at-home")
    assert caught.value.request_id.startswith("req_")
    assert caught.value.body["request_id"] == caught.value.request_id


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("status", sorted(CLASSES))
def test_an_upstreams_error_keeps_its_status_class_and_words(claude, due, status, is_stream):
    with pytest.raises(CLASSES[status]) as caught:
        say(claude, f"claude/status-{status}", stream=is_stream)
    error = caught.value
    kind, message = recordings.ANTHROPIC_ERRORS[status]
    assert (error.status_code, error.type, error.api_message) == (status, kind, message)
    assert error.response.content == json.dumps(recordings.error(status, "anthropic")).encode()
    due(error.request_id, status=status, cost_nanousd=0)


def test_the_upstreams_retry_after_is_obeyed(claude, upstream):
    limits = {"anthropic_ratelimit_requests_remaining": "0"}
    upstream.script(
        "messages",
        Answer.of_error(529, "anthropic", retry_after_ms="60", **limits),
        Answer.of_json(recordings.message("at last")),
    )
    raw = claude.with_options(max_retries=1).messages.with_raw_response.create(
        model="claude/plain", messages=USER, max_tokens=9
    )
    assert raw.parse().content[0].text == "at last"
    first, second = upstream.journal
    assert second.received_at - first.received_at >= 0.06
    upstream.clear()
    upstream.script("messages", Answer.of_error(429, "anthropic", **limits))
    with pytest.raises(anthropic.RateLimitError) as caught:
        say(claude)
    assert caught.value.response.headers["retry-after"] == "2"
    assert caught.value.response.headers["anthropic-ratelimit-requests-remaining"] == "0"


@pytest.mark.parametrize(
    ("model", "key", "status", "kind"),
    [
        ("claude/plain", "sk-nobody-00000000", 401, "authentication_error"),
        ("claude/plain", NARROW_KEY, 403, "permission_error"),
        ("nobody/at-home", KEY, 404, "not_found_error"),
        ("acme/plain", KEY, 400, "invalid_request_error"),
        ("claude/reset", KEY, 502, "api_error"),
    ],
)
def test_the_gateways_own_errors_come_in_anthropics_envelope(claude, model, key, status, kind):
    with pytest.raises(CLASSES.get(status, anthropic.APIStatusError)) as caught:
        say(claude.with_options(api_key=key), model)
    body = caught.value.body
    assert (caught.value.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["error"].keys() == {"type", "message"}


def test_models_are_listed_in_anthropics_form(claude):
    page = claude.models.list()
    assert "org/llama-3" in [model.id for model in page.data]
    assert claude.models.retrieve("org/llama-3").type == "model"

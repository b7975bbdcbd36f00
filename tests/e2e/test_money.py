"""What requests cost, through the whole product: to the nano-dollar, once, and never a silent zero."""

import json
import random
from fractions import Fraction
from importlib.metadata import version

import genai_prices
import msgspec
import openai
import pytest

from backends.dialect import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Dialect
from backends.usage import Usage
from tests.e2e import raw
from tests.e2e.conftest import FINE_PRICE, POSITIVE
from tests.e2e.raw import USER, ask, called
from tests.support import answers, recordings
from tests.support.recordings import DONE, Tokens
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e

ROUNDS = 8
BUCKETS = [
    "input_tokens",
    "cache_read_tokens",
    "cache_write_5m_tokens",
    "cache_write_1h_tokens",
    "output_tokens",
    "reasoning_tokens",
    "input_audio_tokens",
    "cache_read_audio_tokens",
    "output_audio_tokens",
]


def a_usage(dialect: Dialect, dice: random.Random) -> Usage:
    """Any that the dialect can say; one in two is above the price tier."""
    largest = dice.choice((5_000, 400_000))
    fresh, cached, written, hour, output = (dice.randrange(largest) for _ in range(5))
    reasoning = dice.randrange(output + 1)
    if dialect is MESSAGES:
        return Usage(fresh, cached, written, hour, output, reasoning)
    if dialect is RESPONSES:
        return Usage(fresh, cached, written, 0, output, reasoning)
    audio = (dice.randrange(fresh + 1), dice.randrange(cached + 1), dice.randrange(output - reasoning + 1))
    return Usage(fresh, cached, written, 0, output, reasoning, *audio)


def fine_cost(usage: Usage) -> int:
    """By the price list and a pocket calculator: exact fractions, rounded once, half to even."""
    rate = {name: Fraction(str(value)) * 1000 for name, value in FINE_PRICE.items() if isinstance(value, str)}
    if usage.prompt_tokens > 200_000:
        rate |= {"input": Fraction("0.0751") * 1000, "output": Fraction("0.6001") * 1000}
    plain_output = usage.output_tokens - usage.reasoning_tokens - usage.output_audio_tokens
    return round(
        (usage.input_tokens - usage.input_audio_tokens) * rate["input"]
        + usage.input_audio_tokens * rate["input_audio"]
        + (usage.cache_read_tokens - usage.cache_read_audio_tokens) * rate["cached_input"]
        + usage.cache_read_audio_tokens * rate["cached_input_audio"]
        + usage.cache_write_5m_tokens * rate["cache_write"]
        + usage.cache_write_1h_tokens * rate["cache_write_1h"]
        + plain_output * rate["output"]
        + usage.reasoning_tokens * rate["reasoning"]
        + usage.output_audio_tokens * rate["output_audio"]
    )


@pytest.mark.parametrize("dialect", [CHAT, COMPLETIONS, RESPONSES, MESSAGES], ids=lambda d: d.name)
async def test_a_streamed_answer_costs_the_same_to_the_nano_dollar_as_an_unstreamed_one(
    gateway, due, upstream, dialect
):
    dice = random.Random(f"seed 7 {dialect.name}")
    usages = [a_usage(dialect, dice) for _ in range(ROUNDS)]
    for usage in usages:
        billed = dict(zip(BUCKETS, msgspec.structs.astuple(usage), strict=True))
        upstream.script(dialect.name, Answer.of_json(answers.whole(dialect, usage, "one two")))
        whole = await ask(gateway, dialect.path, called(dialect.path, "fine"))
        upstream.script(dialect.name, Answer.of_events(answers.stream(dialect, usage, ["one", " two"])))
        streamed = await ask(gateway, dialect.path, called(dialect.path, "fine", stream=True))
        assert whole.headers["x-headgate-cost-usd"] == f"{fine_cost(usage) / 10**9:.9f}"
        for answer in (whole, streamed):
            due(answer.headers["x-request-id"], **billed, cost_nanousd=fine_cost(usage), is_estimated=0)


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_tier_that_was_answered_is_billed_not_the_one_that_was_asked_for(
    client, due, upstream, is_stream
):
    def answer(record, tier):
        document = {**recordings.chat(tokens=Tokens(1000, 100)), "service_tier": tier}
        if not record.fields.get("stream"):
            return Answer.of_json(document)
        chunk = {**document, "choices": [], "object": "chat.completion.chunk"}
        return Answer.of_events([recordings.sse(chunk), DONE])

    standard = fine_cost(Usage(1000, output_tokens=100))
    half = round(Fraction(standard, 2))
    for asked, answered, cost in (
        ("auto", "default", standard),
        ("flex", "default", standard),
        ("auto", "flex", half),
    ):
        upstream.script("chat", lambda record, tier=answered: answer(record, tier))
        result = client.chat.completions.with_raw_response.create(
            model="fine", messages=USER, service_tier=asked, stream=is_stream
        )
        if is_stream:
            list(result.parse())
        assert upstream.last.json["service_tier"] == asked
        due(result.headers["x-request-id"], service_tier=answered, cost_nanousd=cost)


@pytest.mark.parametrize(
    ("path", "provider", "model"),
    [(raw.CHAT, "openai", "gpt-5-mini"), (raw.MESSAGES, "anthropic", "claude-sonnet-4-5")],
)
@pytest.mark.parametrize("prefix", [True, False], ids=["provider/model", "model"])
async def test_a_known_model_costs_what_the_public_price_list_says(
    gateway, due, upstream, path, provider, model, prefix
):
    tokens = Tokens(12_345, 678, cached=10_000)
    if path == raw.CHAT:
        upstream.script("chat", Answer.of_json(recordings.chat(tokens=tokens, model=model)))
    else:
        upstream.script("messages", Answer.of_json(recordings.message(tokens=tokens, model=model)))
    answer = await ask(gateway, path, called(path, f"{provider}/{model}" if prefix else model))
    usage = genai_prices.Usage(input_tokens=12_345, cache_read_tokens=10_000, output_tokens=678)
    listed = genai_prices.calc_price(usage, model, provider_id=provider)
    assert upstream.last.model == model
    due(
        answer.headers["x-request-id"],
        cost_nanousd=int(listed.total_price * 10**9),
        saved_nanousd=POSITIVE,
        price_source=f"genai-prices {version('genai-prices')}",
    )


def test_an_unknown_price_is_never_zero(client, due):
    answer = client.chat.completions.with_raw_response.create(model="picky/plain", messages=USER)
    assert "x-headgate-cost-usd" not in answer.headers
    due(answer.headers["x-request-id"], price_kind="unknown", cost_nanousd=None, output_tokens=8)


def test_an_answer_without_usage_has_an_unknown_cost_and_a_stream_without_usage_an_estimated_one(client, due):
    whole = client.chat.completions.create(model="acme/no-usage", messages=USER)
    due(whole._request_id, ended="completed", cost_nanousd=None, input_tokens=None, is_estimated=0)
    stream = client.chat.completions.create(model="acme/no-usage", messages=USER, stream=True)
    list(stream)
    due(stream.response.headers["x-request-id"], ended="completed", cost_nanousd=POSITIVE, is_estimated=1)


def test_a_usage_of_zero_is_known_and_costs_nothing(client, due):
    answer = client.chat.completions.create(model="acme/zero-usage", messages=USER)
    due(answer._request_id, cost_nanousd=0, output_tokens=0, is_estimated=0)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("failure", ["503", "429", "reset", "cut"])
def test_a_request_that_a_second_endpoint_answered_is_priced_once(client, due, upstreams, failure, is_stream):
    """The endpoint that is asked first fails; a kept connection that dies is tried once more on a fresh one."""
    broken = Answer.of_json(recordings.chat())
    failures = {
        "503": Answer.of_error(503),
        "429": Answer.of_error(429),
        "reset": broken.reset_before_head(),
        "cut": broken.cut_before_head(),
    }
    good = Answer.of_events(recordings.chat_events()) if is_stream else Answer.of_json(recordings.chat())
    asked = []

    def script(number):
        def answer(_):
            asked.append(number)
            return failures[failure] if number == asked[0] else good

        return answer

    for number, upstream in enumerate(upstreams[:2]):
        upstream.script("chat", script(number))
    result = client.chat.completions.with_raw_response.create(model="sturdy", messages=USER, stream=is_stream)
    if is_stream:
        assert list(result.parse())
    assert len(set(asked)) == 2
    assert len(asked) == 2 or failure in ("reset", "cut")
    assert result.headers["x-headgate-attempts"] == "2"
    assert result.headers["x-headgate-target"] == f"gpu/{asked[-1]}"
    due(
        result.headers["x-request-id"],
        attempts=2,
        ended="completed",
        status=200,
        endpoint=f"gpu/{asked[-1]}",
        cost_nanousd=25 * 2500 + 8 * 10_000,
    )


def test_a_request_that_fell_back_to_another_target_costs_what_that_one_costs(client, gateway, upstream):
    answer = client.chat.completions.create(model="spread", messages=USER)
    assert upstream.last.model == "dear"
    row = gateway.row(answer._request_id)
    assert (row["attempts"], row["provider"], row["target"]) == (2, "acme", "acme")
    assert (row["requested_model"], row["served_model"]) == ("spread", "dear")
    assert row["cost_nanousd"] == 25 * 100_000 + 8 * 1_000_000


def test_when_every_endpoint_refuses_the_last_ones_word_is_relayed_and_nothing_is_billed(
    client, gateway, upstreams
):
    for upstream in upstreams:
        upstream.script("chat", Answer.of_error(503, retry_after="3"))
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="sturdy", messages=USER)
    assert caught.value.code == "engine_overloaded"
    assert caught.value.response.headers["retry-after"] == "3"
    row = gateway.row(caught.value.request_id)
    assert (row["attempts"], row["status"], row["cost_nanousd"]) == (2, 503, 0)
    assert len(upstreams.main.journal) == len(upstreams.spare.journal) == 1


def test_a_stream_that_has_begun_is_never_sent_again(client, gateway, upstreams):
    for upstream in upstreams:
        upstream.script("chat", Answer.of_events(recordings.chat_events()).reset_after(2))
    stream = client.chat.completions.create(model="sturdy", messages=USER, stream=True)
    with pytest.raises(openai.APIError):
        list(stream)
    assert len(upstreams.main.journal) + len(upstreams.spare.journal) == 1
    assert gateway.row(stream.response.headers["x-request-id"])["attempts"] == 1


def test_an_error_costs_nothing_even_if_it_speaks_of_usage(client, gateway, upstream):
    told = {**recordings.error(400), "usage": recordings.chat_usage(Tokens())}
    upstream.script("chat", Answer.of_json(told, 400))
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="acme/plain", messages=USER)
    row = gateway.row(caught.value.request_id)
    assert (row["cost_nanousd"], row["input_tokens"]) == (0, None)


def test_the_cost_header_and_the_row_agree(client, gateway):
    answer = client.chat.completions.with_raw_response.create(model="acme/cached", messages=USER)
    row = gateway.row(answer.headers["x-request-id"])
    assert row["cost_nanousd"] == (1200 - 1024) * 2500 + 1024 * 250 + 8 * 10_000
    assert answer.headers["x-headgate-cost-usd"] == "0.000776000"
    assert row["saved_nanousd"] == 1024 * (2500 - 250)
    assert json.loads(answer.content)["usage"]["prompt_tokens_details"]["cached_tokens"] == 1024

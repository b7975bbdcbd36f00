"""Chats with a real engine: what they say, what they cost, and which replica they meet."""

import json
import secrets

import openai
import pytest

from tests.engine.calls import LONG, ask, said, until, user
from tests.engine.conftest import OTHER_KEY
from tests.engine.pools import session_at

pytestmark = pytest.mark.engine

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
# A random model calls no tool by itself.
CALLS_WEATHER = (
    r"<tool_call>\n\{\"name\": \"get_weather\", \"arguments\": \{\"city\": \"Paris\"\}\}\n</tool_call>"
)


def cost_of(row):
    return row["input_tokens"] * 1000 + row["cache_read_tokens"] * 100 + row["output_tokens"] * 4000


def test_a_chat_is_priced_from_the_engines_own_usage(client, gateway):
    raw = ask(client.with_raw_response)
    answer, row = raw.parse(), gateway.row(raw.headers["x-request-id"])
    assert (row["ended"], row["status"], row["is_estimated"], row["served_model"]) == (
        "completed",
        200,
        0,
        "tiny",
    )
    assert row["input_tokens"] + row["cache_read_tokens"] == answer.usage.prompt_tokens
    assert row["output_tokens"] == answer.usage.completion_tokens == 8
    assert row["cost_nanousd"] == cost_of(row)
    assert float(raw.headers["x-headgate-cost-usd"]) == pytest.approx(row["cost_nanousd"] / 1e9)


def test_a_stream_says_the_same_and_costs_the_same_as_the_whole_answer(client, gateway, sessions):
    ask(client, LONG + "first", session=sessions[0])
    whole = ask(client, LONG + "first", session=sessions[0])
    stream = ask(client, LONG + "first", session=sessions[0], stream=True)  # cached as much as the second
    events = list(stream)
    assert all(event.choices for event in events), (
        "the usage event that the client did not ask for was relayed"
    )
    assert said(events) == whole.choices[0].message.content
    row = gateway.row(whole._request_id)
    streamed = gateway.row(stream.response.headers["x-request-id"])
    for column in ("input_tokens", "cache_read_tokens", "output_tokens", "cost_nanousd", "endpoint"):
        assert streamed[column] == row[column], column
    assert (streamed["is_stream"], streamed["is_estimated"], streamed["ended"]) == (1, 0, "completed")


@pytest.mark.parametrize(
    "options", [{"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
def test_usage_is_streamed_to_a_client_that_asks_for_it(client, gateway, options):
    stream = ask(client, stream=True, stream_options=options)
    last = list(stream)[-1]
    row = gateway.row(stream.response.headers["x-request-id"])
    assert last.choices == []
    assert last.usage.completion_tokens == row["output_tokens"] == 8
    assert last.usage.prompt_tokens == row["input_tokens"] + row["cache_read_tokens"]
    assert row["cost_nanousd"] == cost_of(row)


def test_a_client_that_wants_no_usage_gets_its_way_and_an_estimate(client, gateway):
    stream = ask(client, stream=True, stream_options={"include_usage": False})
    assert all(event.choices and not event.usage for event in stream)
    row = gateway.row(stream.response.headers["x-request-id"])
    assert (row["is_estimated"], row["ended"]) == (1, "completed")
    assert row["cost_nanousd"] > 0


def test_a_session_comes_back_to_its_replica_and_pays_the_cached_price(client, gateway, sessions):
    rows = [gateway.row(ask(client, LONG + "agent", session=sessions[1])._request_id) for _ in range(4)]
    assert {row["endpoint"] for row in rows} == {"gpu/1"}
    assert {row["cache_read_tokens"] for row in rows[1:]} == {256}  # all full blocks of 32 tokens
    assert rows[1]["cost_nanousd"] == cost_of(rows[1])
    assert rows[1]["saved_nanousd"] == 256 * 900


def test_tenants_with_the_same_prompt_share_no_cache(client, gateway):
    """One that guesses another's prompt is not told by the clock that it was right."""
    with openai.OpenAI(base_url=gateway.base_url, api_key=OTHER_KEY, max_retries=0, timeout=600) as other:
        homes = {sdk.api_key: session_at(gateway, sdk, "gpu/0") for sdk in (client, other)}
        text = f"{secrets.token_hex(4)}: {LONG}"
        ids = [ask(sdk, text, homes[sdk.api_key])._request_id for sdk in (client, client, other, other)]
    rows = [gateway.row(request_id) for request_id in ids]
    assert {row["endpoint"] for row in rows} == {"gpu/0"}
    cached = [row["cache_read_tokens"] for row in rows]
    assert cached[0] == cached[2] == 0
    assert cached[1] == cached[3] >= 256
    assert [row["cost_nanousd"] for row in rows] == [cost_of(row) for row in rows]


def test_sessions_spread_over_the_replicas_and_a_chat_without_one_is_known_by_its_first_turn(client, gateway):
    """The chance that 16 sessions meet at one of two replicas is 1 in 32,768, and it was settled by the names."""
    of_sessions = {gateway.row(ask(client, session=f"user-{n}")._request_id)["endpoint"] for n in range(16)}
    of_chats = {gateway.row(ask(client, f"Chat {n}")._request_id)["endpoint"] for n in range(16)}
    assert of_sessions == of_chats == {"gpu/0", "gpu/1"}
    again = [gateway.row(ask(client, "Again")._request_id)["session_state"] for _ in range(4)]
    assert "new" not in again[1:]


def test_the_ledger_adds_up_to_the_engines_own_counters(client, claude, gateway, replicas):
    def counted():
        names = ("prompt_tokens_total", "prompt_tokens_cached_total", "generation_tokens_total")
        return [sum(replica.metric(name) for replica in replicas) for name in names]

    before = counted()
    ids = [ask(client, LONG + "sum")._request_id for _ in range(4)]
    for n in range(3):
        stream = ask(client, LONG + "sum", stream=True, max_tokens=5 + n)
        list(stream)
        ids.append(stream.response.headers["x-request-id"])
    ids.append(client.completions.create(model="tiny", prompt=LONG, max_tokens=9)._request_id)
    ids.append(client.responses.create(model="tiny", input=LONG, max_output_tokens=7)._request_id)
    ids.append(claude.messages.create(model="tiny", max_tokens=6, messages=user(LONG))._request_id)
    rows = [gateway.row(request_id) for request_id in ids]
    cached = sum(row["cache_read_tokens"] for row in rows)
    prompts = cached + sum(row["input_tokens"] + row["cache_write_5m_tokens"] for row in rows)
    output = sum(row["output_tokens"] for row in rows)
    assert cached > 0
    until(lambda: [b - a for a, b in zip(before, counted(), strict=True)] == [prompts, cached, output])


def test_fields_that_only_the_engine_knows_survive_both_ways(client):
    """`structured_outputs` forces what a random model would never say; `return_token_ids` comes back."""
    answer = ask(
        client,
        extra_body={"structured_outputs": {"choice": ["headgate"]}, "return_token_ids": True},
        max_tokens=32,
        logprobs=True,
    )
    (choice,) = answer.choices
    assert choice.message.content == "headgate"
    assert len(choice.token_ids) == len(choice.logprobs.content) > 0
    assert len(answer.prompt_token_ids) == answer.usage.prompt_tokens


def test_a_tool_call_comes_whole_and_in_pieces(client):
    forced = {
        "tools": [WEATHER],
        "max_tokens": 64,
        "extra_body": {"structured_outputs": {"regex": CALLS_WEATHER}},
    }
    (choice,) = ask(client, "Weather?", **forced).choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    streamed = [c for event in ask(client, "Weather?", stream=True, **forced) for c in event.choices]
    calls = [call for choice in streamed for call in choice.delta.tool_calls or []]
    assert [call.function.name for call in calls if call.function.name] == ["get_weather"]
    assert len(calls) > 2
    assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"city": "Paris"}
    assert streamed[-1].finish_reason == "tool_calls"


def test_a_json_schema_is_obeyed(client):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = ask(
        client,
        "ok?",
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "ok", "schema": schema, "strict": True},
        },
        max_tokens=32,
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["ok"], bool)

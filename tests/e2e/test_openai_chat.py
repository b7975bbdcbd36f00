"""Chat completions through openai-python: what the SDK sees, what the upstream saw, what was billed."""

import json

import pydantic
import pytest

from tests.e2e.raw import CHAT, USER, ask, called
from tests.support import recordings
from tests.support.catalogue import STRUCTURED, TWO_TOOLS, answer_for
from tests.support.recordings import DONE, Tokens, chat_chunk, chat_usage_chunk
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e

WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}


class Person(pydantic.BaseModel):
    name: str
    age: int
    tags: list[str]


def text_of(chunks):
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_a_chat_is_answered_with_the_upstreams_own_bytes(client, gateway, upstream):
    raw = client.chat.completions.with_raw_response.create(model="acme/plain", messages=USER)
    answer = raw.parse()
    assert raw.content == json.dumps(recordings.chat(model="plain")).encode()
    assert answer.choices[0].message.content == "Hello from upstream"
    assert upstream.last.json == {"model": "plain", "messages": USER}
    row = gateway.row(answer._request_id)
    assert (row["ended"], row["status"], row["dialect"], row["team"]) == ("completed", 200, "chat", "tests")
    assert (row["input_tokens"], row["output_tokens"], row["served_model"]) == (25, 8, "plain")


async def test_the_asynchronous_sdk_gets_the_same(async_client, upstream):
    answer = await async_client.chat.completions.create(model="acme/plain", messages=USER)
    assert answer.choices[0].message.content == "Hello from upstream"
    stream = await async_client.chat.completions.create(model="acme/plain", messages=USER, stream=True)
    assert text_of([chunk async for chunk in stream]) == "Hello from upstream"


def test_a_stream_arrives_event_by_event_with_the_upstreams_own_bytes(client, gateway, upstream):
    options = {"include_usage": True}
    with client.chat.completions.with_streaming_response.create(
        model="acme/plain", messages=USER, stream=True, stream_options=options
    ) as raw:
        request_id = raw.headers["x-request-id"]
        body = b"".join(raw.iter_bytes())
    assert body == b"".join(recordings.chat_events(model="plain"))
    assert upstream.last.json == {
        "model": "plain",
        "messages": USER,
        "stream": True,
        "stream_options": options,
    }
    row = gateway.row(request_id)
    assert (row["ended"], row["is_stream"], row["output_tokens"], row["is_estimated"]) == (
        "completed",
        1,
        8,
        0,
    )


async def test_no_event_is_held_back_or_merged_with_another(async_client, upstream):
    """The upstream sends each event only after the client has had the one before."""
    events = recordings.chat_events("one two three four", tokens=None, model="gated")
    gates = [upstream.gate() for _ in events]
    answer = Answer.of_events(events)
    for number in reversed(range(1, len(events))):
        answer = answer.gate_after(number, gates[number])
    upstream.script("chat", answer)
    stream = await async_client.chat.completions.create(model="acme/gated", messages=USER, stream=True)
    async for number, chunk in _numbered(stream):
        assert chunk.choices
        gates[number].set()
    assert number == len(events) - 1  # all but [DONE]


async def _numbered(stream):
    number = 0
    async for chunk in stream:
        number += 1
        yield number, chunk


def test_a_client_that_did_not_ask_for_usage_gets_no_usage_chunk_and_is_billed_all_the_same(
    client, gateway, upstream
):
    stream = client.chat.completions.create(model="acme/plain", messages=USER, stream=True)
    request_id = stream.response.headers["x-request-id"]
    chunks = list(stream)
    assert all(chunk.choices for chunk in chunks)
    assert text_of(chunks) == "Hello from upstream"
    assert upstream.last.json["stream_options"] == {"include_usage": True}
    row = gateway.row(request_id)
    assert (row["input_tokens"], row["output_tokens"], row["is_estimated"]) == (25, 8, 0)


def test_a_client_that_asked_for_usage_gets_it(client):
    stream = client.chat.completions.create(
        model="acme/plain", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    last = list(stream)[-1]
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (25, 8)


def test_an_explicit_no_to_usage_is_respected_and_the_cost_is_an_estimate(client, gateway, upstream):
    options = {"include_usage": False}
    stream = client.chat.completions.create(
        model="acme/plain", messages=USER, stream=True, stream_options=options
    )
    request_id = stream.response.headers["x-request-id"]
    assert text_of(stream) == "Hello from upstream"
    assert upstream.last.json["stream_options"] == options
    row = gateway.row(request_id)
    assert (row["ended"], row["is_estimated"]) == ("completed", 1)
    assert row["cost_nanousd"] > 0


def test_other_stream_options_survive_the_question_for_usage(client, upstream):
    list(
        client.chat.completions.create(
            model="acme/plain", messages=USER, stream=True, stream_options={"include_obfuscation": False}
        )
    )
    assert upstream.last.json["stream_options"] == {"include_obfuscation": False, "include_usage": True}


def test_an_upstream_that_refuses_fields_is_not_sent_them(client, gateway, upstream):
    def strict(record):
        unknown = {"stream_options", "prompt_cache_key", "safety_identifier"} & record.fields.keys()
        return Answer.of_error(400) if unknown else Answer.of_events(recordings.chat_events(tokens=None))

    upstream.script("/picky/v1/chat/completions", strict)
    stream = client.chat.completions.create(
        model="picky/any",
        messages=USER,
        stream=True,
        prompt_cache_key="k",
        safety_identifier="s",
        extra_body={"kept": 1},
    )
    request_id = stream.response.headers["x-request-id"]
    assert text_of(stream) == "Hello from upstream"
    assert upstream.last.json == {"model": "any", "messages": USER, "stream": True, "kept": 1}
    row = gateway.row(request_id)
    assert (row["is_estimated"], row["price_kind"], row["cost_nanousd"]) == (1, "unknown", None)


@pytest.mark.parametrize("where", ["usage-every", "usage-finish"])
def test_usage_in_the_chunks_themselves_is_relayed_and_billed_once(client, gateway, where):
    stream = client.chat.completions.create(model=f"acme/{where}", messages=USER, stream=True)
    request_id = stream.response.headers["x-request-id"]
    chunks = list(stream)
    assert chunks[-1].usage.completion_tokens == 8
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert gateway.row(request_id)["output_tokens"] == 8


def test_tool_calls_are_relayed_whole_and_streamed(client, upstream):
    answer = client.chat.completions.create(model="acme/tools", messages=USER, tools=[WEATHER])
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Paris", "days": 2},
    )
    assert upstream.last.json["tools"] == [WEATHER]
    with client.chat.completions.stream(model="acme/tools", messages=USER, tools=[WEATHER]) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments


def test_parallel_tool_calls_streamed_in_pieces_come_together(client):
    stream = client.chat.completions.create(
        model="acme/parallel-tools", messages=USER, tools=[WEATHER], stream=True
    )
    arguments, names = {}, {}
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
            names[call.index] = call.function.name or names[call.index]
    assert list(names.values()) == [tool.name for tool in TWO_TOOLS]
    assert list(arguments.values()) == [tool.arguments for tool in TWO_TOOLS]


def test_structured_output_is_parsed_whole_and_streamed(client, upstream):
    answer = client.chat.completions.parse(model="acme/structured", messages=USER, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ada", age=36, tags=["a", "é"])
    sent = upstream.last.json["response_format"]
    assert (sent["type"], sent["json_schema"]["name"], sent["json_schema"]["strict"]) == (
        "json_schema",
        "Person",
        True,
    )
    with client.chat.completions.stream(
        model="acme/structured", messages=USER, response_format=Person
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == STRUCTURED
    assert final.choices[0].message.parsed.age == 36


def test_fields_nobody_here_knows_reach_the_upstream(client, upstream):
    extra = {
        "chat_template_kwargs": {"enable_thinking": False},
        "provider": {"order": ["a", "b"]},
        "reasoning": {"effort": "high"},
        "client_metadata": {"a": None},
    }
    client.chat.completions.create(
        model="acme/plain",
        messages=[*USER, {"role": "assistant", "content": "", "reasoning_content": "hm"}],
        verbosity="low",
        service_tier="flex",
        store=True,
        metadata={"run": "7"},
        safety_identifier="u1",
        prompt_cache_key="k1",
        extra_body=extra,
    )
    sent = upstream.last.json
    assert {name: sent[name] for name in extra} == extra
    assert sent["messages"][1]["reasoning_content"] == "hm"
    named = (sent["verbosity"], sent["service_tier"], sent["store"], sent["metadata"])
    assert named == ("low", "flex", True, {"run": "7"})
    assert (sent["safety_identifier"], sent["prompt_cache_key"]) == ("u1", "k1")


async def test_a_body_is_sent_on_as_it_was_written(gateway, upstreams):
    """Spelling of numbers, escapes, order and blanks included; only the model's name is the upstream's."""
    body = (
        b' {"seed": 9007199254740993, "temperature":1.0, "top_p": 1E-1,\n "messages": [{"role": "user",'
        b' "content": "\\u00e9\\/ \xc3\xa9 \\ud83c\\udf89"}], "model" : "%b", "user":"\\u0061" , "x": null}\n'
    )
    await ask(gateway, CHAT, body % b"acme/plain")
    sent = upstreams.main.last.body
    for part in (
        b"9007199254740993",
        b"1.0",
        b"1E-1",
        rb'"\u00e9\/ ',
        rb"\ud83c\udf89",
        rb'"\u0061"',
        b"null",
    ):
        assert part in sent
    named = json.loads(body % b"plain")
    assert list(json.loads(sent).items()) == list(named.items())
    await ask(gateway, CHAT, body % b"same")  # where nothing must change, nothing does
    (record,) = [r for each in upstreams for r in each.journal if r.model == "same"]
    assert record.body == body % b"same"


def test_fields_nobody_here_knows_reach_the_client(client, upstream):
    extra = {"cost": 0.1, "x_unknown": {"a": [1.0, None]}, "reasoning_items": []}
    document = recordings.chat(reasoning="Let me think", **extra)
    document["choices"][0]["message"]["reasoning"] = "twice"
    upstream.script("chat", Answer.of_json(document))
    answer = client.chat.completions.create(model="acme/any", messages=USER)
    assert answer.model_extra == extra
    assert answer.choices[0].message.model_extra == {
        "reasoning_content": "Let me think",
        "reasoning": "twice",
    }
    assert answer.service_tier == "default"


def test_reasoning_is_streamed_beside_the_answer(client):
    stream = client.chat.completions.create(model="acme/reasoning", messages=USER, stream=True)
    chunks = list(stream)
    thoughts = "".join((c.choices[0].delta.model_extra or {}).get("reasoning_content") or "" for c in chunks)
    assert thoughts == "Let me think about it"
    assert text_of(chunks) == "Hello from upstream"


def test_several_choices_share_one_stream_and_one_bill(client, gateway, upstream):
    def chunk(index, text, finish=None):
        event = json.loads(chat_chunk({"content": text}, finish)[6:])
        event["choices"][0]["index"] = index
        return recordings.sse(event)

    events = [chunk(0, "a"), chunk(1, "x"), chunk(1, "y", "stop"), chunk(0, "b", "length")]
    upstream.script("chat", Answer.of_events([*events, chat_usage_chunk(Tokens(25, 4)), DONE]))
    stream = client.chat.completions.create(model="acme/two", messages=USER, n=2, stream=True)
    request_id = stream.response.headers["x-request-id"]
    texts = {0: "", 1: ""}
    for event in stream:
        texts[event.choices[0].index] += event.choices[0].delta.content
    assert texts == {0: "ab", 1: "xy"}
    assert upstream.last.json["n"] == 2
    assert gateway.row(request_id)["output_tokens"] == 4


def test_the_request_id_is_told_with_every_answer_and_is_the_rows(client, gateway):
    first = client.chat.completions.create(model="acme/plain", messages=USER)
    second = client.chat.completions.create(model="acme/plain", messages=USER)
    assert first._request_id.startswith("req_")
    assert first._request_id != second._request_id
    assert gateway.row(second._request_id)["request_id"] == second._request_id


@pytest.mark.parametrize(
    "delivery",
    ["crlf", "comments", "no-space", "split-1", "split-7", "joined", "close-framed", "crlf+split-3"],
)
async def test_legal_spellings_of_a_stream_pass_byte_for_byte(gateway, upstream, client, delivery):
    model = f"acme/unicode+{delivery}"
    asked = {"include_usage": True}
    whole = await ask(gateway, CHAT, called(CHAT, model, stream=True, stream_options=asked))
    sent = _sent(f"unicode+{delivery}", stream=True, stream_options=asked)
    assert whole.is_complete
    assert whole.body == sent
    stripped = await ask(gateway, CHAT, called(CHAT, model, stream=True))
    usage = sent.index(b'"choices":[],"usage"')
    start, end = sent.rindex(b"data:", 0, usage), sent.index(b"data:", usage)
    comment = b": keep-alive\n\n" if delivery == "comments" else b""
    assert stripped.body == sent[:start] + comment + sent[end:]
    stream = client.chat.completions.create(model=model, messages=USER, stream=True)
    assert text_of(stream) == "Grüße 日本語 🎉 naïve"


def _sent(model, **fields):
    """All the upstream's body bytes for such a call."""
    return answer_for("chat", {"model": model, **fields}).body


@pytest.mark.parametrize("asks", [True, False])
async def test_a_line_of_a_megabyte_passes(gateway, asks):
    options = {"stream_options": {"include_usage": True}} if asks else {}
    answer = await ask(gateway, CHAT, called(CHAT, "acme/huge-line", stream=True, **options))
    events = recordings.chat_events("x" * 1_000_000, model="huge-line")
    assert answer.body == b"".join(events if asks else [*events[:-2], DONE])
    row = gateway.row(answer.headers["x-request-id"])
    assert (row["output_tokens"], row["is_estimated"]) == (8, 0)


async def test_a_chat_over_tls_with_a_private_authority_is_answered(gateway, upstreams):
    answer = await ask(gateway, CHAT, called(CHAT, "tls/plain", stream=True))
    assert answer.body == b"".join(recordings.chat_events(tokens=None, model="plain"))
    assert upstreams.tls.last.header("authorization").startswith("Bearer sk-upstream")

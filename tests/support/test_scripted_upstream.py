"""The fake provider itself: its answers are what SDKs expect, its faults are what they claim, its journal is true."""

import asyncio
import json
from contextlib import asynccontextmanager

import anthropic
import openai
import pytest

from tests.support import recordings
from tests.support.recordings import Tokens
from tests.support.scripted_upstream import Answer, ScriptedUpstream


@pytest.fixture
async def upstream():
    async with await ScriptedUpstream.start() as server:
        yield server


@pytest.fixture
async def client(upstream):
    async with openai.AsyncOpenAI(base_url=f"{upstream.url}/v1", api_key="sk-x", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
async def claude(upstream):
    async with anthropic.AsyncAnthropic(base_url=upstream.url, api_key="sk-x", max_retries=0) as sdk:
        yield sdk


@asynccontextmanager
async def posted(upstream, path="/v1/chat/completions", **fields):
    """A raw connection on which a request has been sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(upstream.url.rpartition(":")[2]))
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-Mixed-Case: Kept\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    writer.write(head + body)
    try:
        yield reader, writer
    finally:
        writer.close()


USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "model", ["plain", "tools", "parallel-tools", "reasoning", "structured", "unicode", "cached"]
)
async def test_the_official_sdk_reads_chat_answers_whole_and_streamed(client, model):
    whole = await client.chat.completions.create(model=model, messages=USER)
    options = {"include_usage": True}
    text, calls, usage = "", {}, None
    async for chunk in await client.chat.completions.create(
        model=model, messages=USER, stream=True, stream_options=options
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                calls[call.index] = calls.get(call.index, "") + call.function.arguments
    said = whole.choices[0].message
    assert text == (said.content or "")
    assert list(calls.values()) == [call.function.arguments for call in said.tool_calls or []]
    assert usage == whole.usage


@pytest.mark.parametrize("tools", [False, True])
async def test_the_official_sdks_read_responses_and_messages(client, claude, tools):
    model = "parallel-tools" if tools else "plain"
    whole = await client.responses.create(model=model, input="hi")
    async with client.responses.stream(model=model, input="hi") as stream:
        streamed = await stream.get_final_response()
    assert [item.type for item in streamed.output] == [item.type for item in whole.output]
    assert streamed.usage == whole.usage
    message = await claude.messages.create(model=model, messages=USER, max_tokens=9)
    async with claude.messages.stream(model=model, messages=USER, max_tokens=9) as stream:
        final = await stream.get_final_message()
    assert [block.type for block in final.content] == [block.type for block in message.content]
    assert [getattr(block, "input", None) for block in final.content] == [
        getattr(block, "input", None) for block in message.content
    ]
    assert final.usage.output_tokens == message.usage.output_tokens


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_embeddings_come_in_both_encodings(client, encoding):
    answer = await client.embeddings.create(model="e", input=["a", "b"], encoding_format=encoding)
    assert len(answer.data) == 2
    default = await client.embeddings.create(model="e", input=["a", "b"])
    assert [item.embedding for item in default.data] == [[0.25, -0.5, 0.0], [0.25, -0.5, 1.0]]


@pytest.mark.parametrize("status", sorted(recordings.OPENAI_ERRORS))
async def test_error_answers_raise_the_class_of_their_status(client, claude, status):
    with pytest.raises(openai.APIStatusError) as failure:
        await client.chat.completions.create(model=f"status-{status}", messages=USER)
    assert failure.value.status_code == status
    with pytest.raises(anthropic.APIStatusError) as failure:
        await claude.messages.create(model=f"status-{status}", messages=USER, max_tokens=9)
    assert failure.value.status_code == status


async def test_scripts_are_chosen_by_path_model_and_header_and_the_last_repeats(upstream, client):
    upstream.script("chat", *(Answer.of_json(recordings.chat(text)) for text in ("first", "then")))
    upstream.script("chat", Answer.of_json(recordings.chat("by model")), model="m")
    upstream.script(
        "/v1/chat/completions", Answer.of_json(recordings.chat("by header")), header=("x-case", "7")
    )

    async def says(model, **headers):
        answer = await client.chat.completions.create(model=model, messages=USER, extra_headers=headers)
        return answer.choices[0].message.content

    assert [await says("x") for _ in range(3)] == ["first", "then", "then"]
    assert await says("m") == "by model"
    assert await says("m", **{"X-Case": "7"}) == "by header"


async def test_the_journal_tells_what_came_in_order_and_how_it_ended(upstream):
    async with posted(upstream, path="/v1/chat/completions?a=b", model="plain", messages=[]) as (reader, _):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        record = await upstream.wait_for()
        assert await record.wait_end() == "complete"
    assert (record.method, record.target, record.path) == (
        "POST",
        "/v1/chat/completions?a=b",
        "/v1/chat/completions",
    )
    assert [name for name, _ in record.headers] == ["Host", "X-Mixed-Case", "Content-Length"]
    assert record.json == {"model": "plain", "messages": []}
    assert record.bytes_sent == len(json.dumps(recordings.chat(model="plain")))


@pytest.mark.parametrize("model", ["hang", "hang-after-2", "late-60000"])
async def test_the_journal_knows_when_the_peer_vanished(upstream, model):
    async with posted(upstream, model=model, stream=True):
        record = await upstream.wait_for()
        assert record.ended == "open"
    assert await record.wait_end() == "peer gone"
    assert record.ended_at is not None


@pytest.mark.parametrize(
    ("model", "ended", "events"),
    [("reset", "reset", 0), ("reset-after-2", "reset", 2), ("cut", "cut", 0), ("cut-after-3", "cut", 3)],
)
async def test_broken_connections_break_where_they_should(upstream, model, ended, events):
    async with posted(upstream, model=model, stream=True) as (reader, _):
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readuntil(b"0\r\n\r\n")
        record = await upstream.wait_for()
    assert (await record.wait_end(), record.parts_sent) == (ended, events)


async def test_deliveries_change_the_bytes_but_not_what_they_mean(upstream, client):
    plain = Answer.of_events(recordings.chat_events("Grüße 日本語 🎉", tokens=Tokens()))
    variations = [plain.crlf(), plain.with_comments(), plain.without_space(), plain.split(7), plain.joined()]
    for variation in (*variations, plain.framed("close"), plain.framed("length"), plain.crlf().split(1)):
        upstream.script("chat", variation)
        stream = await client.chat.completions.create(model="m", messages=USER, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert "".join(parts) == "Grüße 日本語 🎉"


async def test_a_gate_holds_the_answer_until_the_test_opens_it(upstream):
    gate = asyncio.Event()
    events = recordings.chat_events(tokens=None)
    upstream.script("chat", Answer.of_events(events).gate_after(1, gate))
    async with posted(upstream, model="m", stream=True) as (reader, _):
        await reader.readuntil(events[0])
        record = await upstream.wait_for()
        assert record.parts_sent == 1
        gate.set()
        await reader.readuntil(b"[DONE]")


async def test_false_lengths_huge_heads_and_raw_bytes_go_out_as_told(upstream):
    upstream.script("chat", Answer.of_json({"a": 1}).claiming(100), model="short")
    upstream.script("chat", Answer.of_bytes(b"HTTP/1.1 200 OK\r\ngarbage\r\n\r\n"), model="raw")
    async with posted(upstream, model="short") as (reader, _):
        assert b"content-length: 100" in await reader.readuntil(b"\r\n\r\n")
        assert await reader.read(50) == b'{"a": 1}'
    async with posted(upstream, model="raw") as (reader, _):
        assert await reader.read() == b"HTTP/1.1 200 OK\r\ngarbage\r\n\r\n"
    async with posted(upstream, model="huge-header") as (reader, _):
        while not (await reader.readexactly(60_000)).endswith(b"h" * 50_000):
            pass

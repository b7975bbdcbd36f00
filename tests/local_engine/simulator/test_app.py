"""The simulator as a process: its surface through the official SDKs, and its habits on the wire."""

import asyncio
import json

import aiohttp
import jsonschema
import openai
import pytest

from local_engine.simulator import FINGERPRINT
from local_engine.simulator.speech import STATEMENT
from tests.support.simulator_process import SimulatorProcess

LONG = [
    {"role": "system", "content": "You keep the gate. " * 120},
    {"role": "user", "content": "How high is it?"},
]
USER = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
CHAT = "/v1/chat/completions"


async def streamed_chat(client, **fields):
    """Text, tool arguments, finish reason and usage of a streamed chat answer."""
    text, arguments, finish, usage = "", "", None, None
    stream = await client.chat.completions.create(
        model="demo", stream=True, stream_options={"include_usage": True}, **fields
    )
    async for chunk in stream:
        for choice in chunk.choices:
            assert usage is None, "usage comes last"
            text += choice.delta.content or ""
            arguments += "".join(call.function.arguments for call in choice.delta.tool_calls or [])
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    return text, arguments, finish, usage


async def test_chat_says_the_same_whole_and_streamed_and_says_that_it_is_a_simulator(client):
    whole = await client.chat.completions.create(model="demo", messages=USER)
    text, _, finish, usage = await streamed_chat(client, messages=USER)
    assert whole.choices[0].message.content == text
    assert text.startswith(STATEMENT)
    assert whole.system_fingerprint == FINGERPRINT
    assert whole.choices[0].finish_reason == finish == "stop"
    assert whole.usage == usage


async def test_the_same_long_prompt_again_is_cached_in_every_dialect(client, claude):
    chat = {"model": "demo", "messages": [*LONG, {"role": "user", "content": "in chat"}], "max_tokens": 4}
    first = (await client.chat.completions.create(**chat)).usage
    second = (await client.chat.completions.create(**chat)).usage
    assert second.prompt_tokens_details.cached_tokens > 500
    assert second.prompt_tokens_details.cached_tokens % 16 == 0
    assert second.prompt_tokens_details.cached_tokens < second.prompt_tokens == first.prompt_tokens

    response = {
        "model": "demo",
        "instructions": LONG[0]["content"],
        "input": "in responses",
        "max_output_tokens": 4,
    }
    assert (await client.responses.create(**response)).usage.input_tokens_details.cached_tokens > 500

    message = {"model": "demo", "system": LONG[0]["content"], "messages": USER, "max_tokens": 4}
    usage = (await claude.messages.create(**message)).usage
    counted = await claude.messages.count_tokens(model="demo", system=LONG[0]["content"], messages=USER)
    parts = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
    assert usage.cache_read_input_tokens > 500
    assert parts == counted.input_tokens


async def test_a_cache_salt_keeps_tenants_apart(client):
    async def cached(salt):
        prompt = {"model": "demo", "prompt": "salted " * 100, "extra_body": {"cache_salt": salt}}
        usage = (await client.completions.create(**prompt)).usage
        return usage.prompt_tokens_details.cached_tokens

    assert await cached("tenant-a") == 0
    assert await cached("tenant-b") == 0
    assert await cached("tenant-a") > 80


async def test_a_conversation_goes_on_from_the_cache_of_its_own_answer(client):
    messages = [{"role": "user", "content": "Tell me about the river. " * 10}]
    for _ in range(3):
        answer = await client.chat.completions.create(model="demo", messages=messages)
        messages += [{"role": "assistant", "content": answer.choices[0].message.content}, *USER]
    known = answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = await client.chat.completions.create(model="demo", messages=messages)
    assert known - 32 <= again.usage.prompt_tokens_details.cached_tokens <= known


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_a_required_or_named_tool_is_called_with_arguments_that_fit_its_schema(client, choice):
    fields = {"messages": USER, "tools": [TOOL], "tool_choice": choice}
    whole = await client.chat.completions.create(model="demo", **fields)
    text, arguments, finish, _ = await streamed_chat(client, **fields)
    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert call.function.arguments == arguments
    jsonschema.validate(json.loads(arguments), SCHEMA)
    assert text == ""
    assert whole.choices[0].finish_reason == finish == ("tool_calls" if choice == "required" else "stop")


async def test_with_auto_a_tool_is_called_when_the_user_names_it_and_not_after_its_result(client):
    asks = [{"role": "user", "content": "Please use get_weather for Rome."}]
    answer = await client.chat.completions.create(model="demo", messages=asks, tools=[TOOL])
    (call,) = answer.choices[0].message.tool_calls
    told = [
        *asks,
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"},
    ]
    answer = await client.chat.completions.create(model="demo", messages=told, tools=[TOOL])
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content.startswith(STATEMENT)


async def test_structured_answers_fit_their_schema_in_every_dialect(client, claude):
    shape = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    chat = await client.chat.completions.create(model="demo", messages=USER, response_format=shape)
    form = {"format": {"type": "json_schema", "name": "trip", "schema": SCHEMA}}
    response = await client.responses.create(model="demo", input="hi", text=form)
    output = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    message = await claude.messages.create(model="demo", messages=USER, max_tokens=99, extra_body=output)
    for text in (chat.choices[0].message.content, response.output_text, message.content[0].text):
        jsonschema.validate(json.loads(text), SCHEMA)
    loose = await client.chat.completions.create(
        model="demo", messages=USER, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(loose.choices[0].message.content), dict)


@pytest.mark.parametrize("with_tool", [False, True])
async def test_responses_stream_to_the_same_response(client, with_tool):
    tool = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}
    fields = {
        "model": "demo",
        "input": "hi",
        **({"tools": [tool], "tool_choice": "required"} if with_tool else {}),
    }
    whole = await client.responses.create(**fields)
    async with client.responses.stream(**fields) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert final.output_text == whole.output_text
    assert final.output[0].type == whole.output[0].type == ("function_call" if with_tool else "message")
    assert final.usage.output_tokens == whole.usage.output_tokens


async def test_a_response_that_was_cut_is_incomplete(client):
    events = [
        e
        async for e in await client.responses.create(
            model="demo", input="hi", max_output_tokens=3, stream=True
        )
    ]
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.usage.output_tokens == 3


@pytest.mark.parametrize("with_tool", [False, True])
async def test_messages_stream_to_the_same_message(claude, with_tool):
    tools = {"tools": [{"name": "get_weather", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}}
    fields = {"model": "demo", "messages": USER, "max_tokens": 200, **(tools if with_tool else {})}
    whole = await claude.messages.create(**fields)
    async with claude.messages.stream(**fields) as stream:
        final = await stream.get_final_message()
    assert final.stop_reason == whole.stop_reason == ("tool_use" if with_tool else "end_turn")
    if with_tool:
        assert final.content[0].input == whole.content[0].input
        jsonschema.validate(final.content[0].input, SCHEMA)
    else:
        assert final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens


async def test_completions_take_several_prompts_token_ids_samples_and_echo(client, http):
    tokens = (await (await http.post("/tokenize", json={"prompt": "by the mill"})).json())["tokens"]
    answer = await client.completions.create(
        model="demo", prompt=[tokens, tokens], n=2, echo=True, max_tokens=60
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.text.startswith("by the mill" + STATEMENT) for choice in answer.choices)
    assert len({choice.text for choice in answer.choices}) == 4, "samples differ"
    assert answer.usage.prompt_tokens == 2 * len(tokens)
    parts = dict.fromkeys(range(4), "")
    async for chunk in await client.completions.create(
        model="demo", prompt=[tokens, tokens], n=2, echo=True, max_tokens=60, stream=True
    ):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(parts.values()) == [choice.text for choice in answer.choices]


async def test_stop_strings_end_an_answer_before_themselves(client):
    answer = await client.chat.completions.create(model="demo", messages=USER, stop=[": no", "zzz"])
    text, *_ = await streamed_chat(client, messages=USER, stop=[": no", "zzz"])
    assert answer.choices[0].message.content == text == STATEMENT.partition(": no")[0]
    assert answer.choices[0].finish_reason == "stop"


async def test_ignore_eos_and_min_tokens_lengthen_an_answer(client):
    async def tokens(**extra):
        answer = await client.chat.completions.create(
            model="demo", messages=USER, max_completion_tokens=300, extra_body=extra
        )
        return answer.usage.completion_tokens, answer.choices[0].finish_reason

    assert await tokens(ignore_eos=True) == (300, "length")
    count, reason = await tokens(min_tokens=200)
    assert 200 <= count < 300
    assert reason == "stop"


async def test_embeddings_are_near_for_texts_that_share_words(client):
    texts = ["the cat sits on the mat", "a cat on the mat", "stock prices fell sharply"]
    answer = await client.embeddings.create(model="demo", input=texts)
    floats = await client.embeddings.create(model="demo", input=texts, encoding_format="float")
    cat, mat, stock = (item.embedding for item in floats.data)
    assert answer.data[0].embedding == pytest.approx(cat, abs=1e-6)

    def near(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert near(cat, cat) == pytest.approx(1)
    assert near(cat, mat) > 0.4 > near(cat, stock)
    short = await client.embeddings.create(model="demo", input="x", dimensions=8)
    assert len(short.data[0].embedding) == 8


async def test_detokenize_undoes_tokenize_and_the_count_is_what_is_billed(client, http):
    text = "Grüße, 日本語 and some_code(x)\n\tdone 🎉"
    tokens = await (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert "".join(tokens["token_strs"]) == text
    back = await (await http.post("/detokenize", json={"tokens": tokens["tokens"]})).json()
    assert back == {"prompt": text}
    counted = await (await http.post("/tokenize", json={"messages": LONG})).json()
    answer = await client.chat.completions.create(model="demo", messages=LONG, max_tokens=1)
    assert counted["count"] == answer.usage.prompt_tokens


async def test_continuous_usage_counts_up_without_details(http):
    body = {"model": "demo", "messages": USER, "stream": True, "max_tokens": 5}
    options = {"include_usage": True, "continuous_usage_stats": True}
    text = await (await http.post(CHAT, json={**body, "stream_options": options})).text()
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 1, 2, 3, 4, 5, 5]
    assert all("prompt_tokens_details" not in event["usage"] for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_usage_is_not_streamed_unless_asked_for(http):
    for options in ({}, {"stream_options": {"include_usage": False}}):
        answer = await http.post(CHAT, json={"model": "demo", "messages": USER, "stream": True, **options})
        text = await answer.text()
        assert '"usage"' not in text
        assert text.endswith("data: [DONE]\n\n")


async def test_metrics_agree_with_what_callers_were_told():
    with SimulatorProcess() as simulator:
        async with openai.AsyncOpenAI(base_url=f"{simulator.url}/v1", api_key="none") as client:
            told = {"prompt": 0, "output": 0, "cached": 0}
            for turn in range(6):
                fields = {"messages": [*LONG, *USER * turn], "max_tokens": 20 + 20 * turn}
                *_, usage = await streamed_chat(client, **fields)
                told["prompt"] += usage.prompt_tokens
                told["output"] += usage.completion_tokens
                told["cached"] += usage.prompt_tokens_details.cached_tokens
        seen = simulator.metrics()
    assert told["cached"] > 1000
    assert seen["prompt_tokens_total"] == seen["prefix_cache_queries_total"] == told["prompt"]
    assert seen["prompt_tokens_cached_total"] == seen["prefix_cache_hits_total"] == told["cached"]
    assert seen['prompt_tokens_by_source_total{source="local_cache_hit"}'] == told["cached"]
    assert seen["generation_tokens_total"] == told["output"]
    finished = sum(value for name, value in seen.items() if name.startswith("request_success_total"))
    assert (
        finished
        == seen["e2e_request_latency_seconds_count"]
        == seen["time_to_first_token_seconds_count"]
        == 6
    )
    assert seen["inter_token_latency_seconds_count"] == told["output"] - 6
    assert (seen["num_requests_running"], seen["num_requests_waiting"], seen["kv_cache_usage_perc"]) == (
        0,
        0,
        0,
    )


async def test_the_request_id_comes_back_on_answers_streams_and_errors(http):
    headers = {"x-request-id": "abc-1"}
    for body in ({"messages": USER}, {"messages": USER, "stream": True}, {"messages": 5}):
        async with http.post(CHAT, json=body, headers=headers) as answer:
            assert answer.headers["x-request-id"] == "abc-1"
            text = await answer.text()
    async with http.post(CHAT, json={"messages": USER}, headers=headers) as answer:
        assert (await answer.json())["id"] == "chatcmpl-abc-1", text


async def test_plain_routes_answer(http, client):
    for path in ("/health", "/ping"):
        assert (await http.get(path)).status == 200
    assert (await (await http.get("/version")).json())["simulator"] == FINGERPRINT
    assert (await (await http.get("/load")).json()) == {"server_load": 0}
    (card,) = (await client.models.list()).data
    assert (card.id, card.max_model_len) == ("demo", 8192)


async def gauge_becomes(simulator, name, value, within_s=30.0):
    """Wait until a metric has a value: the only way to see inside another process."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + within_s
    while (seen := (await asyncio.to_thread(simulator.metrics))[name]) != value:
        assert loop.time() < ends_at, f"{name} is {seen}, not {value}"
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("stage", ["before the first token", "in the stream", "unstreamed"])
async def test_a_client_that_leaves_frees_its_place_and_its_blocks(stage):
    slow = {"prefill_overhead_us": 60_000_000} if stage == "before the first token" else {}
    with SimulatorProcess(time_scale=1, max_num_seqs=1, decode_us_per_token=50_000, **slow) as simulator:
        body = json.dumps({"messages": LONG, "stream": stage != "unstreamed", "ignore_eos": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", simulator.port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        if stage == "in the stream":
            await reader.readuntil(b"simul")
        await gauge_becomes(simulator, "num_requests_running", 1)
        assert simulator.metrics()["kv_cache_usage_perc"] > 0
        writer.close()
        await gauge_becomes(simulator, "num_requests_running", 0)
        assert simulator.metrics()["kv_cache_usage_perc"] == 0
        assert json.loads(simulator.get("/load")) == {"server_load": 0}


async def test_more_waiting_than_allowed_is_answered_503_as_vllm_does():
    with SimulatorProcess(time_scale=1, max_num_seqs=1, max_num_queued_reqs=1) as simulator:
        async with aiohttp.ClientSession(simulator.url) as http:
            body = {"messages": USER, "ignore_eos": True, "max_tokens": 5000}
            running = asyncio.ensure_future(http.post(CHAT, json=body))
            await gauge_becomes(simulator, "num_requests_running", 1)
            waiting = asyncio.ensure_future(http.post(CHAT, json=body))
            await gauge_becomes(simulator, "num_requests_waiting", 1)
            async with http.post(CHAT, json=body) as refused:
                assert refused.status == 503
                error = (await refused.json())["error"]
            assert "currently busy" in error["message"]
            assert (error["type"], error["code"]) == ("Service Unavailable", 503)
            assert "retry-after" not in refused.headers
            running.cancel()
            waiting.cancel()
            await asyncio.gather(running, waiting, return_exceptions=True)
            await gauge_becomes(simulator, "num_requests_waiting", 0)
        assert simulator.metrics()['admission_rejections_total{reason="max_num_queued_reqs"}'] == 1

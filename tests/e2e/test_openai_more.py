"""Embeddings, Responses, legacy completions and models through openai-python."""

import json

import pytest

from tests.e2e.conftest import NARROW_KEY
from tests.e2e.raw import COMPLETIONS, EMBEDDINGS, RESPONSES, ask, called
from tests.support import recordings
from tests.support.catalogue import TWO_TOOLS

pytestmark = pytest.mark.e2e

VECTORS = [[0.25, -0.5, 0.0], [0.25, -0.5, 1.0]]


def test_embeddings_are_asked_for_in_base64_by_default_and_relayed_so(client, gateway, upstream):
    raw = client.embeddings.with_raw_response.create(model="acme/plain", input=["a", "b"])
    answer = raw.parse()
    assert [item.embedding for item in answer.data] == VECTORS
    assert upstream.last.json["encoding_format"] == "base64"
    assert raw.content == json.dumps(recordings.embeddings(VECTORS, encoding="base64")).encode()
    row = gateway.row(raw.headers["x-request-id"])
    assert (row["dialect"], row["input_tokens"], row["output_tokens"]) == ("embeddings", 5, 0)
    assert row["cost_nanousd"] == 5 * 2500


def test_embeddings_asked_for_as_numbers_come_as_numbers(client, upstream):
    answer = client.embeddings.create(
        model="acme/plain", input=["a", "b"], encoding_format="float", dimensions=3
    )
    assert [item.embedding for item in answer.data] == VECTORS
    assert (upstream.last.json["encoding_format"], upstream.last.json["dimensions"]) == ("float", 3)


async def test_no_encoding_is_added_to_a_request_for_embeddings(gateway, upstream):
    answer = await ask(gateway, EMBEDDINGS, {"model": "acme/plain", "input": [[1, 2, 3]]})
    assert upstream.last.json == {"model": "plain", "input": [[1, 2, 3]]}
    assert json.loads(answer.body)["data"][0]["embedding"] == [0.25, -0.5, 0.0]


def test_a_response_is_answered_with_the_upstreams_own_bytes(client, gateway, upstream):
    fields = {"include": ["reasoning.encrypted_content"], "store": False, "prompt_cache_key": "thread-1"}
    raw = client.responses.with_raw_response.create(model="acme/plain", input="hi", **fields)
    answer = raw.parse()
    assert answer.output_text == "Hello from upstream"
    assert raw.content == json.dumps(recordings.response(model="plain")).encode()
    assert upstream.last.path == "/v1/responses"
    assert upstream.last.json == {"model": "plain", "input": "hi", **fields}
    row = gateway.row(answer._request_id)
    assert (row["dialect"], row["input_tokens"], row["output_tokens"]) == ("responses", 25, 8)


def test_a_streamed_response_arrives_with_its_event_names_and_its_end(client, gateway):
    with client.responses.stream(model="acme/plain", input="hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output_text == "Hello from upstream"
    assert final.usage.total_tokens == 33


async def test_a_streamed_response_passes_byte_for_byte_and_is_billed(gateway, upstream):
    answer = await ask(gateway, RESPONSES, called(RESPONSES, "acme/plain", stream=True))
    assert answer.body == b"".join(recordings.response_events(model="plain"))
    assert "stream_options" not in upstream.last.json
    row = gateway.row(answer.headers["x-request-id"])
    assert (row["ended"], row["output_tokens"], row["is_estimated"]) == ("completed", 8, 0)


async def test_a_response_in_the_background_is_refused_where_nobody_could_ask_for_it(gateway, upstream):
    for wish, code in ((True, "no_queue"), ("yes", "invalid_field"), (1, "invalid_field")):
        answer = await ask(gateway, RESPONSES, {**called(RESPONSES, "acme/plain"), "background": wish})
        error = json.loads(answer.body)["error"]
        assert (answer.status, error["code"], error["param"]) == (400, code, "background")
    assert upstream.journal == []
    answer = await ask(gateway, RESPONSES, {**called(RESPONSES, "acme/plain"), "background": False})
    assert answer.status == 200
    assert upstream.last.json["background"] is False


def test_function_calls_of_a_response_are_relayed_whole_and_streamed(client):
    tools = [{"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {}}}]
    answer = client.responses.create(model="acme/parallel-tools", input="hi", tools=tools)
    with client.responses.stream(model="acme/parallel-tools", input="hi", tools=tools) as stream:
        streamed = stream.get_final_response()
    for response in (answer, streamed):
        assert [item.name for item in response.output] == [tool.name for tool in TWO_TOOLS]
        assert [item.arguments for item in response.output] == [tool.arguments for tool in TWO_TOOLS]


async def test_responses_through_the_asynchronous_sdk(async_client):
    answer = await async_client.responses.create(model="acme/plain", input="hi")
    assert answer.output_text == "Hello from upstream"
    deltas = [
        event.delta
        async for event in await async_client.responses.create(model="acme/plain", input="hi", stream=True)
        if event.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == "Hello from upstream"


def test_legacy_completions_are_relayed_whole_and_streamed_without_an_unasked_usage_chunk(
    client, gateway, upstream
):
    answer = client.completions.create(model="acme/plain", prompt="hi")
    assert answer.choices[0].text == "Hello from upstream"
    stream = client.completions.create(model="acme/plain", prompt="hi", stream=True)
    request_id = stream.response.headers["x-request-id"]
    chunks = list(stream)
    assert all(chunk.choices for chunk in chunks)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello from upstream"
    assert upstream.last.json["stream_options"] == {"include_usage": True}
    streamed, whole = gateway.row(request_id), gateway.row(answer._request_id)
    assert streamed["dialect"] == whole["dialect"] == "completions"
    assert streamed["cost_nanousd"] == whole["cost_nanousd"] == 142_500


async def test_a_streamed_completion_passes_byte_for_byte(gateway):
    body = called(COMPLETIONS, "acme/plain", stream=True, stream_options={"include_usage": True})
    answer = await ask(gateway, COMPLETIONS, body)
    assert answer.body == b"".join(recordings.completion_events(model="plain"))


def test_models_are_listed_and_retrieved_by_ids_with_slashes(client, upstream):
    models = {model.id: model for model in client.models.list()}
    assert {"org/llama-3", "llama", "sturdy"} <= models.keys()
    assert models["org/llama-3"].object == "model"
    assert isinstance(models["org/llama-3"].created, int)
    assert client.models.retrieve("org/llama-3").id == "org/llama-3"
    assert upstream.journal == []


async def test_a_models_id_may_be_sent_plain_or_percent_encoded(gateway):
    for path in ("/v1/models/org/llama-3", "/v1/models/org%2Fllama-3"):
        answer = await ask(gateway, path, method="GET")
        assert (answer.status, json.loads(answer.body)["id"]) == (200, "org/llama-3")


def test_a_key_sees_only_the_models_it_may_use(client):
    narrow = client.with_options(api_key=NARROW_KEY)
    assert [model.id for model in narrow.models.list()] == ["org/llama-3"]
    assert narrow.models.retrieve("org/llama-3").id == "org/llama-3"

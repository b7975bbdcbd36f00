"""Every dialect of a real engine through the gateway: answers, money, errors, and what of the engine stays hidden."""

import anthropic
import openai
import pytest

from tests.engine.calls import LONG, ask, user
from tests.engine.conftest import ENGINE_KEY

pytestmark = pytest.mark.engine

TOO_LONG = LONG * 80
BUCKETS = ("input_tokens", "cache_read_tokens", "cache_write_5m_tokens", "output_tokens")


def buckets_of(row):
    assert (row["ended"], row["is_estimated"]) == ("completed", 0)
    return {name: row[name] for name in BUCKETS}


def test_a_response_comes_whole_and_streamed_for_the_same_money(client, gateway, sessions):
    call = {"model": "tiny", "input": LONG + "response", "max_output_tokens": 8, "temperature": 0}
    client.responses.create(**call, extra_headers={"x-session-id": sessions[0]})
    whole = client.responses.create(**call, extra_headers={"x-session-id": sessions[0]})
    stream = client.responses.create(**call, extra_headers={"x-session-id": sessions[0]}, stream=True)
    events = list(stream)
    assert events[0].type == "response.created"
    assert events[-1].type in {"response.completed", "response.incomplete"}
    assert events[-1].response.output_text == whole.output_text
    row = gateway.row(whole._request_id)
    streamed = gateway.row(stream.response.headers["x-request-id"])
    assert buckets_of(streamed) == buckets_of(row)
    assert streamed["cost_nanousd"] == row["cost_nanousd"] > 0
    assert row["cache_read_tokens"] == whole.usage.input_tokens_details.cached_tokens == 256
    assert row["output_tokens"] == whole.usage.output_tokens == 8


def test_a_message_comes_whole_and_streamed_for_the_same_money(claude, gateway, sessions):
    """The first event of vLLM's stream knows nothing of its cache: the last one counts."""
    call = {
        "model": "tiny",
        "messages": user(LONG + "message"),
        "max_tokens": 8,
        "extra_body": {"temperature": 0},
        "extra_headers": {"x-session-id": sessions[0]},
    }
    claude.messages.create(**call)
    whole = claude.messages.create(**call)
    with claude.messages.stream(**call) as stream:
        final = stream.get_final_message()
        request_id = stream.response.headers["request-id"]
    assert [block.text for block in final.content] == [block.text for block in whole.content]
    row, streamed = gateway.row(whole._request_id), gateway.row(request_id)
    assert buckets_of(streamed) == buckets_of(row)
    assert streamed["cost_nanousd"] == row["cost_nanousd"] > 0
    assert row["cache_read_tokens"] == whole.usage.cache_read_input_tokens == 256
    assert row["input_tokens"] == whole.usage.input_tokens


def test_a_completion_comes_whole_and_streamed_for_the_same_money(client, gateway, sessions):
    call = {
        "model": "tiny",
        "prompt": LONG + "completion",
        "max_tokens": 8,
        "temperature": 0,
        "extra_headers": {"x-session-id": sessions[0]},
    }
    client.completions.create(**call)
    whole = client.completions.create(**call)
    stream = client.completions.create(**call, stream=True)
    events = list(stream)
    assert all(event.choices for event in events)
    assert "".join(event.choices[0].text for event in events) == whole.choices[0].text
    row = gateway.row(whole._request_id)
    streamed = gateway.row(stream.response.headers["x-request-id"])
    assert buckets_of(streamed) == buckets_of(row)
    assert streamed["cost_nanousd"] == row["cost_nanousd"] > 0
    assert row["cache_read_tokens"] == 256


def test_the_same_conversation_costs_the_same_in_every_dialect(client, claude, gateway):
    """Each text is new to the engine: nothing is cached yet."""
    ids = [
        ask(client, "1" + LONG)._request_id,
        client.responses.create(
            model="tiny", input="2" + LONG, max_output_tokens=8, temperature=0
        )._request_id,
        claude.messages.create(
            model="tiny", messages=user("3" + LONG), max_tokens=8, extra_body={"temperature": 0}
        )._request_id,
    ]
    rows = [gateway.row(request_id) for request_id in ids]
    prompts = {row["input_tokens"] + row["cache_write_5m_tokens"] for row in rows}
    assert [row["cache_read_tokens"] for row in rows] == [0, 0, 0]
    assert {row["output_tokens"] for row in rows} == {8}
    (prompt,) = prompts
    assert {row["cost_nanousd"] for row in rows} == {prompt * 1000 + 8 * 4000}


def test_counting_a_messages_tokens_is_free(claude, gateway):
    counted = claude.messages.with_raw_response.count_tokens(model="tiny", messages=user(LONG))
    message = claude.messages.create(model="tiny", messages=user(LONG), max_tokens=1)
    row = gateway.row(counted.headers["request-id"])
    assert (row["dialect"], row["cost_nanousd"], row["output_tokens"]) == ("count_tokens", 0, None)
    used = message.usage
    assert counted.parse().input_tokens == (
        used.input_tokens + used.cache_read_input_tokens + used.cache_creation_input_tokens
    )


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_texts_are_embedded(client, gateway, encoding):
    answer = client.embeddings.create(
        model="org/tiny-embed", input=["a headgate", "a spillway"], encoding_format=encoding
    )
    assert [len(item.embedding) for item in answer.data] == (
        [128, 128] if encoding == "float" else [684, 684]
    )
    row = gateway.row(answer._request_id)
    assert row["input_tokens"] == answer.usage.prompt_tokens > 2
    assert (row["output_tokens"], row["cost_nanousd"]) == (0, row["input_tokens"] * 20)


def test_the_sdks_own_encoding_of_embeddings_gives_the_same_numbers(client):
    """It asks for base64 by itself."""
    call = {"model": "org/tiny-embed", "input": "water"}
    (packed,) = client.embeddings.create(**call).data
    (plain,) = client.embeddings.create(**call, encoding_format="float").data
    assert packed.embedding == pytest.approx(plain.embedding, abs=1e-6)
    assert sum(number**2 for number in packed.embedding) == pytest.approx(1, abs=0.01)


def test_models_are_listed_by_their_public_names(client, claude):
    names = {"tiny", "org/tiny-embed", "misnamed"}
    assert {model.id for model in client.models.list()} == names
    assert {model.id for model in claude.models.list()} == names
    assert client.models.retrieve("org/tiny-embed").id == "org/tiny-embed"


@pytest.mark.parametrize(
    "path", ["/tokenize", "/detokenize", "/v1/load_lora_adapter", "/reset_prefix_cache", "/metrics", "/sleep"]
)
def test_the_engines_other_paths_are_not_reachable(gateway, path):
    status, _, body = gateway.post(path, {"model": "tiny", "prompt": "hi"})
    assert (status, b'"code":"unknown_url"' in body) == (404, True)


def test_a_client_cannot_choose_the_engines_rank(client, replicas):
    """The engine answers 400 to a rank it does not have."""
    rank = {"x-data-parallel-rank": "7"}
    with (
        openai.OpenAI(base_url=replicas[0].base_url, api_key=ENGINE_KEY, default_headers=rank) as direct,
        pytest.raises(openai.BadRequestError, match="rank"),
    ):
        ask(direct)
    ask(client.with_options(default_headers=rank))


ERRORS = {
    "a chat too long": (lambda sdk, _: ask(sdk, TOO_LONG), openai.BadRequestError),
    "a stream too long": (lambda sdk, _: ask(sdk, TOO_LONG, stream=True), openai.BadRequestError),
    "a bad parameter": (lambda sdk, _: ask(sdk, temperature=-3), openai.BadRequestError),
    "a model it does not know": (
        lambda sdk, _: sdk.chat.completions.create(model="misnamed", messages=user("hi")),
        openai.NotFoundError,
    ),
    "a response's model": (
        lambda sdk, _: sdk.responses.create(model="misnamed", input="hi"),
        openai.NotFoundError,
    ),
    "a text too long to embed": (
        lambda sdk, _: sdk.embeddings.create(model="org/tiny-embed", input=TOO_LONG),
        openai.BadRequestError,
    ),
    "a message too long": (
        lambda _, sdk: sdk.messages.create(model="tiny", messages=user(TOO_LONG), max_tokens=1),
        anthropic.BadRequestError,
    ),
    "a message's model": (
        lambda _, sdk: sdk.messages.create(model="misnamed", messages=user("hi"), max_tokens=1),
        anthropic.NotFoundError,
    ),
}


@pytest.mark.parametrize(("call", "error"), ERRORS.values(), ids=ERRORS)
def test_the_engines_own_error_has_its_class_and_costs_nothing(client, claude, gateway, call, error):
    with pytest.raises(error) as caught:
        call(client, claude)
    assert caught.value.body
    row = gateway.row(caught.value.request_id)
    assert (row["status"], row["ended"], row["attempts"]) == (caught.value.status_code, "completed", 1)
    assert (row["cost_nanousd"], row["input_tokens"], row["output_tokens"]) == (0, None, None)

"""What is answered before any upstream is asked: wrong dialects, paths, methods and bodies, in the API's own form."""

import gzip
import json

import anthropic
import openai
import pytest

from tests.e2e.raw import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES, ask, called, request
from tests.support import recordings
from tests.support.rawcli import RawClient
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e

COUNT = "/v1/messages/count_tokens"


def assert_openai_error(answer, status, code):
    error = json.loads(answer.body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (answer.status, error["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    return error


def assert_anthropic_error(answer, status, kind):
    body = json.loads(answer.body)
    assert (answer.status, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["error"].keys() == {"type", "message"}
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == body["request_id"]
    return body["error"]


@pytest.mark.parametrize(
    ("path", "model", "served_on"),
    [
        (CHAT, "claude/plain", [MESSAGES]),
        (RESPONSES, "claude/plain", [MESSAGES]),
        (EMBEDDINGS, "claude/plain", [MESSAGES]),
        (COMPLETIONS, "claude/plain", [MESSAGES]),
        (MESSAGES, "acme/plain", [CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES]),
        (COUNT, "acme/plain", [CHAT, RESPONSES]),
    ],
)
async def test_a_model_asked_for_in_a_dialect_it_does_not_speak_is_a_400_that_says_where_it_is_served(
    gateway, upstream, path, model, served_on
):
    answer = await ask(gateway, path, {"model": model, "messages": [], "max_tokens": 1})
    if path in (MESSAGES, COUNT):
        error = assert_anthropic_error(answer, 400, "invalid_request_error")
    else:
        error = assert_openai_error(answer, 400, "dialect_not_supported")
        assert error["param"] == "model"
    assert f"`{path}`" in error["message"]
    assert all(f"`{place}`" in error["message"] for place in served_on)
    assert upstream.journal == []


def test_the_sdks_raise_a_bad_request_for_a_dialect_mismatch(client, claude):
    with pytest.raises(openai.BadRequestError, match="is served on"):
        client.chat.completions.create(model="claude/plain", messages=[])
    with pytest.raises(anthropic.BadRequestError, match="is served on"):
        claude.messages.create(model="acme/plain", messages=[], max_tokens=1)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "/v1/chat",
        "/v1/chat/completions/",
        "/v1//chat/completions",
        "/v2/models",
        "/admin",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
async def test_an_unknown_path_is_a_404_in_the_envelope(gateway, path, method):
    answer = await ask(gateway, path, method=method)
    error = assert_openai_error(answer, 404, "unknown_url")
    assert f"{method} {path}" in error["message"]


async def test_an_unknown_path_below_messages_is_a_404_in_anthropics_envelope(gateway):
    answer = await ask(gateway, "/v1/messages/batches", b"{}")
    assert_anthropic_error(answer, 404, "not_found_error")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", [CHAT, EMBEDDINGS, RESPONSES, MESSAGES])
async def test_a_wrong_method_is_a_405_that_names_the_right_one(gateway, path, method):
    answer = await ask(gateway, path, method=method)
    if path == MESSAGES:
        error = assert_anthropic_error(answer, 405, "invalid_request_error")
    else:
        error = assert_openai_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert f"takes POST, not {method}" in error["message"]


async def test_models_are_read_only(gateway):
    answer = await ask(gateway, "/v1/models/llama", method="DELETE")
    assert_openai_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/models", 200),
        ("/v1/models/org/llama-3", 200),
        ("/livez", 200),
        ("/readyz", 200),
        (CHAT, 405),
        ("/x", 404),
    ],
)
async def test_a_head_request_is_answered_like_get_without_the_body(gateway, path, status):
    """And the connection serves the next request: no stray byte follows the head."""
    connection = await RawClient.connect(gateway.port)
    await connection.send(request(path, method="HEAD"))
    head = await connection.read_answer(is_head=True)
    await connection.send(request("/livez", method="GET"))
    following = await connection.read_answer()
    connection.close()
    got = await ask(gateway, path, method="GET")
    assert head.status == got.status == status
    assert head.headers["content-type"] == "application/json"
    assert (following.status, following.body) == (200, b'{"status":"ok"}')
    if status == 200:
        assert head.headers["content-length"] == got.headers["content-length"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b"null", "invalid_json"),
        (b'{"model":', "invalid_json"),
        (b"{}", "invalid_field"),
        (b'{"model":5}', "invalid_field"),
        (b'{"model":"acme/plain","max_tokens":-1}', "invalid_field"),
        (b'{"model":"acme/plain","stream_options":[]}', "invalid_field"),
    ],
)
async def test_a_body_that_is_no_request_is_a_400_in_the_envelope_of_its_path(gateway, upstream, body, code):
    assert_openai_error(await ask(gateway, CHAT, body), 400, code)
    assert_anthropic_error(await ask(gateway, MESSAGES, body), 400, "invalid_request_error")
    assert upstream.journal == []


async def test_a_body_over_the_limit_is_a_413_before_it_is_sent(gateway):
    for path in (CHAT, MESSAGES):
        answer = await ask(gateway, path, b"", content_length="99999999", expect="100-continue")
        if path == MESSAGES:
            assert_anthropic_error(answer, 413, "request_too_large")
        else:
            assert_openai_error(answer, 413, "body_too_large")


async def test_a_body_that_is_not_json_by_its_own_word_is_a_415(gateway, upstream):
    answer = await ask(gateway, CHAT, called(CHAT, "acme/plain"), content_type="text/plain")
    assert_openai_error(answer, 415, "unsupported_media_type")
    fine = await ask(
        gateway, CHAT, called(CHAT, "acme/plain"), content_type="application/json; charset=utf-8"
    )
    assert fine.status == 200
    assert len(upstream.journal) == 1


async def test_an_answer_compressed_without_being_asked_for_is_read_for_its_usage_and_relayed_as_it_is(
    gateway, upstream
):
    packed = gzip.compress(json.dumps(recordings.chat()).encode())
    headers = (("content-type", "application/json"), ("content-encoding", "gzip"))
    upstream.script("chat", Answer((packed,), 200, headers))
    answer = await ask(gateway, CHAT, called(CHAT, "acme/plain"))
    assert (answer.body, answer.headers["content-encoding"]) == (packed, "gzip")
    assert answer.headers["x-headgate-cost-usd"] == "0.000142500"


async def test_one_connection_carries_many_requests_whole_and_streamed(gateway, upstream):
    connection = await RawClient.connect(gateway.port)
    for number in range(6):
        stream = number % 2 == 1
        answer = await connection.exchange(request(CHAT, called(CHAT, "acme/plain", stream=stream)))
        assert (answer.status, answer.is_complete) == (200, True)
    refused = await connection.exchange(request(CHAT, b"[]"))
    assert refused.status == 400
    assert (await connection.exchange(request("/livez", method="GET"))).status == 200
    connection.close()
    assert len({record.connection for record in upstream.journal}) == 1  # and so does one to the upstream


async def test_tags_of_a_request_are_in_its_row(gateway):
    answer = await ask(gateway, CHAT, called(CHAT, "acme/plain"), x_headgate_tags="run-7, nightly")
    assert json.loads(gateway.row(answer.headers["x-request-id"])["tags"]) == ["run-7", "nightly"]

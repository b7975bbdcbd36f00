"""Errors as openai-python sees them: the upstream's own, word for word, and the gateway's, in the same form."""

import json

import openai
import pytest

from tests.e2e.conftest import NARROW_KEY, OLD_KEY, UPSTREAM_KEY
from tests.e2e.raw import CHAT, USER, ask, called
from tests.support import recordings
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e

CLASSES = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    413: openai.APIStatusError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    502: openai.InternalServerError,
    503: openai.InternalServerError,
    504: openai.InternalServerError,
    529: openai.InternalServerError,
}


def chat(client, model="acme/plain", **fields):
    return client.chat.completions.create(model=model, messages=USER, **fields)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("status", sorted(CLASSES))
def test_an_upstreams_error_keeps_its_status_class_code_and_words(client, due, status, is_stream):
    with pytest.raises(CLASSES[status]) as caught:
        chat(client, f"acme/status-{status}", stream=is_stream)
    error = caught.value
    kind, code, message = recordings.OPENAI_ERRORS[status]
    assert error.status_code == status
    assert (error.type, error.code, error.param) == (kind, code, None)
    assert error.body == {"message": message, "type": kind, "param": None, "code": code}
    assert error.response.content == json.dumps(recordings.error(status)).encode()
    due(error.request_id, status=status, ended="completed", cost_nanousd=0)


def test_an_upstreams_word_on_when_to_come_back_is_kept(client, upstream):
    headers = {"retry_after": "7", "retry_after_ms": "6500", "x_should_retry": "true"}
    limits = {"x_ratelimit_remaining_requests": "0", "x_ratelimit_reset_requests": "6m0s"}
    upstream.script("chat", Answer.of_error(429, **headers, **limits))
    with pytest.raises(openai.RateLimitError) as caught:
        chat(client)
    told = caught.value.response.headers
    for name, value in (headers | limits).items():
        assert told[name.replace("_", "-")] == value


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_the_sdk_comes_back_after_the_wait_the_upstream_asked_for(client, upstream, status):
    refusal = Answer.of_json(
        {"error": {"message": "later", "type": "t", "param": None, "code": None}},
        status,
        retry_after_ms="60",
    )
    upstream.script("chat", refusal, Answer.of_json(recordings.chat("at last")))
    answer = chat(client.with_options(max_retries=1))
    assert answer.choices[0].message.content == "at last"
    first, second = upstream.journal
    assert second.received_at - first.received_at >= 0.06


def test_the_sdk_does_not_come_back_when_the_upstream_forbids_it(client, upstream):
    upstream.script("chat", Answer.of_error(429, x_should_retry="false"))
    with pytest.raises(openai.RateLimitError):
        chat(client.with_options(max_retries=2))
    assert len(upstream.journal) == 1


def test_an_unreachable_upstream_is_a_502_that_the_sdk_does_not_repeat(client, gateway):
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client.with_options(max_retries=2), "down/any")
    error = caught.value
    assert (error.status_code, error.code, error.type) == (502, "upstream_connect", "server_error")
    assert "`down`" in error.message
    assert "127.0.0.1" not in error.message  # an address is for the log
    gateway.wait_log("connection refused")
    assert error.response.headers["x-should-retry"] == "false"
    row = gateway.row(error.request_id)
    assert (row["status"], row["ended"], row["error_kind"], row["cost_nanousd"]) == (
        502,
        "upstream_failed",
        "connect",
        0,
    )


@pytest.mark.parametrize(
    ("model", "status", "kind"),
    [
        ("late/hang", 504, "first_byte_timeout"),
        ("acme/reset", 502, "reset"),
        ("acme/cut", 502, "reset"),
        ("acme/huge-header", 502, "too_large"),
        ("acme/claims-5000+cut-after-1", 502, "incomplete"),
    ],
)
def test_an_upstream_that_gives_no_usable_answer_is_told_apart_by_status_and_code(
    client, due, model, status, kind
):
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client, model)
    assert (caught.value.status_code, caught.value.code) == (status, f"upstream_{kind}")
    due(caught.value.request_id, ended="upstream_failed", error_kind=kind, cost_nanousd=0)


def test_garbage_from_an_upstream_is_a_502(client, upstream):
    upstream.script("chat", Answer.of_bytes(b"220 smtp.test ESMTP\r\n"))
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client)
    assert (caught.value.status_code, caught.value.code) == (502, "upstream_protocol")


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("sk-nobody-00000000", "key_unknown"),
        (OLD_KEY, "key_expired"),
        ("op-hg-00000000000000", "key_operator"),
        (UPSTREAM_KEY, "key_unknown"),
    ],
)
def test_a_key_that_is_not_good_here_is_an_authentication_error(client, upstream, key, code):
    with pytest.raises(openai.AuthenticationError) as caught:
        chat(client.with_options(api_key=key))
    assert caught.value.code == code
    assert caught.value.body.keys() == {"message", "type", "param", "code"}
    assert key not in caught.value.message
    assert caught.value.request_id.startswith("req_")
    assert upstream.journal == []


def test_a_model_outside_the_keys_list_is_refused_whether_or_not_it_exists(client, upstream):
    narrow = client.with_options(api_key=NARROW_KEY)
    assert chat(narrow).choices
    messages = []
    for model in ("sturdy", "acme/tools", "no-such-model"):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            chat(narrow, model)
        assert (caught.value.code, caught.value.param) == ("model_not_allowed", "model")
        messages.append(caught.value.message.replace(model, "?"))
    assert len(set(messages)) == 1
    assert len(upstream.journal) == 1


def test_a_refused_request_has_a_row_and_costs_nothing(client, gateway):
    with pytest.raises(openai.PermissionDeniedError) as caught:
        chat(client.with_options(api_key=NARROW_KEY), "sturdy")
    row = gateway.row(caught.value.request_id)
    assert (row["ended"], row["status"], row["cost_nanousd"], row["attempts"]) == ("denied", 403, 0, 0)
    assert (row["key_name"], row["tags"]) == ("narrow", '["ci"]')


def test_an_unknown_model_is_a_404_that_names_it(client):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, "gpt-none")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "gpt-none" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/llama-none")


def test_a_field_of_the_wrong_type_is_a_bad_request_that_names_the_field(client, upstream):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, extra_body={"stream": "yes"})
    assert (caught.value.code, caught.value.param) == ("invalid_field", "stream")
    assert upstream.journal == []


async def test_an_error_page_keeps_its_status_and_gets_the_envelope(gateway, upstream):
    upstream.script("chat", Answer((b"<html>bad gateway</html>",), 502, (("content-type", "text/html"),)))
    answer = await ask(gateway, CHAT, called(CHAT, "acme/plain"))
    assert (answer.status, answer.headers["content-type"]) == (502, "application/json")
    assert json.loads(answer.body)["error"].keys() == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")


async def test_a_redirect_of_an_upstream_is_not_followed_and_its_address_stays_here(gateway, upstream):
    upstream.script("chat", Answer((b"{}",), 307, (("location", "http://internal.test/"),)))
    answer = await ask(gateway, CHAT, called(CHAT, "acme/plain"))
    assert answer.status == 502
    assert "internal.test" not in str(answer)
    assert len(upstream.journal) == 1

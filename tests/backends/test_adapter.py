import json

import pytest

from backends.adapter import encode, head
from backends.dialect import CHAT, EMBEDDINGS, MESSAGES
from backends.json_object import read_object
from tests.support.builders import a_provider, an_endpoint


def encoded(body: bytes, *, dialect=CHAT, model="up", is_stream=False, **facts):
    return encode(
        an_endpoint(provider=a_provider(**facts)),
        dialect,
        json.dumps(model).encode(),
        read_object(body),
        is_stream=is_stream,
    )


def test_a_body_that_needs_no_change_is_the_very_same_object():
    body = b'{ "model" : "up", "messages":[ ], "x": 1.0 }'
    assert encoded(body).body is body


def test_only_the_model_is_exchanged_and_every_other_byte_survives():
    body = b'{"seed":9007199254740993,"temperature":1.0,"model":"public","messages":[{"content":"\\u00e9 \\/ x"}]}'
    assert encoded(body).body == body.replace(b'"public"', b'"up"')


def test_usage_is_asked_for_on_a_stream_and_will_be_stripped():
    result = encoded(b'{"model":"up","stream":true}', is_stream=True)
    assert json.loads(result.body)["stream_options"] == {"include_usage": True}
    assert result.strips_usage


@pytest.mark.parametrize(
    "options", [b'{"include_usage":true}', b'{"include_usage":false}', b'{"include_usage": false, "x":1}']
)
def test_what_the_client_said_about_usage_is_never_overridden(options):
    body = b'{"model":"up","stream":true,"stream_options":' + options + b"}"
    result = encoded(body, is_stream=True)
    assert result.body is body
    assert not result.strips_usage


def test_other_stream_options_of_the_client_survive_our_question():
    body = b'{"model":"up","stream":true,"stream_options":{"continuous_usage_stats":false,"z":[1.0]}}'
    result = encoded(body, is_stream=True)
    assert json.loads(result.body)["stream_options"] == {
        "continuous_usage_stats": False,
        "z": [1.0],
        "include_usage": True,
    }
    assert b"[1.0]" in result.body
    assert result.strips_usage


def test_null_stream_options_count_as_absent():
    result = encoded(b'{"model":"up","stream":true,"stream_options":null}', is_stream=True)
    assert json.loads(result.body)["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("bad", [b"[]", b'"x"', b'{"include_usage":"yes"}', b"7"])
def test_stream_options_of_the_wrong_type_are_left_for_the_upstream_to_refuse(bad):
    body = b'{"model":"up","stream":true,"stream_options":' + bad + b"}"
    assert encoded(body, is_stream=True).body is body


def test_a_provider_that_cannot_bear_stream_options_is_not_asked():
    body = b'{"model":"up","stream":true}'
    assert encoded(body, is_stream=True, may_ask_usage=False).body is body


@pytest.mark.parametrize("dialect", [EMBEDDINGS, MESSAGES])
def test_dialects_that_report_usage_by_themselves_are_not_asked(dialect):
    body = b'{"model":"up","stream":true}'
    assert encoded(body, dialect=dialect, is_stream=True).body is body


def test_fields_the_provider_refuses_are_dropped_and_nothing_else():
    body = b'{"prompt_cache_key":"a","model":"up","nested":{"prompt_cache_key":"b"},"user":"u"}'
    result = encoded(body, drops=frozenset({"prompt_cache_key", "user"}))
    assert result.body == b'{"model":"up","nested":{"prompt_cache_key":"b"}}'


def test_dropping_stream_options_also_means_not_asking():
    body = b'{"model":"up","stream":true,"stream_options":{"include_usage":true}}'
    result = encoded(body, is_stream=True, drops=frozenset({"stream_options"}), may_ask_usage=False)
    assert result.body == b'{"model":"up","stream":true}'


def head_lines(sent=None, key=None, **facts):
    endpoint = an_endpoint(provider=a_provider(**facts), key=key)
    text = head(endpoint, "POST", "/chat/completions", sent or {}, 12, "req_1")
    first, *lines = text.decode().removesuffix("\r\n\r\n").split("\r\n")
    return first, dict(line.split(": ", 1) for line in lines)


def test_a_head_is_made_new_with_our_id_and_length():
    first, lines = head_lines(key="sk-up")
    assert first == "POST /v1/chat/completions HTTP/1.1"
    assert lines["host"] == "127.0.0.1:9"
    assert lines["authorization"] == "Bearer sk-up"
    assert lines["content-length"] == "12"
    assert lines["x-request-id"] == "req_1"
    assert lines["accept-encoding"] == "identity"


def test_client_headers_reach_an_upstream_by_allow_list_only():
    sent = {
        b"authorization": b"Bearer sk-hg-secret",
        b"x-api-key": b"sk-hg-secret",
        b"cookie": b"a=b",
        b"anthropic-beta": b"tools",
        b"openai-organization": b"org",
        b"x-codex-turn-metadata": b"/home/me",
    }
    _, lines = head_lines(sent, forwards=frozenset({"anthropic-beta"}))
    assert lines["anthropic-beta"] == "tools"
    assert (
        not {"authorization", "x-api-key", "cookie", "openai-organization", "x-codex-turn-metadata"}
        & lines.keys()
    )


def test_an_allow_list_cannot_let_the_gateways_own_credentials_through():
    _, lines = head_lines(
        {b"authorization": b"Bearer sk-hg-secret", b"host": b"evil"},
        key="sk-up",
        forwards=frozenset({"authorization", "host", "x-api-key"}),
    )
    assert lines["authorization"] == "Bearer sk-up"
    assert lines["host"] == "127.0.0.1:9"


def test_a_default_header_yields_to_the_clients_forwarded_one():
    facts = {"headers": {"anthropic-version": "2023-06-01"}, "forwards": frozenset({"anthropic-version"})}
    assert head_lines({}, **facts)[1]["anthropic-version"] == "2023-06-01"
    assert head_lines({b"anthropic-version": b"2026-10-21"}, **facts)[1]["anthropic-version"] == "2026-10-21"


@pytest.mark.parametrize(
    ("auth", "name", "value"), [("x-api-key", "x-api-key", "k"), ("api-key", "api-key", "k")]
)
def test_each_provider_gets_its_key_where_it_wants_it(auth, name, value):
    _, lines = head_lines(key="k", auth=auth)
    assert lines[name] == value
    assert "authorization" not in lines

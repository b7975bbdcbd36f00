import json

import pytest

from backends.errors import NOTHING_SENT, UpstreamError
from gateway.errors import CAUSES, denial_answer, edge_answer, envelope, stream_event, upstream_answer
from policies.verdict import Denial


def test_openais_envelope_always_has_all_four_keys():
    error = json.loads(envelope("openai", 404, "unknown_url", "nothing here", "req_1"))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (504, "timeout_error"),
    ],
)
def test_anthropics_envelope_names_the_type_its_sdk_knows(status, kind):
    error = json.loads(envelope("anthropic", status, "c", "m", "req_1"))
    assert error["type"] == "error"
    assert error["error"]["type"] == kind
    assert error["request_id"] == "req_1"


def test_retry_after_is_rounded_up_so_that_nobody_comes_back_too_early():
    _, headers, _ = denial_answer(Denial(429, "c", "m", retry_after_s=1.2), "openai", "req_1")
    found = dict(headers)
    assert found[b"retry-after"] == b"2"
    assert found[b"retry-after-ms"] == b"1200"
    assert found[b"x-should-retry"] == b"true"


def test_a_refusal_that_waiting_cannot_help_says_so():
    _, headers, _ = denial_answer(Denial(403, "c", "m"), "openai", "req_1")
    found = dict(headers)
    assert found[b"x-should-retry"] == b"false"
    assert b"retry-after" not in found


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("incomplete", 502),
        ("reset", 502),
        ("protocol", 502),
        ("first_byte_timeout", 504),
        ("total_timeout", 504),
    ],
)
def test_an_upstream_failure_is_502_or_504_with_its_cause(kind, status):
    got, headers, body = upstream_answer(UpstreamError(kind, "for the log"), "pool/0", "openai", "req_1")
    assert got == status
    error = json.loads(body)["error"]
    assert error["code"] == f"upstream_{kind}"
    assert error["message"] == f"no usable answer from `pool/0`: {CAUSES[kind]}"
    assert dict(headers)[b"x-should-retry"] == b"false"


@pytest.mark.parametrize("kind", sorted(NOTHING_SENT))
def test_addresses_of_upstreams_and_proxies_are_not_told(kind):
    error = UpstreamError(kind, "cannot connect to http://10.0.0.5:8000 through the proxy 10.0.0.1:3128")
    _, _, body = upstream_answer(error, "pool/0", "openai", "req_1")
    assert "`pool/0`" in json.loads(body)["error"]["message"]
    assert b"10.0.0." not in body


def test_both_request_id_headers_are_there_on_messages():
    headers, _ = edge_answer(404, "unknown_url", "m", b"/v1/messages/x", "req_1")
    assert dict(headers)[b"x-request-id"] == dict(headers)[b"request-id"] == b"req_1"


@pytest.mark.parametrize("dialect", ["chat", "completions", "responses", "messages"])
def test_an_error_in_band_is_one_whole_event_in_the_dialects_own_shape(dialect):
    event = stream_event(dialect, "upstream_reset", "it broke", "req_1")
    assert event.endswith(b"\n\n")
    fields = dict(line.split(": ", 1) for line in event.decode().strip().split("\n"))
    data = json.loads(fields["data"])
    assert "it broke" in json.dumps(data["error"])
    assert fields.get("event") == ("error" if dialect in {"responses", "messages"} else None)

"""Passthrough: a provider's own paths, whose answers the gateway relays without understanding them."""

import gzip

import pytest

from tests.e2e.raw import ask
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e

EVENTS = [b'data: {"candidates":[{"content":{"parts":[{"text":"%d"}]}}]}\n\n' % n for n in range(3)]


async def test_a_raw_stream_is_whole_when_its_framing_says_so(gateway, upstream):
    """There is no last event that all providers agree on."""
    upstream.script("/open/v1/gemini", Answer.of_events(EVENTS))
    answer = await ask(gateway, "/open/gemini", {})
    assert answer.is_complete
    assert answer.body == b"".join(EVENTS)
    row = gateway.row(answer.headers["x-request-id"])
    assert (row["dialect"], row["status"], row["ended"]) == ("raw", 200, "completed")


async def test_a_raw_stream_that_is_cut_does_not_look_whole(gateway, upstream):
    upstream.script("/open/v1/gemini", Answer.of_events(EVENTS).cut_after(2))
    answer = await ask(gateway, "/open/gemini", {})
    assert not answer.is_complete
    assert answer.body.startswith(b"".join(EVENTS[:2]))
    assert gateway.row(answer.headers["x-request-id"])["ended"] == "incomplete"


@pytest.mark.parametrize("coding", ["gzip", "br"])
async def test_a_raw_answer_in_any_coding_is_relayed_as_it_is(gateway, upstream, coding):
    body = gzip.compress(b'{"a": 1}') if coding == "gzip" else b"what brotli looks like"
    upstream.script("/open/v1/files", Answer.of_json(body, content_encoding=coding))
    answer = await ask(gateway, "/open/files", method="GET")
    assert (answer.status, answer.headers["content-encoding"], answer.body) == (200, coding, body)


@pytest.mark.parametrize("status", [204, 302, 404, 500])
async def test_a_raw_answer_keeps_its_status_and_its_words(gateway, upstream, status):
    body = b"" if status == 204 else b"just words"
    upstream.script(
        "/open/v1/files", Answer((body,) if body else (), status, (("content-type", "text/plain"),))
    )
    answer = await ask(gateway, "/open/files", method="GET")
    assert (answer.status, answer.body) == (status, body)

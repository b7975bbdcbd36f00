"""The two calls of disaggregated prefill, as bytes: what each says, and what is read of the first one's answer."""

import json
from dataclasses import replace

import pytest

from backends.adapter import Edits, encode
from backends.dialect import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from backends.json_object import read_object
from backends.kv_transfer import brief, has_begun, params_in, to_collect, to_compute
from backends.origin import Origin
from backends.pool import Endpoint
from backends.registry import KNOWN
from backends.transport import ConnectionPool, Deadlines

PARAMS = b'{"do_remote_prefill": true, "remote_block_ids":[[1,2]],"tp_size":1.0}'


def sent(body, edits, dialect=CHAT):
    document = read_object(json.dumps(body).encode())
    origin, path = Origin.parse("http://engine.test/v1")
    record = KNOWN["vllm"]
    settled = replace(record, drops=record.drops | record.reserved)  # as a pool's settings are
    endpoint = Endpoint("e", settled, ConnectionPool(origin), path, None, Deadlines())
    return encode(endpoint, dialect, b'"up"', document, is_stream=False, edits=edits(document.values)).body


async def test_the_first_call_asks_for_the_prompt_and_one_token():
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 500,
        "min_tokens": 5,
        "tools": [1],
        "response_format": {"type": "json_object"},
        "kv_transfer_params": {"do_remote_prefill": True, "remote_engine_id": "mine"},
    }
    given = Edits(frozenset({"user"}), {"cache_salt": b'"cache_salt":"s"'})
    told = json.loads(sent(body, lambda values: to_compute(brief(CHAT, values, given))))
    assert told.pop("kv_transfer_params") == {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        **dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")),
    }
    assert told == {
        "model": "up",
        "messages": body["messages"],
        "tools": [1],
        "cache_salt": "s",
        "max_tokens": 1,
        "max_completion_tokens": 1,
    }


@pytest.mark.parametrize(
    ("dialect", "limit"),
    [(COMPLETIONS, "max_tokens"), (MESSAGES, "max_tokens"), (RESPONSES, "max_output_tokens")],
)
async def test_each_dialect_has_its_own_limit(dialect, limit):
    body = {"model": "m", "prompt": "p", limit: 99}
    told = json.loads(sent(body, lambda values: to_compute(brief(dialect, values, None)), dialect))
    assert told[limit] == 1


async def test_the_second_call_is_the_request_with_the_params_word_for_word():
    body = {"model": "m", "messages": [], "kv_transfer_params": {"mine": 1}, "temperature": 1.50}
    told = sent(body, lambda _: to_collect(PARAMS, None))
    assert PARAMS in told
    assert b"mine" not in told
    assert told.count(b"kv_transfer_params") == 1
    assert b'"temperature": 1.5' in told


async def test_a_clients_params_reach_no_engine():
    told = sent({"model": "m", "messages": [], "kv_transfer_params": {"mine": 1}}, lambda _: None)
    assert b"kv_transfer_params" not in told
    rule = Edits(frozenset(), {"kv_transfer_params": b'"kv_transfer_params":{}'})
    assert b"kv_transfer_params" not in sent({"model": "m", "messages": []}, lambda _: rule)


@pytest.mark.parametrize(
    ("answer", "params"),
    [
        (b'{"id":"x","kv_transfer_params":' + PARAMS + b"}", PARAMS),
        (b'{"id":"x","kv_transfer_params":null}', None),
        (b'{"id":"x"}', None),
        (b'{"kv_transfer_params":[1]}', None),
        (b"<html>", None),
        (b"", None),
        (b"\xff", None),
    ],
)
def test_params_are_read_or_not_there(answer, params):
    assert params_in(answer) == params


ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
ERROR = b'data: {"error":{"message":"Internal server error"}}\n\n'


@pytest.mark.parametrize(
    ("dialect", "beginning", "is_enough"),
    [
        (CHAT, b"", False),
        (CHAT, ROLE, False),
        (CHAT, ROLE + TOKEN, True),
        (CHAT, ROLE + ERROR, True),
        (COMPLETIONS, TOKEN, True),
        (MESSAGES, b'event: message_start\ndata: {"type":"message_start"}\n\n', False),
        (MESSAGES, b"event: content_block_start\n", True),
        (MESSAGES, b'event: error\ndata: {"type":"error"}\n\n', True),
        (RESPONSES, b'event: response.created\ndata: {"type":"response.created"}\n\n', False),
        (RESPONSES, b"event: response.output_text.delta\n", True),
        (RESPONSES, b"event: response.failed\n", True),
    ],
)
def test_a_streams_head_is_not_its_beginning(dialect, beginning, is_enough):
    assert has_begun(dialect)(beginning) is is_enough

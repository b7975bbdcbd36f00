"""Bad requests: each is refused in the envelope of its dialect, none breaks the server."""

import json
import random

import pytest

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


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, "{", 400, None),
        (CHAT, "[]", 400, None),
        (CHAT, {"messages": USER, "model": "other"}, 404, "model"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "content"),
        (CHAT, {"messages": USER, "max_tokens": 0}, 400, "max_tokens"),
        (CHAT, {"messages": USER, "max_tokens": 9000}, 400, "input_tokens"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "input_tokens"),
        (CHAT, {"messages": USER, "n": 0}, 400, "n"),
        (CHAT, {"messages": USER, "logprobs": True}, 400, "logprobs"),
        (CHAT, {"messages": USER, "cache_salt": ""}, 400, "cache_salt"),
        (CHAT, {"messages": USER, "cache_salt": "a/b"}, 400, "cache_salt"),
        (CHAT, {"messages": USER, "stop": [""]}, 400, "stop"),
        (CHAT, {"messages": USER, "tool_choice": "required"}, 400, "tool_choice"),
        (CHAT, {"messages": USER, "stream_options": {"include_usage": True}}, 400, "stream_options"),
        (
            CHAT,
            {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"schema": False}}},
            400,
            "response_format",
        ),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": ""}, 400, "prompt"),
        ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, 400, "prompt"),
        ("/v1/embeddings", {"input": "x", "dimensions": 0}, 400, "dimensions"),
        ("/v1/responses", {"input": []}, 400, "input"),
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}, 404, "previous_response_id"),
        ("/tokenize", {}, 400, "prompt"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/nowhere", {}, 404, None),
    ],
)
async def test_bad_requests_are_refused_in_vllms_envelope(http, path, body, status, param):
    data = body if isinstance(body, str) else json.dumps(body)
    async with http.post(path, data=data) as answer:
        assert answer.status == status
        error = (await answer.json())["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["code"], error["param"]) == (status, param)
    assert " " in error["message"]


BODIES = {
    CHAT: {
        "messages": [
            *USER,
            {"role": "tool", "content": [{"type": "text", "text": "r"}], "tool_call_id": "x"},
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        "stream_options": {"include_usage": True},
        "stop": ["a"],
        "n": 2,
        "seed": 5,
        "stream": True,
        "max_tokens": 5,
        "priority": 1,
    },
    "/v1/completions": {"prompt": ["a", [1, 2]], "max_tokens": 3, "echo": True, "n": 2, "stop": "x"},
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "function_call", "name": "a", "arguments": "{}", "call_id": "c"},
            {"type": "function_call_output", "output": "x", "call_id": "c"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
        "stream": True,
    },
    "/v1/messages": {
        "model": "demo",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "a"}],
        "stream": True,
        "messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text"}]}]}],
        "tools": [{"name": "f", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "f"},
    },
    "/v1/embeddings": {"input": ["a", [1, 2]], "dimensions": 5, "encoding_format": "base64"},
    "/tokenize": {"messages": USER, "tools": [{}]},
    "/detokenize": {"tokens": [1, 2, 300]},
}


JUNK = [
    None,
    True,
    0,
    -1,
    1.5,
    2**70,
    "",
    "x",
    "\0",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    [1, "a"],
    {"type": 5},
    -(2**63),
]


def spoiled(value, chance, share):
    """A copy with some parts replaced by junk or left out."""
    if chance.random() < share:
        return chance.choice(JUNK)
    if isinstance(value, dict):
        return {k: spoiled(v, chance, share) for k, v in value.items() if chance.random() > 0.03}
    return [spoiled(item, chance, share) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", BODIES)
async def test_no_malformed_body_breaks_the_server(http, path):
    chance = random.Random(path)
    statuses = set()
    for _ in range(150):
        body = spoiled(BODIES[path], chance, chance.choice((0.02, 0.1)))
        async with http.post(path, data=json.dumps(body)) as answer:
            text = await answer.text()
            statuses.add(answer.status)
            assert answer.status in (200, 400, 404), (body, text)
            assert answer.status == 200 or "message" in json.loads(text)["error"]
    assert {200, 400} <= statuses


@pytest.mark.parametrize("depth", [500, 950, 2000, 100_000])
async def test_deep_nesting_is_answered_or_refused(http, depth):
    nested = "[" * depth + "]" * depth
    body = f'{{"messages":[{{"role":"user","content":"a"}}],"tools":[{{"function":{{"name":"f"}},"x":{nested}}}]}}'
    async with http.post(CHAT, data=body) as answer:
        assert answer.status in (200, 400)


async def test_a_method_that_is_not_served_and_a_rank_that_does_not_exist_are_refused(http):
    assert (await http.get(CHAT)).status == 405
    headers = {"x-data-parallel-rank": "1"}
    assert (await http.post(CHAT, json={"messages": USER}, headers=headers)).status == 400
    headers = {"x-data-parallel-rank": "0"}
    assert (await http.post(CHAT, json={"messages": USER}, headers=headers)).status == 200


async def test_messages_has_errors_in_its_own_envelope(http):
    async with http.post("/v1/messages", json={"model": "demo", "messages": USER}) as answer:
        assert answer.status == 400
        body = await answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")

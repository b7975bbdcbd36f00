"""Workers AI's native form, there and back: what Cloudflare's documentation shows, and what is no good."""

import json

import pytest

from gateway.http_rules import Refusal
from gateway.workers_ai.answers import NativeStream, UnreadableAnswerError, result_of
from gateway.workers_ai.envelope import encode, failed, succeeded
from gateway.workers_ai.forms import Form, read_fields, translate
from gateway.workers_ai.native_answer import NativeAnswer

MODEL = "@cf/meta/llama-3.1-8b-instruct"


def asked(**native):
    translated = translate(MODEL, read_fields(json.dumps(native).encode()))
    return translated.dialect.name, json.loads(translated.body), translated.form


def test_messages_become_a_chat_and_keep_their_parameters():
    messages = [{"role": "user", "content": "hi"}]
    dialect, body, form = asked(messages=messages, temperature=0.2, seed=7, options={"rejectIfBusy": True})
    assert (dialect, form) == ("chat", Form("text"))
    assert body == {"model": MODEL, "messages": messages, "temperature": 0.2, "seed": 7}


def test_a_prompt_is_what_a_user_says_unless_it_is_raw():
    assert asked(prompt="hi", max_tokens=9)[:2] == (
        "chat",
        {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    )
    assert asked(prompt="hi", raw=True) == (
        "completions",
        {"model": MODEL, "prompt": "hi"},
        Form("completion"),
    )


def test_numbers_are_copied_as_they_were_written():
    fields = read_fields(b'{"prompt":"x","seed":12345678901234567890,"temperature":1.0}')
    assert b'"seed":12345678901234567890' in translate(MODEL, fields).body
    assert b'"temperature":1.0' in translate(MODEL, fields).body


def test_a_stream_asks_for_its_usage():
    assert asked(prompt="x", stream=True)[1]["stream_options"] == {"include_usage": True}
    assert "stream_options" not in asked(prompt="x", stream=False)[1]


def test_bare_tools_and_schemas_are_wrapped_and_wrapped_ones_left():
    bare = {"name": "sum", "description": "adds", "parameters": {"type": "object"}}
    wrapped = {"type": "function", "function": bare}
    assert asked(prompt="x", tools=[bare, wrapped])[1]["tools"] == [wrapped, wrapped]
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    _, body, form = asked(prompt="x", response_format={"type": "json_schema", "json_schema": schema})
    assert body["response_format"]["json_schema"] == {"name": "response", "schema": schema}
    assert form == Form("text", is_json=True)
    named = {"name": "n", "schema": schema}
    _, body, _ = asked(prompt="x", response_format={"type": "json_schema", "json_schema": named})
    assert body["response_format"]["json_schema"] == named


def test_texts_and_comparisons_become_embeddings():
    assert asked(text="a") == (
        "embeddings",
        {"model": MODEL, "input": "a", "encoding_format": "float"},
        Form("vectors"),
    )
    contexts = [{"text": "orange", "external_reference": "story1"}, {"text": "llama"}]
    assert asked(query="q", contexts=contexts) == (
        "embeddings",
        {"model": MODEL, "input": ["q", "orange", "llama"], "encoding_format": "float"},
        Form("scores"),
    )
    assert asked(contexts=contexts)[1:] == (
        {"model": MODEL, "input": ["orange", "llama"], "encoding_format": "float"},
        Form("vectors"),
    )


def test_an_input_is_a_response():
    assert asked(input="hi", reasoning={"effort": "low"}) == (
        "responses",
        {"model": MODEL, "input": "hi", "reasoning": {"effort": "low"}},
        Form("response"),
    )


@pytest.mark.parametrize(
    ("native", "param"),
    [
        ({}, None),
        ({"prompt": 7}, "prompt"),
        ({"text": [1]}, "text"),
        ({"text": ["x"] * 3000}, "text"),
        ({"contexts": ["x"]}, "contexts"),
        ({"contexts": [], "query": 1}, "query"),
    ],
    ids=str,
)
def test_what_has_no_input_is_refused(native, param):
    with pytest.raises(Refusal) as refused:
        asked(**native)
    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.mark.parametrize("body", [b"[]", b"{", b'"x"', b"\xff"])
def test_what_is_no_object_is_refused(body):
    with pytest.raises(Refusal):
        read_fields(body)


def chat(message, **more) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": "stop"}
    return json.dumps({"id": "c1", "choices": [choice], "usage": {"total_tokens": 5}} | more).encode()


def told(form, body):
    return json.loads(encode(result_of(form, body)))


def test_what_a_model_says_is_the_response_and_the_rest_stays_beside_it():
    result = told(Form("text"), chat({"content": "hello"}))
    assert (result["response"], result["usage"], result["id"]) == ("hello", {"total_tokens": 5}, "c1")
    assert result["choices"][0]["message"]["content"] == "hello"
    assert told(Form("text", is_json=True), chat({"content": '{"a": 1}'}))["response"] == {"a": 1}
    assert told(Form("text", is_json=True), chat({"content": '{"a": '}))["response"] == '{"a": '
    completion = json.dumps({"choices": [{"text": "more"}]}).encode()
    assert told(Form("completion"), completion)["response"] == "more"


def test_calls_of_tools_are_told_with_their_arguments_read():
    calls = [{"id": "1", "type": "function", "function": {"name": "sum", "arguments": '{"a":1}'}}]
    result = told(Form("text"), chat({"content": None, "tool_calls": calls}))
    assert result["response"] is None
    assert result["tool_calls"] == [{"name": "sum", "arguments": {"a": 1}}]


def test_vectors_have_their_shape_and_texts_their_scores():
    def embeddings(*vectors):
        data = [{"index": n, "embedding": vector} for n, vector in enumerate(vectors)]
        return json.dumps({"data": data, "usage": {"prompt_tokens": 3}}).encode()

    result = told(Form("vectors"), embeddings([1.0, 0.5], [0.25, 2.0]))
    assert (result["shape"], result["data"]) == ([2, 2], [[1.0, 0.5], [0.25, 2.0]])
    result = told(Form("scores"), embeddings([1.0, 0.0], [0.0, 1.0], [2.0, 0.0]))
    assert result["response"] == [{"id": 1, "score": 1.0}, {"id": 0, "score": 0.0}]


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"choices": 1}', b"\x1f\x8b"])
def test_an_answer_that_is_not_its_dialects_is_noticed(body):
    with pytest.raises(UnreadableAnswerError):
        result_of(Form("text"), body)


def chunk(**delta) -> bytes:
    finish = delta.pop("finish_reason", None)
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "c", "choices": [choice]}).encode() + b"\n\n"


STREAM = (
    b": hello\n\n"
    + chunk(content="He")
    + chunk(content="llo")
    + chunk(tool_calls=[{"index": 0, "function": {"name": "sum", "arguments": '{"a"'}}])
    + chunk(tool_calls=[{"index": 0, "function": {"arguments": ":1}"}}])
    + chunk(finish_reason="tool_calls")
    + b'data: {"choices":[],"usage":{"total_tokens":5}}\n\n'
    + b"data: [DONE]\n\n"
)


def events(data: bytes):
    return [
        json.loads(line[6:]) if line[6:] != b"[DONE]" else "[DONE]"
        for line in data.split(b"\n\n")
        if line.startswith(b"data: ")
    ]


def test_a_stream_is_told_piece_by_piece_however_it_is_cut():
    whole = NativeStream(Form("text"))
    told_events = events(whole.feed(STREAM) + whole.end())
    assert [each["response"] for each in told_events[:-1]] == ["He", "llo", "", "", "", ""]
    assert told_events[4]["tool_calls"] == [{"name": "sum", "arguments": {"a": 1}}]
    assert told_events[5]["usage"] == {"total_tokens": 5}
    assert told_events[-1] == "[DONE]"
    for cut in range(1, len(STREAM), 7):
        stream = NativeStream(Form("text"))
        assert events(stream.feed(STREAM[:cut]) + stream.feed(STREAM[cut:]) + stream.end()) == told_events


def test_an_error_in_a_stream_is_told_as_cloudflare_tells_errors():
    stream = NativeStream(Form("text"))
    sent = b'data: {"error":{"message":"it broke","type":"server_error","param":null,"code":"upstream_reset"}}\n\n'
    (event,) = events(stream.feed(sent))
    assert event == {
        "success": False,
        "errors": [{"code": 1000, "message": "it broke", "headgate_code": "upstream_reset"}],
    }


def error(code, **more) -> bytes:
    return json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": code} | more}).encode()


@pytest.mark.parametrize(
    ("status", "body", "told_status", "number"),
    [
        (401, error("key_missing"), 401, 10000),
        (404, error("model_not_found"), 400, 5007),
        (403, error("model_not_allowed"), 403, 5018),
        (400, error("invalid_field"), 400, 5004),
        (413, error("body_too_large"), 413, 3006),
        (429, error("pool_full"), 429, 3040),
        (503, error("wait_timeout"), 429, 3040),
        (429, error("rate_limit_exceeded", limit={}), 429, 3036),
        (429, error("budget_exceeded"), 429, 3036),
        (429, error(None), 429, 3040),
        (504, error("upstream_total_timeout"), 408, 3007),
        (502, error("upstream_connect"), 502, 1000),
        (500, b"<html>", 500, 1000),
        (404, error("unknown_url"), 404, 3042),
    ],
)
def test_errors_have_cloudflares_numbers(status, body, told_status, number):
    found_status, found = failed(status, body)
    found = json.loads(found)
    assert (found_status, found["errors"][0]["code"]) == (told_status, number)
    assert (found["success"], found["result"], found["messages"]) == (False, None, [])
    assert found["errors"][0]["message"]


def test_whole_answers_are_put_into_the_envelope():
    answer = NativeAnswer()
    assert answer.whole(200, [], succeeded({"a": 1}))[2] == succeeded({"a": 1})
    answer.form = Form("text")
    status, headers, body = answer.whole(
        200, [(b"content-type", b"x"), (b"x-a", b"1")], chat({"content": "hi"})
    )
    assert (status, headers) == (200, [(b"x-a", b"1"), (b"content-type", b"application/json")])
    body = json.loads(body)
    assert (body["success"], body["errors"], body["result"]["response"]) == (True, [], "hi")
    assert answer.whole(200, [], b"<html>")[0] == 502

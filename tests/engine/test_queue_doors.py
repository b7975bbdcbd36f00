"""Batches, background responses and Workers AI's form in front of real vLLM."""

import json
import time

import pytest

pytestmark = pytest.mark.engine

ENDED = {"completed", "failed", "cancelled", "expired", "incomplete"}
URL = "/v1/chat/completions"
# A random model that may choose ends its answer when it likes, or with what vLLM takes for a broken call of a tool.
CALL = {"model": "tiny", "input": "hello", "temperature": 0}


def ended(ask):
    deadline = time.monotonic() + 180
    while (found := ask()).status not in ENDED:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def test_a_background_response_is_polled(client):
    made = client.responses.create(**CALL, background=True, max_output_tokens=8)
    assert made.status == "queued"
    response = ended(lambda: client.responses.retrieve(made.id))
    assert response.status in {"completed", "incomplete"}
    assert (response.id, response.usage.output_tokens) == (made.id, 8)


def test_a_background_stream_is_left_and_read_again(client, gateway):
    stream = client.responses.create(**CALL, background=True, stream=True, max_output_tokens=32)
    seen = []
    for event in stream:
        seen.append(event)
        if len(seen) == 6:
            break
    stream.close()
    response_id = seen[0].response.id
    number = seen[-1].sequence_number
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=number))
    numbers = [event.sequence_number for event in seen + rest]
    assert numbers == list(range(len(numbers)))
    assert rest[-1].type in {"response.completed", "response.incomplete"}, rest[-1].response.error
    assert rest[-1].response.id == response_id
    row = gateway.row(response_id, within_s=60)
    assert (row["output_tokens"], row["attempts"]) == (32, 1)


def test_a_batch_is_answered(client):
    lines = [
        {
            "custom_id": f"r{n}",
            "method": "POST",
            "url": URL,
            "body": {
                "model": "tiny",
                "max_tokens": 4,
                "temperature": 0,
                "messages": [{"role": "user", "content": f"hi {n}"}],
            },
        }
        for n in range(12)
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
    batch = ended(lambda: client.batches.retrieve(made.id))
    assert (batch.status, batch.request_counts.completed) == ("completed", 12)
    output = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert {each["custom_id"] for each in output} == {f"r{n}" for n in range(12)}
    assert batch.usage.output_tokens == 48


def test_the_native_form_is_answered(gateway):
    wanted = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
    status, _, body = gateway.post("/client/v4/accounts/a/ai/run/tiny", wanted)
    result = json.loads(body)["result"]
    assert status == 200
    assert isinstance(result["response"], str)
    assert result["usage"]["completion_tokens"] == 4

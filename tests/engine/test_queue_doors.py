"""Batches, background responses and Workers AI's form in front of real vLLM."""

import json
import time

import pytest

from tests.engine.conftest import ENGINE_KEY
from tests.support.gateway_process import Gateway

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


def test_jobs_take_the_slots_that_are_left_and_none_that_is_kept(replicas, tmp_path):
    """Of each engine's four slots one stays free for whoever comes; a backlog takes all others."""
    placement = {"max_in_flight": 4}
    endpoints = [replica.base_url for replica in replicas]
    pools = {"gpu": {"endpoints": endpoints, "api_key": ENGINE_KEY, "placement": placement}}
    models = {"tiny": {"targets": [{"pool": "gpu"}], "price": {"input": 1.0, "output": 4.0}}}
    queue = {"enabled": True, "trickle_s": 3600}
    with Gateway(tmp_path, workers=2, queue=queue, pools=pools, models=models) as gateway:
        gateway.manage("/api/jobs/drain", "POST")
        for n in range(30):
            body = {
                "model": "tiny",
                "max_tokens": 64,
                "ignore_eos": True,
                "messages": [{"role": "user", "content": f"go on {n}"}],
            }
            status, _, answer = gateway.post("/v1/jobs", {"endpoint": URL, "body": body})
            assert status == 202, answer
        gateway.manage("/api/jobs/drain", "DELETE")
        running = []
        deadline = time.monotonic() + 600
        while (states := gateway.manage("/api/jobs/stats")["states"]).get("succeeded", 0) < 30:
            assert time.monotonic() < deadline, states
            running.append(gateway.metrics().get('headgate_queue_running{pool="gpu"}', 0))
            time.sleep(0.05)
        assert set(states) == {"succeeded"}, states
        assert 3 <= max(running) <= 6, running
    assert "Traceback" not in gateway.log()

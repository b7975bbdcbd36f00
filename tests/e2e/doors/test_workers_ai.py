"""Workers AI's REST API: the examples of Cloudflare's documentation, with nothing changed but host, key and account."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.e2e.doors.conftest import BGE, LLAMA, OTHER_KEY
from tests.support import recordings
from tests.support.gateway_process import KEY, Gateway
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e

OTHER = {"authorization": f"Bearer {OTHER_KEY}"}
PROMPT = {"prompt": "Where did the phrase Hello World come from"}
MESSAGES = {
    "messages": [
        {"role": "system", "content": "You are a friendly assistant that helps write stories"},
        {"role": "user", "content": "Write a short story about a llama that goes on a journey"},
    ]
}
STORIES = {
    "query": "This is a story about Cloudflare",
    "contexts": [
        {"text": "This is a story about an orange cloud"},
        {"text": "This is a story about a llama"},
        {"text": "This is a story about a hugging emoji"},
    ],
    "external_reference": "reference-1",
}


def good(answer):
    status, body = answer
    assert (status, body["success"], body["errors"], body["messages"]) == (200, True, [], []), body
    return body["result"]


def bad(answer):
    status, body = answer
    assert (body["success"], body["result"], body["messages"]) == (False, None, [])
    return status, body["errors"][0]["code"]


def finished(doors, model, request_id):
    return doors.until(
        lambda: good(doors.native(f"run/{model}?queueRequest=true", {"request_id": request_id})),
        lambda found: "responses" in found,
    )


# `curl -d` says that it sends a form, `fetch` that it sends text.
@pytest.mark.parametrize(
    "content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain;charset=UTF-8"]
)
def test_a_prompt_is_answered_whatever_the_example_calls_its_body(doors, content_type):
    result = good(doors.native(f"run/{LLAMA}", PROMPT, **{"content-type": content_type}))
    assert result["response"] == "Hello from upstream"
    assert result["usage"]["total_tokens"] > 0
    sent = doors.upstream.last.fields
    assert sent["messages"] == [{"role": "user", "content": PROMPT["prompt"]}]


def test_messages_are_answered_and_the_model_may_be_encoded_or_in_the_body(doors):
    assert good(doors.native(f"run/{LLAMA}", MESSAGES))["response"] == "Hello from upstream"
    assert good(doors.native(f"run/{LLAMA.replace('@', '%40')}", MESSAGES))["response"]
    universal = {"model": LLAMA, "input": MESSAGES, "options": {}}
    assert good(doors.native("run", universal))["response"] == "Hello from upstream"


def test_a_stream_is_told_in_the_native_form(doors):
    _, headers, body = doors.gateway.post(
        f"/client/v4/accounts/abc123/ai/run/{LLAMA}", {**MESSAGES, "stream": True}
    )
    assert headers["content-type"] == "text/event-stream"
    events = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(chunk["response"] for chunk in chunks) == "Hello from upstream"
    assert chunks[-1]["usage"]["total_tokens"] > 0


def test_texts_become_vectors(doors):
    result = good(doors.native(f"run/{BGE}", {"text": ["one", "two"]}))
    assert (result["shape"], len(result["data"])) == ([2, 3], 2)


def test_the_documented_queue_example_works(doors):
    made = good(doors.native(f"run/{BGE}?queueRequest=true", {"requests": [STORIES]}))
    assert (made["status"], made["model"]) == ("queued", BGE)
    assert len(made["request_id"].split("-")) == 5
    result = finished(doors, BGE, made["request_id"])
    (response,) = result["responses"]
    assert (response["id"], response["success"], response["external_reference"]) == (0, True, "reference-1")
    scores = response["result"]["response"]
    assert sorted(score["id"] for score in scores) == [0, 1, 2]
    assert all(-1.0 <= score["score"] <= 1.0 for score in scores)
    assert set(result["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert "status" not in result


def test_every_item_has_its_own_outcome(doors):
    def answer(record):
        said = record.fields["messages"][0]["content"]
        return Answer.of_error(400) if said == "bad" else Answer.of_json(recordings.chat(text=said))

    doors.upstream.script("chat", answer)
    requests = [{"prompt": said, "external_reference": f"ref-{said}"} for said in ("one", "bad", "two")]
    body = {"requests": requests, "queueRequest": True, "options": {"priority": "batch", "deadline_s": 600}}
    made = good(doors.native(f"run/{LLAMA}", body))
    assert made["expires_at"] - made["created_at"] == 600
    responses = finished(doors, LLAMA, made["request_id"])["responses"]
    assert [(r["id"], r["success"], r["external_reference"]) for r in responses] == [
        (0, True, "ref-one"),
        (1, False, "ref-bad"),
        (2, True, "ref-two"),
    ]
    assert [r["result"]["response"] for r in responses if r["success"]] == ["one", "two"]
    assert responses[1]["error"]["code"] == 5004


def test_requests_are_listed_looked_at_and_cancelled(doors):
    gate = doors.thread.gate()
    whole = Answer.of_json(recordings.chat())
    doors.upstream.script(
        "chat",
        lambda record: (
            whole if record.fields["messages"][0]["content"] == "quick" else whole.gate_after(0, gate)
        ),
    )
    requests = [{"prompt": "quick"}, {"prompt": "slow"}, {"prompt": "slow"}]
    request_id = good(doors.native(f"run/{LLAMA}?queueRequest=true", {"requests": requests}))["request_id"]

    def ask(path, method="GET", **headers):
        headers = {"authorization": f"Bearer {KEY}"} | headers
        url = f"{doors.gateway.url}/client/v4/accounts/abc123/ai/{path}"
        request = urllib.request.Request(url, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    look = lambda: good(ask(f"requests/{request_id}"))
    found = doors.until(look, lambda found: found["counts"]["succeeded"] == 1)
    assert found["items"][0]["status"] == "succeeded"
    assert found["status"] == "running"
    running = good(doors.native(f"run/{LLAMA}", {"request_id": request_id}))
    assert (running["status"], running["counts"]["total"]) == ("running", 3)
    listed = good(ask("requests?limit=5"))["requests"]
    assert request_id in [each["request_id"] for each in listed]
    assert request_id not in [each["request_id"] for each in good(ask("requests", **OTHER))["requests"]]
    for method in ("GET", "DELETE"):
        assert bad(ask(f"requests/{request_id}", method, **OTHER)) == (404, 3042)
    assert bad(doors.native(f"run/{LLAMA}", {"request_id": request_id}, **OTHER)) == (404, 3042)
    assert good(ask(f"requests/{request_id}", "DELETE"))["request_id"] == request_id
    responses = finished(doors, LLAMA, request_id)["responses"]
    gate.set()
    assert [response["success"] for response in responses] == [True, False, False]
    assert {item["status"] for item in look()["items"][1:]} == {"cancelled"}


def test_a_single_input_is_queued_as_well_and_an_idempotency_key_is_one_request(doors):
    headers = {"idempotency-key": "night-7"}
    made = {
        good(doors.native(f"run/{LLAMA}?queueRequest=true", PROMPT, **headers))["request_id"]
        for _ in range(3)
    }
    assert len(made) == 1
    result = finished(doors, LLAMA, made.pop())
    assert [each["result"]["response"] for each in result["responses"]] == ["Hello from upstream"]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("run/@cf/nobody/nothing", PROMPT, (400, 5007)),
        (f"run/{LLAMA}", {"nonsense": 1}, (400, 5004)),
        (f"run/{LLAMA}", b"{", (400, 5004)),
        (f"run/{LLAMA}", {"requests": [PROMPT]}, (400, 5004)),
        (f"run/{LLAMA}?queueRequest=true", {"requests": []}, (400, 5004)),
        (f"run/{LLAMA}?queueRequest=true", {"requests": [{"prompt": "x", "stream": True}]}, (400, 5004)),
        (f"run/{LLAMA}?queueRequest=true", {"requests": [PROMPT, {"no": 1}]}, (400, 5004)),
        (f"run/{LLAMA}", {**PROMPT, "options": {"webhookUrl": "https://a.example/"}}, (400, 5004)),
        ("run/@cf/nobody/nothing?queueRequest=true", PROMPT, (400, 5007)),
        (f"run/{LLAMA}", {"request_id": "00000000-0000"}, (404, 3042)),
        ("run", PROMPT, (400, 5004)),
        ("nothing", PROMPT, (404, 3042)),
        ("requests", {}, (405, 5019)),
    ],
)  # fmt: skip
def test_errors_are_told_in_the_envelope_with_cloudflares_numbers(doors, path, body, expected):
    assert bad(doors.native(path, body)) == expected


def test_a_stranger_is_told_so_in_the_envelope(doors):
    assert bad(doors.native(f"run/{LLAMA}", PROMPT, authorization="Bearer nobody")) == (401, 10000)


def test_an_upstream_without_capacity_is_3040_and_a_broken_one_is_not(doors):
    doors.upstream.script("chat", Answer.of_error(429))
    assert bad(doors.native(f"run/{LLAMA}", PROMPT)) == (429, 3040)
    doors.upstream.script("chat", Answer.of_json(b"<html>"))
    assert bad(doors.native(f"run/{LLAMA}", PROMPT))[0] == 502


@pytest.fixture
def busy(doors, tmp_path):
    """A model whose one slot is taken."""
    pools = {"small": {"endpoints": [f"{doors.upstream.url}/v1"], "placement": {"max_in_flight": 1}}}
    models = {LLAMA: {"targets": [{"pool": "small", "model": "plain"}]}}
    gate = doors.thread.gate()
    doors.upstream.script("chat", Answer.of_json(recordings.chat()).gate_after(0, gate))
    with Gateway(tmp_path, queue={"enabled": True}, pools=pools, models=models) as gateway:
        path = f"/client/v4/accounts/abc123/ai/run/{LLAMA}"
        with ThreadPoolExecutor(1) as thread:
            first = thread.submit(gateway.post, path, PROMPT)
            doors.upstream.wait_for(1)
            try:
                yield lambda body, **headers: gateway.post(path, body, headers)
            finally:
                gate.set()
            assert first.result()[0] == 200


def test_who_will_not_wait_is_told_that_there_is_no_room_and_who_asked_for_it_gets_a_job(busy):
    for wish in ({"options": {"rejectIfBusy": True}}, {"rejectIfBusy": True}):
        status, headers, answer = busy(PROMPT | wish)
        assert bad((status, json.loads(answer))) == (429, 3040)
        assert int(headers["retry-after"]) >= 1
    status, headers, answer = busy(PROMPT, **{"x-headgate-on-full": "queue"})
    found = json.loads(answer)
    assert (status, found["success"], found["result"]["object"]) == (202, True, "job")
    assert headers["x-headgate-job"] == found["result"]["id"]


def test_the_openai_routes_are_there_under_the_account(doors):
    base_url = f"{doors.gateway.url}/client/v4/accounts/abc123/ai/v1"
    with openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=60) as client:
        chat = client.chat.completions.create(model=LLAMA, messages=MESSAGES["messages"])
        assert chat.choices[0].message.content == "Hello from upstream"
        assert client.responses.create(model=LLAMA, input="hi").output_text == "Hello from upstream"
        assert client.embeddings.create(model=BGE, input="hi").data
        assert client.models.retrieve(LLAMA).id == LLAMA
        with pytest.raises(openai.NotFoundError) as refused:
            client.chat.completions.create(model="@cf/nobody/nothing", messages=MESSAGES["messages"])
        assert refused.value.code == "model_not_found"

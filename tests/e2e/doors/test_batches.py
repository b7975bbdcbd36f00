"""Files and batches as the official SDK speaks of them: whole runs, every refusal, what is kept when one is cancelled."""

import json
import urllib.request

import openai
import pytest

from tests.e2e.doors.conftest import PRICE
from tests.support import recordings
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e

URL = "/v1/chat/completions"


def line(number, model="half", **changes):
    said = f"hello {number}"
    body = {"model": model, "messages": [{"role": "user", "content": said}]}
    return {"custom_id": f"request-{number}", "method": "POST", "url": URL, "body": body} | changes


def number_of(record) -> int:
    return int(record.fields["messages"][0]["content"].split()[1])


def test_a_file_is_uploaded_listed_read_and_deleted(doors):
    data = b'{"a": "gr\xc3\xbc\xc3\x9fe"}\n' * 500
    made = doors.client.files.create(
        file=("in put.jsonl", data),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (made.object, made.bytes, made.filename) == ("file", len(data), "in put.jsonl")
    assert (made.purpose, made.status) == ("batch", "processed")
    assert made.expires_at - made.created_at == 3600
    assert doors.client.files.retrieve(made.id) == made
    assert doors.client.files.content(made.id).read() == data
    assert made.id in [file.id for file in doors.client.files.list(purpose="batch")]
    page = doors.client.files.list(limit=1, order="asc")
    assert len(page.data) == 1
    for ask in (doors.other.files.retrieve, doors.other.files.content, doors.other.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(made.id)
    assert made.id not in [file.id for file in doors.other.files.list()]
    assert doors.client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError) as refused:
        doors.client.files.retrieve(made.id)
    assert (refused.value.code, refused.value.param) == ("file_not_found", "id")


def test_files_that_cannot_be_taken_are_refused_in_the_sdks_words(doors):
    def refused(error, **changes):
        with pytest.raises(error) as caught:
            doors.client.files.create(**{"file": ("a", b"x"), "purpose": "batch"} | changes)
        return caught.value.code, caught.value.param

    assert refused(openai.BadRequestError, purpose="fine-tune") == ("invalid_value", "purpose")
    assert refused(openai.BadRequestError, file=("a", b"")) == ("empty_file", "file")
    too_large = refused(openai.APIStatusError, file=("a", b"x" * 150_000))
    assert too_large == ("file_too_large", "file")
    status, _, body = doors.gateway.post("/v1/files", {"file": "x"})
    assert (status, json.loads(body)["error"]["code"]) == (415, "unsupported_media_type")
    status, _, body = doors.gateway.post(
        "/v1/files", b"x" * 300_000, {"content-type": "multipart/form-data; boundary=b"}
    )
    assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=doors.gateway.base_url, api_key="sk-nobody", max_retries=0).files.list()


def test_a_batch_runs_every_line_once_and_costs_what_was_said(doors):
    lines = [line(number) for number in range(12)]
    made = doors.start(lines, metadata={"night": "7"})
    assert (made.object, made.status, made.metadata) == ("batch", "validating", {"night": "7"})
    assert made.expires_at - made.created_at == 86_400
    batch = doors.ended(made.id)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (12, 12, 0)
    assert (batch.model, batch.error_file_id, batch.errors) == ("half", None, None)
    assert batch.usage.total_tokens == batch.usage.input_tokens + batch.usage.output_tokens > 0
    assert made.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    output = doors.content(batch.output_file_id)
    assert sorted(each["custom_id"] for each in output) == sorted(each["custom_id"] for each in lines)
    for each in output:
        response = each["response"]
        assert (each["error"], response["status_code"]) == (None, 200)
        assert response["body"]["choices"][0]["message"]["content"] == "Hello from upstream"
        row = doors.gateway.row(response["request_id"], within_s=60)
        tokens = response["body"]["usage"]
        assert (row["price_source"], row["ended"]) == ("config x 0.5", "completed")
        cached = tokens["prompt_tokens_details"]["cached_tokens"]
        fresh = tokens["prompt_tokens"] - cached
        full = (
            fresh * PRICE["input"]
            + cached * PRICE["cached_input"]
            + tokens["completion_tokens"] * PRICE["output"]
        )
        assert row["cost_nanousd"] == round(full * 1000 / 2)
    assert set(map(number_of, doors.upstream.journal)) == set(range(12))
    file = doors.client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")


def test_lines_that_fail_are_in_the_error_file_with_what_they_were_answered(doors):
    def answer(record):
        return Answer.of_error(400) if number_of(record) == 1 else Answer.of_json(recordings.chat())

    doors.upstream.script("chat", answer)
    batch = doors.ended(doors.start([line(number) for number in range(3)]).id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 2, 1)
    (failed,) = doors.content(batch.error_file_id)
    assert (failed["custom_id"], failed["error"]) == ("request-1", None)
    assert failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["message"]
    assert {each["custom_id"] for each in doors.content(batch.output_file_id)} == {"request-0", "request-2"}


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        (b"{]\n", "invalid_json_line", 1),
        ([line(0), line(0)], "duplicate_custom_id", 2),
        ([line(0), line(1, url="/v1/embeddings")], "url_mismatch", 2),
        ([line(0), line(1, model="acme/plain")], "model_mismatch", 2),
        ([line(0), line(1, method="GET")], "invalid_method", 2),
        ([line(0), line(1, custom_id="")], "missing_required_parameter", 2),
        ([line(number) for number in range(51)], "too_many_tasks", None),
        (b"\n\n", "empty_file", None),
        ([line(0, model="nowhere")], "model_not_found", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_a_batch_that_cannot_be_carried_out_fails_and_says_where(doors, lines, code, number):
    batch = doors.ended(doors.start(lines).id)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, number)]
    assert batch.errors.data[0].message


def test_a_batch_that_makes_no_sense_is_refused_at_once(doors):
    file_id = doors.upload([line(0)]).id
    good = {"input_file_id": file_id, "endpoint": URL, "completion_window": "24h"}

    def refused(error, client=doors.client, **changes):
        with pytest.raises(error) as caught:
            client.batches.create(**good | changes)
        return caught.value.code, caught.value.param

    bad, missing = openai.BadRequestError, openai.NotFoundError
    assert refused(bad, endpoint="/v1/moderations") == ("invalid_value", "endpoint")
    assert refused(bad, completion_window="8d") == ("invalid_value", "completion_window")
    assert refused(bad, completion_window="soon") == ("invalid_value", "completion_window")
    assert refused(missing, input_file_id="file-none") == ("file_not_found", "input_file_id")
    assert refused(missing, client=doors.other) == ("file_not_found", "input_file_id")
    assert refused(bad, metadata={"k" * 65: "v"}) == ("invalid_value", "metadata")
    assert refused(bad, extra_body={"speed": "warp"}) == ("unknown_parameter", "speed")
    assert refused(bad, output_expires_after={"anchor": "created_at", "seconds": 5}) == (
        "invalid_value",
        "output_expires_after",
    )
    status, _, body = doors.gateway.post("/v1/batches", b"[]")
    assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_json")


def test_cancelling_keeps_the_lines_that_were_answered(doors):
    gate = doors.thread.gate()
    whole = Answer.of_json(recordings.chat())
    doors.upstream.script(
        "chat", lambda record: whole if number_of(record) == 0 else whole.gate_after(0, gate)
    )
    made = doors.start([line(number) for number in range(5)])
    doors.until(
        lambda: doors.client.batches.retrieve(made.id), lambda found: found.request_counts.completed == 1
    )
    cancelled = doors.client.batches.cancel(made.id)
    assert cancelled.status in {"cancelling", "cancelled"}
    batch = doors.ended(made.id)
    gate.set()
    assert (batch.status, batch.request_counts.completed, batch.request_counts.total) == ("cancelled", 1, 5)
    assert batch.cancelled_at
    assert batch.cancelling_at
    assert [each["custom_id"] for each in doors.content(batch.output_file_id)] == ["request-0"]
    left = doors.content(batch.error_file_id)
    assert {each["error"]["code"] for each in left} == {"batch_cancelled"}
    assert len(left) == 4
    assert doors.client.batches.cancel(made.id).status == "cancelled"


def test_a_batch_that_has_ended_cannot_be_cancelled(doors):
    batch = doors.ended(doors.start([line(0)]).id)
    with pytest.raises(openai.ConflictError) as refused:
        doors.client.batches.cancel(batch.id)
    assert refused.value.code == "batch_ended"


def test_batches_are_their_tenants_own_and_listed_newest_first(doors):
    first, second = doors.start([line(0)]).id, doors.start([line(0)]).id
    page = doors.client.batches.list(limit=1)
    assert ([batch.id for batch in page.data], page.has_more) == ([second], True)
    following = doors.client.batches.list(limit=1, after=second)
    assert [batch.id for batch in following.data] == [first]
    assert first not in [batch.id for batch in doors.other.batches.list()]
    for ask in (doors.other.batches.retrieve, doors.other.batches.cancel):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(first)
        assert refused.value.code == "batch_not_found"
    for batch_id in (first, second):
        assert doors.ended(batch_id).status == "completed"


def test_an_idempotency_key_makes_one_batch(doors):
    file_id = doors.upload([line(0)]).id
    asked = {"input_file_id": file_id, "endpoint": URL, "completion_window": "24h"}
    headers = {"Idempotency-Key": f"night-{file_id}"}
    made = [doors.client.batches.create(**asked, extra_headers=headers).id for _ in range(3)]
    assert len(set(made)) == 1
    with pytest.raises(openai.UnprocessableEntityError):
        doors.client.batches.create(**asked | {"completion_window": "1h"}, extra_headers=headers)
    batch = doors.ended(made[0])
    assert (batch.status, batch.request_counts.total) == ("completed", 1)


def test_embeddings_are_batched_as_well(doors):
    lines = [
        {
            "custom_id": f"e{n}",
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": "half", "input": "x"},
        }
        for n in range(2)
    ]
    batch = doors.ended(doors.start(lines, endpoint="/v1/embeddings").id)
    assert batch.status == "completed"
    vectors = [
        each["response"]["body"]["data"][0]["embedding"] for each in doors.content(batch.output_file_id)
    ]
    assert len(vectors) == 2


def test_unknown_paths_and_methods_below_files_and_batches_are_refused_in_json(doors):
    for method, path, status in (
        ("PUT", "/v1/files", 405),
        ("POST", "/v1/files/file-1", 405),
        ("GET", "/v1/files/file-1/more", 404),
        ("GET", "/v1/batches/", 404),
    ):
        headers = {"authorization": f"Bearer {doors.client.api_key}"}
        request = urllib.request.Request(doors.gateway.url + path, method=method, headers=headers)
        with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(request, timeout=30):
            pass
        assert refused.value.code == status
        assert set(json.loads(refused.value.read())["error"]) == {"message", "type", "param", "code"}

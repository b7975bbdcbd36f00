"""From outside: no id, name or header of one tenant's tells another anything, and no secret is where it does not belong.

Every id there is (jobs, results, streams, batches, files, responses, Workers AI's requests) is asked for by a stranger,
in every way there is, and answered as one that never existed.
"""

import http.client
import json
import re

import openai
import pytest

from tests.e2e.doors.conftest import LLAMA, OTHER_KEY
from tests.support.gateway_process import KEY, OPERATOR_KEY

PROMPT = "QVXJ-a-prompt-of-ours"
HOOK_PATH = "/QVXJ-secret-path"
LINE = {
    "custom_id": "QVXJ-custom",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "half", "messages": [{"role": "user", "content": PROMPT}]},
}


class Ours:
    """What one tenant has in the queue."""

    def __init__(self, doors) -> None:
        body = {"endpoint": "/v1/chat/completions", "body": LINE["body"], "reference": "QVXJ-reference"}
        hook = {"x-headgate-webhook": f"https://hooks.acme.invalid{HOOK_PATH}", "idempotency-key": "QVXJ-key"}
        status, _, answer = doors.gateway.post("/v1/jobs", body, hook)
        assert status == 202, answer
        self.job = json.loads(answer)["id"]
        self.file = doors.upload([LINE]).id
        self.batch = doors.client.batches.create(
            input_file_id=self.file, endpoint="/v1/chat/completions", completion_window="24h"
        ).id
        self.output = doors.ended(self.batch).output_file_id
        self.response = doors.client.responses.create(model="half", input=PROMPT, background=True).id
        status, native = doors.native(f"run/{LLAMA}?queueRequest=true", {"requests": [{"prompt": PROMPT}]})
        assert status == 200, native
        self.request = native["result"]["request_id"]
        doors.until(lambda: ask(doors, "GET", f"/v1/jobs/{self.job}")[1], lambda body: b'"succeeded"' in body)

    def paths(self) -> list[tuple[str, str, str]]:
        """Method, path, and the id that is in it."""
        account = "/client/v4/accounts/abc123/ai/requests"
        return [
            ("GET", f"/v1/jobs/{self.job}", self.job),
            ("GET", f"/v1/jobs/{self.job}/result", self.job),
            ("GET", f"/v1/jobs/{self.job}/stream", self.job),
            ("POST", f"/v1/jobs/{self.job}/cancel", self.job),
            ("DELETE", f"/v1/jobs/{self.job}", self.job),
            ("GET", f"/v1/files/{self.file}", self.file),
            ("GET", f"/v1/files/{self.file}/content", self.file),
            ("DELETE", f"/v1/files/{self.file}", self.file),
            ("GET", f"/v1/files/{self.output}/content", self.output),
            ("GET", f"/v1/batches/{self.batch}", self.batch),
            ("POST", f"/v1/batches/{self.batch}/cancel", self.batch),
            ("GET", f"/v1/responses/{self.response}", self.response),
            ("GET", f"/v1/responses/{self.response}?stream=true", self.response),
            ("GET", f"/v1/responses/{self.response}/input_items", self.response),
            ("POST", f"/v1/responses/{self.response}/cancel", self.response),
            ("DELETE", f"/v1/responses/{self.response}", self.response),
            ("GET", f"{account}/{self.request}", self.request),
            ("DELETE", f"{account}/{self.request}", self.request),
            # An id of one door at another.
            ("GET", f"/v1/jobs/{self.response}", self.response),
            ("GET", f"/v1/jobs/{self.batch}", self.batch),
            ("GET", f"/v1/batches/{self.request}", self.request),
        ]


def ask(doors, method: str, path: str, key: str = KEY, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", doors.gateway.port, timeout=60)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    try:
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def ours(doors) -> Ours:
    return Ours(doors)


def unlike(found_id: str) -> str:
    """An id of the same form that nobody has."""
    head, tail = found_id[:-8], found_id[-8:]
    return head + ("0" * 8 if tail != "0" * 8 else "1" * 8)


def test_a_stranger_is_answered_as_if_there_were_nothing(doors, ours):
    for method, path, found_id in ours.paths():
        theirs = ask(doors, method, path, OTHER_KEY)
        nobodys = ask(doors, method, path.replace(found_id, unlike(found_id)), OTHER_KEY)
        assert theirs[0] == nobodys[0] == 404, (method, path, theirs)
        hidden = [
            re.sub(rb"req_[0-9a-f]+", b"", body.replace(i.encode(), b""))
            for body, i in ((theirs[1], found_id), (nobodys[1], unlike(found_id)))
        ]
        assert hidden[0] == hidden[1], (method, path)
        assert b"QVXJ" not in theirs[1]


def test_a_stranger_sees_nothing_in_lists_nor_past_a_cursor_of_ours(doors, ours):
    cursor = json.loads(ask(doors, "GET", "/v1/jobs?limit=1")[1])["next"]
    for path in (
        "/v1/jobs",
        f"/v1/jobs?after={cursor}",
        "/v1/files",
        f"/v1/files?after={ours.file}",
        "/v1/batches",
        f"/v1/batches?after={ours.batch}",
        "/client/v4/accounts/abc123/ai/requests",
    ):
        status, body = ask(doors, "GET", path, OTHER_KEY)
        assert status in (200, 404), (path, body)
        for secret in (ours.job, ours.file, ours.batch, ours.request, "QVXJ"):
            assert secret.encode() not in body, path


def test_a_stranger_cannot_build_on_what_is_ours(doors, ours):
    batch = {"input_file_id": ours.file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    status, body = ask(doors, "POST", "/v1/batches", OTHER_KEY, json.dumps(batch).encode())
    assert status in (400, 404), body
    assert b"QVXJ" not in body
    polled = {"request_id": ours.request}
    status, _ = ask(
        doors, "POST", f"/client/v4/accounts/abc123/ai/run/{LLAMA}", OTHER_KEY, json.dumps(polled).encode()
    )
    assert status == 404
    again = {"endpoint": "/v1/chat/completions", "body": LINE["body"], "reference": "QVXJ-reference"}
    status, _, body = doors.gateway.post(
        "/v1/jobs", again, {"authorization": f"Bearer {OTHER_KEY}", "idempotency-key": "QVXJ-key"}
    )
    assert json.loads(body).get("id") != ours.job, "an idempotency key of ours gave them our job"


@pytest.mark.parametrize(
    "name", ["../../../etc/cron.d/x", "..\\..\\x", "/etc/passwd", "a\x00b", "x" * 5000, ".."]
)
def test_a_file_name_leads_nowhere(doors, tmp_path, name):
    try:
        made = doors.client.files.create(file=(name, b'{"x":1}\n'), purpose="batch")
    except openai.BadRequestError:
        return  # as good
    folder = doors.gateway.directory / "data"
    places = [path for path in folder.rglob("*") if made.id in path.name]
    assert {path.parent.parent for path in places} == {folder / "files"}


@pytest.mark.parametrize(
    "path", ["..%2f..%2fheadgate.db", "%2e%2e", "file-" + "0" * 44 + "%00", "../x", "file-*"]
)
def test_an_id_of_a_file_leads_nowhere(doors, path):
    for method, tail in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        status, body = ask(doors, method, f"/v1/files/{path}{tail}")
        assert status in (400, 404), (method, path, body)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "https://127.0.0.1/",
        "https://[::ffff:169.254.169.254]/",
        "https://metadata.google.internal/",
        "file:///etc/passwd",
        "https://a.example/ https://b.example/",
        "https://a.example:22/",
        "we_0123",
    ],
)
def test_a_webhook_cannot_be_sent_inside(doors, url):
    body = {"endpoint": "/v1/chat/completions", "body": LINE["body"]}
    status, _, answer = doors.gateway.post("/v1/jobs", body, {"x-headgate-webhook": url})
    assert (status, json.loads(answer)["error"]["code"]) == (400, "invalid_webhook")


def test_no_secret_is_in_the_log_or_goes_upstream(doors, ours):
    log = doors.gateway.log()
    for secret in (KEY, OTHER_KEY, OPERATOR_KEY, PROMPT, HOOK_PATH, "QVXJ"):
        assert secret not in log, secret
    for record in doors.upstream.journal:
        for name, value in record.headers:
            assert HOOK_PATH not in value, name
            assert KEY not in value, name


def test_no_key_is_in_the_queue(doors, ours):
    data = doors.gateway.directory / "data"
    kept = b"".join(path.read_bytes() for path in data.rglob("*") if path.is_file())
    for secret in (KEY, OTHER_KEY, OPERATOR_KEY):
        assert secret.encode() not in kept

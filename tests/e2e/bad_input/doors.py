"""Requests to files, batches, jobs, background responses and Workers AI's paths that make no sense."""

import json
from typing import Any

from tests.e2e.bad_input.requests import CHAT, Vector, request

RUN = "/client/v4/accounts/acme/ai/run"
ACCOUNT = "/client/v4/accounts/acme/ai"
BOUNDARY = "b0undary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
LINE = (
    b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", "input": "hi"}}\n'
)


def ask(path: str, status: int, code: str | None, method: str = "GET") -> Vector:
    return Vector(request(method=method, path=path, length=False, body=b""), status, code)


def post(path: str, body: Any, status: int, code: str | None, *lines: str) -> Vector:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Vector(request(*lines, path=path, body=data), status, code)


def field(name: str, content: bytes = b"batch", filename: str | None = None) -> bytes:
    named = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def form(*parts: bytes, end: bytes = b"--\r\n", code: str = "invalid_form") -> Vector:
    body = b"".join(parts) + f"--{BOUNDARY}".encode() + end
    return Vector(request(path="/v1/files", body=body, content_type=FORM), 400, code)


def native(body: Any, status: int = 400, path: str = f"{RUN}/m") -> Vector:
    return post(path, body, status, None)._replace(family="workers_ai")


FILE = field("file", LINE, "a.jsonl")
PURPOSE = field("purpose")
VECTORS: dict[str, Vector] = {
    # files
    "a file in no form": post("/v1/files", {"purpose": "batch"}, 415, "unsupported_media_type"),
    "a form without a boundary": Vector(
        request(path="/v1/files", content_type="multipart/form-data"), 415, "unsupported_media_type"
    ),
    "a form without a file": form(PURPOSE, code="missing_required_parameter"),
    "a form without a purpose": form(FILE, code="missing_required_parameter"),
    "a purpose nobody knows": form(field("purpose", b"fun"), FILE, code="invalid_value"),
    "two files": form(PURPOSE, FILE, FILE),
    "a form that ends too early": form(PURPOSE, FILE, end=b""),
    "a form of many parts": form(*[PURPOSE] * 50, FILE),
    "a part without a name": form(PURPOSE, FILE.replace(b'name="file"; ', b"")),
    "a file nobody has": ask("/v1/files/file-0", 404, None),
    "a file up the tree": ask("/v1/files/..%2f..%2fpepper/content", 404, None),
    "a list of files of no length": ask("/v1/files?limit=0", 400, None),
    "files in an order nobody knows": ask("/v1/files?order=up", 400, None),
    "PUT of a file": ask("/v1/files/file-0", 405, "method_not_allowed", "PUT"),
    # batches
    "a batch of nothing": post("/v1/batches", {}, 400, None),
    "a batch of a file nobody has": post(
        "/v1/batches",
        {"input_file_id": "file-0", "endpoint": "/v1/embeddings", "completion_window": "24h"},
        404,
        None,
    ),
    "a batch for an endpoint nobody knows": post(
        "/v1/batches",
        {"input_file_id": "file-0", "endpoint": "/v1/dreams", "completion_window": "24h"},
        400,
        None,
    ),
    "a batch that is a list": post("/v1/batches", [], 400, None),
    "a batch nobody has": ask("/v1/batches/batch_0", 404, None),
    "batches after a number": ask("/v1/batches?limit=-1", 400, None),
    # jobs and background responses
    "a job of nothing": post("/v1/jobs", {}, 400, None),
    "a job nobody has": ask("/v1/jobs/job_0", 404, None),
    "a job's stream from nowhere": ask("/v1/jobs/job_0/stream?starting_after=-1", 404, None),
    "jobs in a state nobody knows": ask("/v1/jobs?status=asleep", 400, "invalid_value"),
    "a response in the background that is a word": post(
        "/v1/responses", {"model": "m", "input": "hi", "background": "yes"}, 400, "invalid_field"
    ),
    "a response in the background that is not stored": post(
        "/v1/responses", {"model": "m", "input": "hi", "background": True, "store": False}, 400, None
    ),
    "a response nobody has": ask("/v1/responses/resp_0", 404, None),
    "an idempotency key of a thousand letters": post(
        CHAT, {"model": "m", "messages": []}, 400, None, "Idempotency-Key: " + "k" * 1000
    ),
    "a wish for full pools nobody knows": post(
        CHAT, {"model": "m", "messages": []}, 400, None, "x-headgate-on-full: panic"
    ),
    "a webhook inside": post(
        "/v1/responses",
        {"model": "m", "input": "hi", "background": True},
        400,
        None,
        "x-headgate-webhook: https://169.254.169.254/",
    ),
    # Workers AI
    "a run of nothing": native({}),
    "a run of a list": native([]),
    "a run of half an object": native(b'{"prompt": "hi'),
    "a prompt that is a number": native({"prompt": 7}),
    "a run of a model nobody serves": native({"prompt": "hi"}, 400, f"{RUN}/@cf/nobody/model"),
    "many inputs outside the queue": native({"requests": [{"prompt": "hi"}]}),
    "many inputs that are none": native({"requests": 7}, path=f"{RUN}/m?queueRequest=true"),
    "a request of the queue nobody has": native(
        {"request_id": "00000000-0000-0000-0000-000000000000"}, 404, f"{RUN}/m?queueRequest=true"
    ),
    "a request id that is a list": native({"request_id": ["a"]}, path=f"{RUN}/m?queueRequest=true"),
    "a path below the account nobody knows": ask(f"{ACCOUNT}/dream", 404, None)._replace(family="workers_ai"),
    "a chat below the account without a model": post(
        f"{ACCOUNT}/v1/chat/completions", {"messages": []}, 400, "invalid_field"
    ),
}

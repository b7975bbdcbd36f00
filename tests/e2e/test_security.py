"""Whose secrets stay where, and that what was authorised is what is sent."""

import gzip
import json
import zlib
from uuid import uuid4

import pytest
from backports import zstd

from tests.e2e.conftest import NARROW_KEY, OLD_KEY, UPSTREAM_KEY
from tests.e2e.raw import CHAT, COMPLETIONS, EMBEDDINGS, LEAST, MESSAGES, RESPONSES, USER, ask, called
from tests.support import recordings
from tests.support.gateway_process import KEY, OPERATOR_KEY
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e

ALWAYS = {
    *("host", "user-agent", "accept", "accept-encoding", "authorization"),
    *("content-type", "x-request-id", "content-length"),
}
# What no provider may see, whatever a client sends.
FOREIGN = {
    "api_key": KEY,
    "cookie": f"session={KEY}",
    "proxy_authorization": f"Bearer {KEY}",
    "x_goog_api_key": KEY,
    "x_forwarded_for": "10.1.2.3",
    "forwarded": "for=10.1.2.3",
    "x_real_ip": "10.1.2.3",
    "idempotency_key": "i1",
    "openai_organization": "org-of-the-client",
    "openai_project": "proj-of-the-client",
    "x_stainless_lang": "python",
    "x_codex_turn_metadata": "{}",
    "x_data_parallel_rank": "1",
    "x_vllm_priority": "9",
    "x_request_id": "chosen-by-the-client",
    "x_headgate_tags": "a,b",
    "user_agent": "Client/1",
    "accept_encoding": "gzip",
    "referer": "http://internal.test/",
}


@pytest.mark.parametrize(
    ("path", "model", "more"),
    [
        (CHAT, "acme/plain", set()),
        (COMPLETIONS, "acme/plain", set()),
        (EMBEDDINGS, "acme/plain", set()),
        (RESPONSES, "acme/plain", set()),
        (MESSAGES, "claude/plain", {"x-api-key", "anthropic-version"}),
        ("/open/chat/completions", "plain", set()),
        ("/open/files", "plain", set()),
    ],
)
async def test_an_upstream_sees_its_own_key_and_of_the_clients_headers_only_what_it_may(
    gateway, upstream, path, model, more
):
    body = {"model": model, **LEAST.get(path, LEAST[CHAT])}
    # Not the idempotency key of another test, which is answered already.
    foreign = {**FOREIGN, "idempotency_key": uuid4().hex}
    await ask(gateway, path, body, x_api_key=KEY, openai_beta="assistants=v2", **foreign)
    record = upstream.last
    names = {name for name, _ in record.headers}
    assert names - {"openai-beta"} == (ALWAYS | more) - ({"authorization"} if more else set())
    assert KEY not in str(record.headers) + record.body.decode()
    assert record.header("x-api-key" if more else "authorization").endswith(UPSTREAM_KEY)
    assert record.header("x-request-id").startswith("req_")
    assert record.header("accept-encoding") == "identity"


async def test_a_pools_engines_get_no_key_at_all_and_the_session_they_may_use(gateway, upstreams):
    headers = {
        **FOREIGN,
        "idempotency_key": uuid4().hex,
        "x_session_id": "s1",
        "traceparent": "00-1-2-3",
        "anthropic_beta": "x",
    }
    await ask(gateway, CHAT, called(CHAT, "sturdy"), **headers)
    (record,) = [record for each in upstreams for record in each.journal]
    names = {name for name, _ in record.headers}
    assert names == ALWAYS - {"authorization"} | {"x-session-id", "traceparent"}


@pytest.mark.parametrize("is_stream", [False, True])
async def test_of_an_upstreams_headers_a_client_sees_only_what_it_may(gateway, upstream, is_stream):
    told = {
        "set_cookie": f"key={UPSTREAM_KEY}",
        "authorization": UPSTREAM_KEY,
        "x_echo": UPSTREAM_KEY,
        "openai_organization": "org-of-the-operator",
        "server": "internal-host-7",
        "via": "10.0.0.7",
        "location": "http://10.0.0.7/",
        "x_request_id": "req_upstream",
        "openai_processing_ms": "12",
        "x_ratelimit_limit_tokens": "100",
    }
    answer = Answer.of_events(recordings.chat_events()) if is_stream else Answer.of_json(recordings.chat())
    upstream.script("chat", answer.with_headers(**told))
    got = await ask(gateway, CHAT, called(CHAT, "acme/plain", stream=is_stream))
    ours = {"date", "x-request-id", "x-headgate-target", "x-headgate-model", "x-headgate-session"}
    ours |= {"x-headgate-attempts", "transfer-encoding" if is_stream else "content-length"}
    ours |= set() if is_stream else {"x-headgate-cost-usd", "x-headgate-overhead-us"}
    assert got.headers.keys() == ours | {"content-type", "openai-processing-ms", "x-ratelimit-limit-tokens"}
    assert UPSTREAM_KEY not in str(got)
    assert got.headers["x-request-id"] != "req_upstream"
    assert upstream.url.removeprefix("http://") not in str(got)


@pytest.mark.parametrize(
    "key", [OPERATOR_KEY, OLD_KEY, UPSTREAM_KEY, "", KEY.upper(), KEY[:-1], KEY + " " + KEY]
)
@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/models", "/open/files"])
async def test_no_other_secret_opens_the_data_plane(gateway, upstream, path, key):
    method = "GET" if path == "/v1/models" else "POST"
    answer = await ask(gateway, path, b"{}", method, key=key)
    assert answer.status == 401
    assert upstream.journal == []


async def test_a_stranger_is_refused_before_the_body_is_looked_at(gateway, upstream):
    answer = await ask(gateway, CHAT, b"not json at all", key=None)
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (401, "key_missing")


@pytest.mark.parametrize("query", ["model=sturdy", "a=b&model=", "mod%65l=x", "model", "model=acme%2Fplain"])
@pytest.mark.parametrize("path", [CHAT, RESPONSES, EMBEDDINGS, COMPLETIONS, MESSAGES])
async def test_a_query_cannot_name_another_model(gateway, upstream, path, query):
    model = "claude/plain" if path == MESSAGES else "acme/plain"
    answer = await ask(gateway, f"{path}?{query}", called(path, model))
    assert answer.status == 400
    assert b"a query cannot name another one" in answer.body
    assert upstream.journal == []


@pytest.mark.parametrize("path", ["/open/chat/completions", "/open/responses"])
async def test_nor_can_a_query_on_a_providers_own_path_of_a_known_format(gateway, upstream, path):
    answer = await ask(gateway, f"{path}?model=other", called(CHAT, "plain"))
    assert answer.status == 400
    assert upstream.journal == []


@pytest.mark.parametrize(
    "body",
    [
        rb'{"model":"acme/plain","messages":[],"model":"acme/tools"}',
        rb'{"model":"acme/plain","messages":[],"mod\u0065l":"acme/tools"}',
        rb'{"mod\u0065l":"acme/tools","messages":[],"model":"acme/plain"}',
        rb'{"model":"acme/plain","messages":[],"Model":"acme/tools"}',
        rb'{"model":"acme/plain","messages":[],"MODEL":"acme/tools"}',
        rb'{"model":"acme/plain","messages":[],"model\u0000":"acme/tools"}',
        rb'{"model":"acme/plain","messages":[],"stream":false,"stream":true}',
        b'\xef\xbb\xbf{"model":"acme/plain","messages":[]}',
        '{"model":"acme/plain","messages":[]}'.encode("utf-16"),
        b'{"model":"acme/plain","messages":[{"role":"user","content":"\xff"}]}',
        rb'{"model":"acme/plain\u0000","messages":[]}',
        rb'{"model":["acme/plain"],"messages":[]}',
        rb'{"model":"","messages":[]}',
        rb'{"messages":[]}',
        b'{"model":"acme/plain","messages":[]}{"model":"acme/tools"}',
    ],
)
async def test_a_body_that_two_parsers_could_read_differently_is_refused(gateway, upstream, body):
    """The key may use `acme/plain` and not `acme/tools`."""
    answer = await ask(gateway, CHAT, body, key=NARROW_KEY)
    error = json.loads(answer.body)["error"]
    assert answer.status == 400
    assert error.keys() == {"message", "type", "param", "code"}
    assert upstream.journal == []


async def test_an_escaped_name_of_the_model_is_the_model_that_is_judged_and_sent(gateway, upstream):
    body = rb'{"mod\u0065l":"acme\/pl\u0061in","messages":[]}'
    answer = await ask(gateway, CHAT, body, key=NARROW_KEY)
    assert answer.status == 200
    assert upstream.last.json == {"model": "plain", "messages": []}
    refused = await ask(gateway, CHAT, rb'{"model":"acme\/t\u006fols","messages":[]}', key=NARROW_KEY)
    assert refused.status == 403
    assert len(upstream.journal) == 1


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd", "x-gzip", "GZIP"])
@pytest.mark.parametrize("filler", [0, 500_000], ids=["small", "large"])
async def test_a_compressed_body_reaches_the_upstream_plain(gateway, upstream, coding, filler):
    plain = json.dumps(called(CHAT, "acme/plain", metadata={"x": "y" * filler})).encode()
    compress = {"deflate": zlib.compress, "zstd": zstd.compress}.get(coding, gzip.compress)
    answer = await ask(gateway, CHAT, compress(plain), content_encoding=coding)
    assert answer.status == 200
    assert upstream.last.json == {**json.loads(plain), "model": "plain"}
    assert upstream.last.header("content-encoding") is None
    assert int(upstream.last.header("content-length")) == len(upstream.last.body)


@pytest.mark.parametrize(
    ("body", "coding", "status", "code"),
    [
        (gzip.compress(b" " * 40_000_000), "gzip", 413, "body_too_large"),
        (zlib.compress(b" " * 40_000_000), "deflate", 413, "body_too_large"),
        (zstd.compress(b" " * 40_000_000), "zstd", 413, "body_too_large"),
        (b"{}", "gzip", 400, "invalid_encoding"),
        (gzip.compress(b"{}")[:-4], "gzip", 400, "invalid_encoding"),
        (b"{}", "br", 415, "unsupported_encoding"),
        (gzip.compress(gzip.compress(b"{}")), "gzip, gzip", 415, "unsupported_encoding"),
    ],
    # gzip writes the time: as a name it would be another one in each process of the run.
    ids=["gzip bomb", "deflate bomb", "zstd bomb", "not gzip", "gzip cut off", "brotli", "gzip twice"],
)
async def test_a_body_that_cannot_be_decompressed_within_the_limit_is_refused(
    gateway, upstream, body, coding, status, code
):
    answer = await ask(gateway, CHAT, body, content_encoding=coding)
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (status, code)
    assert upstream.journal == []


async def test_a_providers_own_paths_are_reached_as_they_are_where_the_operator_allows_it(gateway, upstream):
    upstream.script("/open/v1/files", Answer.of_json({"data": []}))
    answer = await ask(gateway, "/open/files?limit=2&after=a%20b", method="GET")
    assert (answer.status, json.loads(answer.body)) == (200, {"data": []})
    record = upstream.last
    assert (record.method, record.target, record.body) == ("GET", "/open/v1/files?limit=2&after=a%20b", b"")
    assert record.header("content-type") is None
    row = gateway.row(answer.headers["x-request-id"])
    assert (row["dialect"], row["requested_model"], row["provider"]) == ("raw", "open/*", "open")
    upload = b"--x\r\n\x00\xff\r\n--x--"
    await ask(gateway, "/open/files", upload, content_type="multipart/form-data; boundary=x")
    assert upstream.last.body == upload
    assert upstream.last.header("content-type") == "multipart/form-data; boundary=x"
    await ask(gateway, "/open/files/file-1", method="DELETE")
    assert (upstream.last.method, upstream.last.path) == ("DELETE", "/open/v1/files/file-1")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_providers_own_path_of_a_known_format_is_priced_like_any_other(gateway, upstream, is_stream):
    answer = await ask(gateway, "/open/chat/completions", called(CHAT, "plain", stream=is_stream))
    assert answer.status == 200
    assert (upstream.last.path, upstream.last.model) == ("/open/v1/chat/completions", "plain")
    row = gateway.row(answer.headers["x-request-id"])
    assert (row["dialect"], row["requested_model"]) == ("chat", "open/plain")
    assert row["cost_nanousd"] == 25 * 2500 + 8 * 10_000


@pytest.mark.parametrize(
    "path",
    [
        "/open/../acme/files",
        "/open/files/../../admin",
        "/open/files/..",
        "/open//files",
        "/open/%2e%2e/admin",
        "/open/%2E%2E%2Fadmin",
        "/open/files%2f..%2fadmin",
        "/open/files%5c..%5cadmin",
        "/open/.%2e/admin",
    ],
)
async def test_a_path_that_an_upstream_might_resolve_to_another_is_refused(gateway, upstream, path):
    answer = await ask(gateway, path, method="GET")
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (400, "invalid_path")
    assert upstream.journal == []


@pytest.mark.parametrize("path", ["/acme/files", "/openx/files", "/OPEN/files", "/gpu/metrics", "/open", "/"])
async def test_what_is_not_open_for_passthrough_is_not_there(gateway, upstream, path):
    answer = await ask(gateway, path, method="GET")
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (404, "unknown_url")
    assert upstream.journal == []


async def test_a_key_with_a_list_of_models_may_not_use_a_providers_own_paths(gateway, upstream):
    raw = await ask(gateway, "/open/files", method="GET", key=NARROW_KEY)
    known = await ask(gateway, "/open/chat/completions", called(CHAT, "plain"), key=NARROW_KEY)
    assert (raw.status, known.status) == (403, 403)
    assert upstream.journal == []


async def test_neither_keys_nor_prompts_nor_answers_are_logged_or_measured(gateway, upstream):
    upstream.script("chat", Answer.of_json(recordings.chat("canary-answer")), Answer.of_error(500))
    prompt = [{"role": "user", "content": "canary-prompt"}]
    for _ in range(2):
        answer = await ask(gateway, CHAT, {"model": "acme/canary", "messages": prompt, "user": "canary-user"})
    await ask(gateway, CHAT + "?model=canary-query", {"model": "canary-model", "messages": USER})
    await ask(gateway, "/canary-path", method="GET", key="sk-canary-key")
    log = gateway.wait_log(answer.headers["x-request-id"])
    pages = log + str(gateway.metrics())
    secrets = (
        KEY,
        NARROW_KEY,
        OLD_KEY,
        UPSTREAM_KEY,
        OPERATOR_KEY,
        "canary-prompt",
        "canary-answer",
        "canary-user",
    )
    for secret in (*secrets, "sk-canary-key", "canary-query"):
        assert secret not in pages

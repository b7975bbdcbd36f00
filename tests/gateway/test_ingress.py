import asyncio
import gzip
import json
import time
import tracemalloc
import zlib

import pytest
from backports import zstd

from gateway.inbound import Refusal
from gateway.ingress import check_content_type, decode_body, read_fields

LIMIT = 32 * 1024 * 1024
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "héllo " * 500}]}).encode()


def deflate(body: bytes, window_bits: int = -15) -> bytes:
    coder = zlib.compressobj(wbits=window_bits)
    return coder.compress(body) + coder.flush()


def stream_zstd(body: bytes, **options: int) -> bytes:
    settings = {zstd.CompressionParameter[name]: value for name, value in options.items()}
    coder = zstd.ZstdCompressor(options=settings)
    return coder.compress(body) + coder.flush()


def skippable(content: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content


def refusal(body: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_fields(body)
    assert caught.value.status == 400
    return caught.value


# Content codings


@pytest.mark.parametrize(
    ("encoding", "raw"),
    {
        "none": (None, BODY),
        "identity": (b"identity", BODY),
        "gzip": (b"gzip", gzip.compress(BODY)),
        "x-gzip, in capitals": (b" X-GZIP ", gzip.compress(BODY)),
        "gzip of two members": (b"gzip", gzip.compress(BODY[:99]) + gzip.compress(BODY[99:])),
        "deflate as zlib": (b"deflate", zlib.compress(BODY)),
        "deflate as a bare stream": (b"deflate", deflate(BODY)),
        "zstd": (b"zstd", zstd.compress(BODY)),
        "zstd of two frames": (b"zstd", zstd.compress(BODY[:99]) + zstd.compress(BODY[99:])),
        "zstd with a skippable frame": (b"zstd", skippable(b"abc") + zstd.compress(BODY) + skippable(b"")),
        "zstd without a content size": (b"zstd", stream_zstd(BODY)),
    }.values(),
)
async def test_bodies_come_out_of_every_coding_whole(encoding, raw):
    assert await decode_body(raw, encoding, LIMIT) == BODY


@pytest.mark.parametrize("size", [0, 1, 16_383, 16_384, 65_536, 262_144, 262_145, 5_000_000])
@pytest.mark.parametrize("fill", [b"0", b"0123456789abcdef\xff\x00"])
async def test_bodies_of_all_sizes_come_out_whole_on_and_off_the_loop(size, fill):
    body = (fill * (size // len(fill) + 1))[:size]
    for encoding, raw in (
        (b"gzip", gzip.compress(body, 1)),
        (b"gzip", gzip.compress(body, 0)),
        (b"deflate", deflate(body)),
        (b"zstd", zstd.compress(body)),
    ):
        assert await decode_body(raw, encoding, LIMIT) == body


@pytest.mark.parametrize("encoding", [b"br", b"gzip, gzip", b"compress", b"", b"identity;q=1"])
async def test_an_unknown_coding_is_a_415_that_names_the_known_ones(encoding):
    with pytest.raises(Refusal, match="gzip, deflate, zstd") as caught:
        await decode_body(b"", encoding or b"\x00", LIMIT)
    assert caught.value.status == 415


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate", b"zstd"])
@pytest.mark.parametrize("size", [3000, 300_000])
async def test_a_corrupt_or_cut_body_is_a_400(encoding, size):
    body = json.dumps([f"{n:x}" for n in range(size // 6)]).encode()
    whole = {b"gzip": gzip.compress, b"deflate": zlib.compress, b"zstd": zstd.compress}[encoding](body)
    middle = len(whole) // 2
    broken = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    spoilt = [
        b"",
        whole[:-1],
        whole[:middle],
        whole + b"x",
        whole + b"\0",
        b"plain text",
        whole + b"x" * 100_000,
    ]
    if encoding != b"zstd":
        spoilt.append(broken)  # zstd's check sum is optional
    for raw in spoilt:
        with pytest.raises(Refusal) as caught:
            await decode_body(raw, encoding, LIMIT)
        assert (caught.value.status, caught.value.code) == (400, "invalid_encoding")


@pytest.mark.parametrize(
    "bomb",
    {
        "gzip": (b"gzip", lambda: gzip.compress(b"0" * 200_000_000, 1)),
        "gzip in members": (b"gzip", lambda: gzip.compress(b"0" * 1_000_000, 1) * 200),
        "deflate": (b"deflate", lambda: zlib.compress(b"0" * 200_000_000, 1)),
        "zstd": (b"zstd", lambda: zstd.compress(b"0" * 200_000_000)),
        "zstd in frames": (b"zstd", lambda: zstd.compress(b"0" * 1_000_000) * 200),
    }.values(),
)
async def test_bombs_are_refused_in_little_time_and_memory_without_stalling_the_loop(bomb):
    encoding, make = bomb
    raw = make()
    limit = 8 * 1024 * 1024
    stalls = []

    async def tick():
        while True:
            begun_at = time.perf_counter()
            await asyncio.sleep(0.001)
            stalls.append(time.perf_counter() - begun_at)

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0)
    tracemalloc.start()
    begun_at = time.perf_counter()
    with pytest.raises(Refusal) as caught:
        await decode_body(raw, encoding, limit)
    took_s = time.perf_counter() - begun_at
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    ticker.cancel()
    assert (caught.value.status, caught.value.code) == (413, "body_too_large")
    assert peak_bytes < limit * 1.5
    assert took_s < 10.0
    assert max(stalls, default=0.0) < 0.5


@pytest.mark.parametrize("empty", [gzip.compress(b""), zstd.compress(b"")], ids=["gzip", "zstd"])
async def test_a_crowd_of_empty_members_is_refused(empty):
    encoding = b"gzip" if empty[:2] == b"\x1f\x8b" else b"zstd"
    with pytest.raises(Refusal) as caught:
        await decode_body(empty * 100_000, encoding, LIMIT)
    assert caught.value.status == 400


async def test_a_zstd_window_beyond_8_mib_is_refused():
    with pytest.raises(Refusal) as caught:
        await decode_body(stream_zstd(BODY * 4000, window_log=27), b"zstd", LIMIT)
    assert caught.value.status == 400


async def test_an_uncompressed_body_is_held_to_the_same_limit():
    assert await decode_body(b"x" * 10, None, 10) == b"x" * 10
    assert await decode_body(gzip.compress(b"x" * 10), b"gzip", 10) == b"x" * 10
    for raw, encoding in ((b"x" * 11, None), (gzip.compress(b"x" * 11), b"gzip")):
        with pytest.raises(Refusal) as caught:
            await decode_body(raw, encoding, 10)
        assert caught.value.status == 413


# Content types


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"application/json",
        b"Application/JSON; charset=UTF-8",
        b'application/json;charset="utf-8"',
        b"application/vnd.x+json",
    ],
)
def test_json_is_accepted_however_it_is_declared(value):
    check_content_type(value)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"text/plain",
        b"multipart/form-data; boundary=x",
        b"application/x-www-form-urlencoded",
        b"application/json; charset=utf-16",
    ],
)
def test_anything_but_json_in_utf_8_is_a_415(value):
    with pytest.raises(Refusal) as caught:
        check_content_type(value)
    assert caught.value.status == 415


# Routed fields


def test_the_routed_fields_are_read_and_the_rest_stays_bytes():
    body = (
        b'{"model":"gpt-4o","stream":true,"max_tokens":5,"user":"u","prompt_cache_key":"p","service_tier":"flex",'
        b'"previous_response_id":"r","stream_options":{"include_usage":true},"messages":[{"model":"inner"}],"x":1e400}'
    )
    fields = read_fields(body)
    assert (fields.model, fields.stream, fields.max_tokens) == ("gpt-4o", True, 5)
    assert fields.prompt_cache_key == "p"
    assert bytes(fields.document.values["messages"]) == b'[{"model":"inner"}]'
    assert [body[m.value_start : m.value_end] for m in fields.document.members][-1] == b"1e400"


def test_what_is_missing_or_null_is_empty():
    for body in (
        b'{"model":"m"}',
        b'{"model":"m","stream":null,"max_tokens":null,"user":null,"stream_options":null}',
    ):
        fields = read_fields(body)
        assert (fields.stream, fields.max_tokens, fields.prompt_cache_key) == (False, None, "")


def test_the_largest_of_the_token_limits_counts():
    assert read_fields(b'{"model":"m","max_completion_tokens":7}').max_tokens == 7
    assert (
        read_fields(
            b'{"model":"m","max_tokens":5,"max_output_tokens":9,"max_completion_tokens":7}'
        ).max_tokens
        == 9
    )
    assert read_fields(b'{"model":"m","max_tokens":0}').max_tokens == 0


def test_white_space_and_escapes_are_no_obstacle():
    fields = read_fields(b' {\n "mod\\u0065l" : "gp\\u0074" ,\r\n\t"messages": [ ] }\n')
    assert fields.model == "gpt"
    assert [member.key for member in fields.document.members] == ["model", "messages"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"b"}',
        b'{"model":"a","mod\\u0065l":"b"}',
        b'{"\\u006dodel":"a","messages":[],"model":"a"}',
        b'{"model":"a","stream":true,"stream":false}',
        b'{"model":"a","max_tokens":1,"max_tokens":100000}',
        b'{"model": "a", "user": "x", "user": "y"}',
        b'{"model":"a","temperature":1,"temperature":1}',
    ],
)
def test_a_field_given_twice_is_refused(body):
    assert "given twice" in refusal(body).message


@pytest.mark.parametrize(
    "key", ["Model", "MODEL", "Stream", "model\\u0000", "model\\u0000x", " model", "\\u017ftream"]
)
def test_another_spelling_of_a_routed_field_is_refused(key):
    assert "some servers would read it as" in refusal(b'{"model":"a","%b":"b"}' % key.encode()).message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model":"m","stream":"true"}', "`stream` must be a boolean"),
        (b'{"model":"m","stream":1}', "`stream` must be a boolean"),
        (b'{"model":"m","max_tokens":"5"}', "`max_tokens` must be an integer from 0 to 2147483647"),
        (b'{"model":"m","max_tokens":1.5}', "`max_tokens` must be an integer from 0 to 2147483647"),
        (b'{"model":"m","max_tokens":true}', "`max_tokens` must be an integer from 0 to 2147483647"),
        (b'{"model":"m","max_tokens":-1}', "`max_tokens` must be an integer from 0 to 2147483647"),
        (
            b'{"model":"m","max_output_tokens":1e999}',
            "`max_output_tokens` must be an integer from 0 to 2147483647",
        ),
        (
            b'{"model":"m","max_tokens":%b}' % (b"9" * 30),
            "`max_tokens` must be an integer from 0 to 2147483647",
        ),
        (
            b'{"model":"m","max_tokens":%b}' % (b"9" * 50_000),
            "`max_tokens` must be an integer from 0 to 2147483647",
        ),
        (b'{"model":"m","user":5}', "`user` must be a string"),
        (b'{"model":"m","stream_options":[]}', "`stream_options` must be an object"),
        (b'{"model":5}', "`model` must be a string of 1 to 512 characters"),
        (b'{"model":null}', "`model` must be a string of 1 to 512 characters"),
        (b'{"model":""}', "`model` must be a string of 1 to 512 characters"),
        (b'{"model":"%b"}' % (b"m" * 600), "`model` must be a string of 1 to 512 characters"),
        (b'{"model":"a\\u0000b"}', "`model` must not contain control characters"),
        (b'{"model":"a\\nb"}', "`model` must not contain control characters"),
        (b'{"messages":[]}', "`model` is missing"),
        (b"{}", "`model` is missing"),
    ],
)
def test_a_wrong_type_is_told_in_terms_of_the_field(body, message):
    caught = refusal(body)
    assert caught.message == message
    assert f"`{caught.param}`" in message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"[]", "must be a JSON object"),
        (b'"model"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'\xef\xbb\xbf{"model":"m"}', "byte order mark"),
        ('{"model":"m"}'.encode("utf-16"), "not valid JSON"),
        (b'{"model":"m","x":NaN}', "not valid JSON"),
        (b'{"model":"m","x":-Infinity}', "not valid JSON"),
        (b'{"model":"m",}', "not valid JSON"),
        (b"{'model':'m'}", "not valid JSON"),
        (b'{"model":"m"} {"model":"n"}', "not valid JSON"),
        (b'{"model":"m"', "ends too early"),
        (b'{"model":"m","x":"\\ud800"}', "not valid JSON"),
        (b'{"model":"m","x":[{"y":"\\udc00 and more"}]}', "not valid JSON"),
        (b'{"model":"m","x":"\x00"}', "not valid JSON"),
        (b'{"model":"m","x":"\xff"}', "not valid UTF-8"),
        (b'{"model":"m","x":"\xc0\xa2"}', "not valid UTF-8"),
        (b'{"model":"m","x":"\xed\xa0\x80"}', "not valid UTF-8"),
        (b'{"model":"m\xff"}', "not valid UTF-8"),
        (b'{"model":"m","mod\xffel":"x"}', "not valid UTF-8"),
        (b'{"model":"m","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nests too deeply"),
        (b'{"model":"m","x":' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}", "nests too deeply"),
        (b'{"model":"m"' + b" " * 100_000 + b"}", "white space"),
        (b'{"model":"m",' + b",".join(b'"%d":0' % n for n in range(2000)) + b"}", "may have 1000 fields"),
    ],
)
def test_what_is_no_acceptable_json_object_is_told_in_one_sentence(body, message):
    assert message in refusal(body).message


@pytest.mark.parametrize("place", [0, 1, *range(32_745, 32_755), 65_535 - 18, 99_998])
def test_malformed_utf_8_is_found_wherever_it_is(place):
    for text, is_valid in (
        ("é".encode(), True),
        ("🙂".encode(), True),
        (b"\xe2\x82", False),
        (b"\x80" * 4, False),
    ):
        filling = b"a" * place + text + b"b" * 100_000
        body = b'{"model":"m","x":"%b"}' % filling
        if is_valid:
            assert read_fields(body).model == "m"
        else:
            assert "UTF-8" in refusal(body).message


def test_a_body_of_millions_of_tiny_fields_is_refused_before_it_is_built():
    bomb = b'{"model":"m",' + b",".join(b'"%x":0' % n for n in range(2_000_000)) + b"}"
    begun_at = time.perf_counter()
    assert "together" in refusal(bomb).message
    assert time.perf_counter() - begun_at < 5.0


def test_a_large_body_of_the_ordinary_kind_is_read():
    body = json.dumps({"model": "m", "messages": [{"content": "x" * 100_000}] * 50, "tools": []}).encode()
    assert len(read_fields(body).document.members) == 3

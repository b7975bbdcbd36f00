import asyncio
import contextlib
import logging
import random
import socket
import time

import pytest

from gateway.inbound import Limits, Refusal, Server
from tests.support.edge import GET, POST, Journal, chunked, post, refuse, serving

LOOPS = ("uvloop", "asyncio")


def get(path: bytes) -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nhost: gateway\r\n\r\n"


def holding(journal: Journal, *, reads_body: bool = True):
    """A handler that never answers by itself."""

    async def handle(request):
        journal.note("begun")
        try:
            if reads_body:
                await request.body()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            journal.note("gone" if request.is_gone else "cancelled")
            raise

    return handle


# Ordinary requests


async def test_a_request_is_answered_with_length_date_and_no_server_header():
    async with serving() as edge:
        answer = await edge.exchange(post(b'{"a":1}'))
    assert (answer.version, answer.status, answer.reason) == ("HTTP/1.1", 200, "OK")
    assert answer.body == b'POST /v1/chat/completions  7 {"a":1}'
    assert answer.headers["date"].endswith("GMT")
    assert set(answer.headers) == {"content-type", "date", "content-length"}


async def test_a_connection_serves_many_requests():
    async with serving() as edge:
        client = await edge.connect()
        for number in range(20):
            answer = await client.exchange(post(b"%d" % number))
            assert answer.body.endswith(b" %d" % number)
        assert edge.server.open_connections == 1


async def test_handlers_see_the_request_as_it_was_sent():
    seen = []

    async def handle(request):
        seen.append(request)
        request.respond(200, [], b"")

    async with serving(handle) as edge:
        before = time.perf_counter()
        await edge.exchange(
            b"DELETE /v1/responses/a%20b?x=1&y=%2F?z HTTP/1.1\r\nHost: [::1]:8080\r\nX-Tag: a \r\n"
            b"x-tag:b\r\nX_Api_Key: no\r\nX-Empty:\r\n\r\n"
        )
    request = seen[0]
    assert (request.method, request.path, request.query) == ("DELETE", "/v1/responses/a%20b", "x=1&y=%2F?z")
    assert request.headers == {
        b"host": b"[::1]:8080",
        b"x-tag": b"a, b",
        b"x_api_key": b"no",
        b"x-empty": b"",
    }
    assert request.peer == "127.0.0.1"
    assert before <= request.received_at <= time.perf_counter()


async def test_every_split_of_a_request_gives_the_same_result():
    for request in (post(b'{"a":"b"}'), chunked(b"{", b'"a":', b"1}"), GET):
        async with serving() as edge:
            whole = await edge.exchange(request)
            client = await edge.connect()
            for cut in range(1, len(request)):
                await client.send(request[:cut])
                await asyncio.sleep(0)
                answer = await client.exchange(request[cut:])
                assert (answer.status, answer.body) == (whole.status, whole.body), cut


async def test_every_split_of_two_pipelined_requests_gives_both_answers():
    async with serving() as edge:
        client = await edge.connect()
        for first in (post(b"ab"), chunked(b"a", b"b"), GET):
            both = first + post(b"second")
            for cut in range(1, len(both)):
                await client.send(both[:cut])
                await asyncio.sleep(0)
                await client.send(both[cut:])
                assert (await client.read_answer()).status == 200
                assert (await client.read_answer()).body.endswith(b" 6 second"), cut


async def test_a_request_may_arrive_byte_by_byte():
    async with serving() as edge:
        client = await edge.connect()
        for request in (post(b"abc"), chunked(b"a", b"bc"), post(b"abc")):
            await client.drip(b"\r\n" + request)
            assert (await client.read_answer()).body.endswith(b" 3 abc")


async def test_pipelined_requests_are_answered_in_order_one_at_a_time():
    running = []

    async def handle(request):
        assert not running
        running.append(request)
        body = await request.body()
        await asyncio.sleep(0)
        running.clear()
        request.respond(200, [], body)

    requests = [post(b"%d" % n) if n % 3 else chunked(b"%d" % n) for n in range(60)]
    async with serving(handle) as edge:
        client = await edge.connect()
        await client.send(*requests)
        assert [int((await client.read_answer()).body) for _ in requests] == list(range(60))


async def test_a_flood_of_pipelined_requests_is_held_back_and_answered():
    journal = Journal()
    gate = asyncio.Event()

    async def handle(request):
        journal.note("begun")
        await gate.wait()
        request.respond(200, [], await request.body())

    async with serving(handle, pipelined_bytes=1000) as edge:
        client = await edge.connect()
        flood = post(b"x" * 8000) * 2500
        sending = asyncio.create_task(client.send(flood))
        await journal.until("begun")
        _, unfinished = await asyncio.wait({sending}, timeout=0.2)
        assert unfinished, "more than 20 MB were taken in before the first answer"
        gate.set()
        for _ in range(2500):
            assert (await client.read_answer()).status == 200
        await sending


async def test_answers_that_nobody_reads_do_not_pile_up():
    handled = []

    async def handle(request):
        handled.append(request)
        request.respond(200, [], b"x" * 1_000_000)

    async with serving(handle) as edge:
        client = await edge.connect(receive_buffer=65536)
        await client.send(GET * 100)
        waited = 0
        while waited < 20:
            before = len(handled)
            await asyncio.sleep(0.01)
            waited = waited + 1 if len(handled) == before else 0
        assert len(handled) < 20
        for _ in range(100):
            assert len((await client.read_answer()).body) == 1_000_000
    assert len(handled) == 100


async def test_a_client_that_sends_requests_but_reads_no_answers_is_dropped():
    async def handle(request):
        request.respond(200, [], b"x" * 5_000_000)

    async with serving(handle, write_stall_s=0.2) as edge:
        client = await edge.connect(receive_buffer=65536)
        await client.send(GET * 100)
        while edge.server.open_connections == 0:
            await asyncio.sleep(0.001)
        assert await edge.server.wait_closed(5.0) == 0


async def test_bodies_of_all_sizes_arrive_whole():
    async def handle(request):
        body = await request.body()
        request.respond(200, [], b"%d %d" % (len(body), sum(body) % 65536))

    async with serving(handle) as edge:
        client = await edge.connect()
        for size in (0, 1, 65535, 1_000_003, 9_000_000):
            body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
            expected = b"%d %d" % (size, sum(body) % 65536)
            assert (await client.exchange(post(body))).body == expected
            pieces = [body[i : i + 70_000] for i in range(0, size, 70_000)]
            assert (await client.exchange(chunked(*pieces))).body == expected


async def test_chunk_extensions_and_trailers_are_ignored():
    request = (
        POST + b"transfer-encoding: chunked\r\n\r\n3;a=b;c\r\nabc\r\n0;d\r\nx-api-key: t\r\nhost: t\r\n\r\n"
    )
    async with serving() as edge:
        client = await edge.connect()
        for _ in range(3):
            assert (await client.exchange(request)).body.endswith(b" 3 abc")


async def test_a_chunked_body_made_of_blank_lines_is_one_body():
    async with serving() as edge:
        client = await edge.connect()
        body = b"\r\n\r\n" * 5000
        for request in (chunked(body), chunked(b"\r\n\r", b"\n\r\n\r\n"), chunked(b"x") + GET):
            await client.send(request)
        assert (await client.read_answer()).body.endswith(b" 20000 " + body)
        assert (await client.read_answer()).body.endswith(b" 8 \r\n\r\n\r\n\r\n")
        assert (await client.read_answer()).body.endswith(b" 1 x")
        assert (await client.read_answer()).body.startswith(b"GET /v1/models")


async def test_head_is_answered_without_a_body():
    async with serving() as edge:
        client = await edge.connect()
        await client.send(b"HEAD /v1/models HTTP/1.1\r\nhost: a\r\n\r\n", GET)
        answer = await client.read_answer(is_head=True)
        assert (answer.status, answer.headers["content-length"]) == (200, "19")
        assert (await client.read_answer()).body.startswith(b"GET")


async def test_http_1_0_keeps_the_connection_only_if_asked():
    async with serving() as edge:
        client = await edge.connect()
        answer = await client.exchange(b"GET / HTTP/1.0\r\nconnection: Keep-Alive\r\n\r\n")
        assert answer.headers["connection"] == "keep-alive"
        answer = await client.exchange(b"GET / HTTP/1.0\r\n\r\n")
        assert answer.headers["connection"] == "close"
        assert await client.is_closed()


async def test_connection_close_is_obeyed_and_said():
    async with serving() as edge:
        client = await edge.connect()
        answer = await client.exchange(post(b"", b"connection: x, Close"))
        assert answer.headers["connection"] == "close"
        assert await client.is_closed()


async def test_an_unknown_status_and_no_content_have_a_proper_head():
    async def handle(request):
        request.respond(int(request.path[1:]), [], b"")

    async with serving(handle) as edge:
        assert (await edge.exchange(get(b"/529"))).status == 529
        answer = await edge.exchange(get(b"/204"))
        assert (answer.status, "content-length" in answer.headers) == (204, False)


async def test_nagle_is_off():
    seen = []

    async def handle(request):
        sock = request._connection.transport.get_extra_info("socket")
        seen.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        request.respond(200, [], b"")

    async with serving(handle) as edge:
        await edge.exchange(GET)
    assert seen[0]


# What is refused

VECTORS = {
    "te before chunked": (POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    "te after chunked": (POST + b"transfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400),
    "te identity": (POST + b"transfer-encoding: identity\r\n\r\n", 400),
    "te twice": (POST + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "te with a vertical tab": (POST + b"transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400),
    "te on 1.0": (b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "te and length": (POST + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "length and te": (POST + b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n", 400),
    "two equal lengths": (POST + b"content-length: 0\r\ncontent-length: 0\r\n\r\n", 400),
    "two lengths": (POST + b"content-length: 0\r\ncontent-length: 5\r\n\r\nhello", 400),
    "a list of lengths": (POST + b"content-length: 5, 5\r\n\r\nhello", 400),
    "signed length": (POST + b"content-length: +5\r\n\r\nhello", 400),
    "negative length": (POST + b"content-length: -5\r\n\r\nhello", 400),
    "hexadecimal length": (POST + b"content-length: 0x5\r\n\r\nhello", 400),
    "empty length": (POST + b"content-length:\r\n\r\n", 400),
    "overflowing length": (POST + b"content-length: 99999999999999999999\r\n\r\n", 400),
    "host with a fragment": (b"GET / HTTP/1.1\r\nhost: a/#@b\r\n\r\n", 400),
    "host with credentials": (b"GET / HTTP/1.1\r\nhost: a@b\r\n\r\n", 400),
    "host with a bad port": (b"GET / HTTP/1.1\r\nhost: a:80b\r\n\r\n", 400),
    "empty host": (b"GET / HTTP/1.1\r\nhost:\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\naccept: */*\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n", 400),
    "bad host on 1.0": (b"GET / HTTP/1.0\r\nhost: a b\r\n\r\n", 400),
    "version 2.0": (b"GET / HTTP/2.0\r\nhost: a\r\n\r\n", 400),
    "version 1.2": (b"GET / HTTP/1.2\r\nhost: a\r\n\r\n", 400),
    "version 0.9 spelt out": (b"GET / HTTP/0.9\r\nhost: a\r\n\r\n", 400),
    "version in lower case": (b"GET / http/1.1\r\nhost: a\r\n\r\n", 400),
    "http/0.9": (b"GET /\r\n", 400),
    "the http/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "another protocol": (b"SOURCE / ICE/1.0\r\nhost: a\r\n\r\n", 400),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "an absolute target": (b"GET http://other/ HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    "an authority target": (b"CONNECT other:443 HTTP/1.1\r\nhost: other:443\r\n\r\n", 400),
    "an asterisk target": (b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    "a fragment in the target": (get(b"/a#b"), 400),
    "a control character in the target": (get(b"/a\x01b"), 400),
    "a non-ASCII target": (get(b"/\xc3\xa9"), 400),
    "a target with a space": (get(b"/a b"), 400),
    "two spaces": (b"GET  / HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    "a space after the version": (b"GET / HTTP/1.1 \r\nhost: a\r\n\r\n", 400),
    "a method in lower case": (b"get / HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    "an unknown method": (b"FROB / HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    "a folded header": (b"GET / HTTP/1.1\r\nhost: a\r\nx: b\r\n c\r\n\r\n", 400),
    "a space before the colon": (b"GET / HTTP/1.1\r\nhost: a\r\nx-api-key : b\r\n\r\n", 400),
    "a line without a colon": (b"GET / HTTP/1.1\r\nhost: a\r\nnonsense\r\n\r\n", 400),
    "a header without a name": (b"GET / HTTP/1.1\r\nhost: a\r\n: b\r\n\r\n", 400),
    "a non-ASCII header name": (b"GET / HTTP/1.1\r\nhost: a\r\nx\xc3\xa9: b\r\n\r\n", 400),
    "a space before the first header": (b"GET / HTTP/1.1\r\n host: a\r\n\r\n", 400),
    "NUL in a value": (b"GET / HTTP/1.1\r\nhost: a\r\nx: b\x00c\r\n\r\n", 400),
    "CR in a value": (b"GET / HTTP/1.1\r\nhost: a\r\nx: b\rc\r\n\r\n", 400),
    "lines ended by LF": (b"GET / HTTP/1.1\nhost: a\n\n", 400),
    "one line ended by LF": (b"GET / HTTP/1.1\r\nhost: a\nx: y\r\n", 400),
    "an upgrade": (GET[:-2] + b"upgrade: websocket\r\nconnection: upgrade\r\n\r\n", 400),
    "an upgrade with a body": (POST + b"upgrade: h2c\r\ncontent-length: 3\r\n\r\nabc", 400),
    "two authorizations": (POST + b"authorization: a\r\nauthorization: b\r\n\r\n", 400),
    "two keys": (POST + b"x-api-key: a\r\nX-Api-Key: a\r\n\r\n", 400),
    "two content types": (POST + b"content-type: a\r\ncontent-type: a\r\n\r\n", 400),
    "two codings": (POST + b"content-encoding: gzip\r\ncontent-encoding: gzip\r\n\r\n", 400),
    "an expectation nobody knows": (post(b"{}", b"expect: magic"), 417),
    "a bad chunk size": (POST + b"transfer-encoding: chunked\r\n\r\nzz\r\nab\r\n0\r\n\r\n", 400),
    "a signed chunk size": (POST + b"transfer-encoding: chunked\r\n\r\n+1\r\na\r\n0\r\n\r\n", 400),
    "a chunk size with 0x": (POST + b"transfer-encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n", 400),
    "an overflowing chunk size": (POST + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\na", 400),
    "a chunk longer than it says": (POST + b"transfer-encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n", 400),
    "a chunk ended by LF": (POST + b"transfer-encoding: chunked\r\n\r\n1\na\n0\n\n", 400),
    "a space after the chunk size": (POST + b"transfer-encoding: chunked\r\n\r\n1 \r\na\r\n0\r\n\r\n", 400),
    "a long target": (get(b"/" + b"a" * 9000), 414),
    "a long target without an end": (b"GET /" + b"a" * 9000, 414),
    "large headers": (GET[:-2] + b"x: " + b"a" * 40_000 + b"\r\n\r\n", 431),
    "large headers without an end": (GET[:-2] + b"x: " + b"a" * 40_000, 431),
    "many headers": (GET[:-2] + b"".join(b"x%d: a\r\n" % n for n in range(200)) + b"\r\n", 431),
    "one header many times": (GET[:-2] + b"x: a\r\n" * 2000 + b"\r\n", 431),
    "endless trailers": (
        POST + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"x: " + b"a" * 40_000 + b"\r\n\r\n",
        431,
    ),
    "a body over the limit": (POST + b"content-length: 2000000\r\n\r\n", 413),
    "a chunked body over the limit": (chunked(b"x" * 600_000, b"x" * 600_000), 413),
}


@pytest.mark.parametrize("name", VECTORS)
async def test_malformed_requests_are_refused_in_json_and_the_connection_closed(name):
    data, status = VECTORS[name]
    handled = []

    async def handle(request):
        handled.append(request)
        await request.body()
        raise AssertionError("a body was accepted")

    async with serving(handle, body_bytes=1_000_000) as edge:
        client = await edge.connect()
        answer = await client.exchange(data)
        assert answer.status == status
        assert answer.headers["connection"] == "close"
        assert answer.headers["x-request-id"] == "req_edge"
        assert b'"error"' in answer.body
        assert await client.is_closed()
        assert len(handled) <= 1


async def test_refusals_do_not_depend_on_how_the_bytes_arrive():
    async with serving(body_bytes=1000) as edge:
        for name in ("lines ended by LF", "a folded header", "two hosts", "a bad chunk size", "http/0.9"):
            data, status = VECTORS[name]
            for cut in range(1, len(data) - 1):
                client = await edge.connect()
                await client.send(data[:cut])
                await asyncio.sleep(0)
                with contextlib.suppress(ConnectionError):  # refused already
                    await client.send(data[cut:])
                assert (await client.read_answer()).status == status, (name, cut)
                client.close()


async def test_mutated_streams_are_answered_or_refused_without_an_error_of_ours(caplog):
    """Bytes deleted, doubled, replaced and shuffled, by a seed: no exception, no hang, only whole answers."""
    dice = random.Random(20261120)
    seeds = [data for data, _ in VECTORS.values() if len(data) < 500]
    seeds += [post(b'{"a":1}'), chunked(b"ab", b"c"), GET, GET + post(b"x") + chunked(b"y")]
    problems = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with serving(body_bytes=1000) as edge:
        for _ in range(600):
            data = bytearray(dice.choice(seeds) + dice.choice(seeds))
            for _ in range(dice.randint(1, 4)):
                start = dice.randrange(len(data))
                piece = bytes(data[start : start + dice.randint(1, 10)])
                data[start : start + dice.randint(0, 5)] = dice.choice(
                    [b"", piece * 2, b"\r\n", dice.randbytes(2)]
                )
            client = await edge.connect()
            with contextlib.suppress(ConnectionError):
                await client.drip(bytes(data), size=dice.choice([7, 100, 10_000]))
                client.half_close()
            answers = await client.read_to_end()
            assert answers == b"" or answers.startswith(b"HTTP/1.1 "), data
            client.close()
    assert not problems
    assert not [record for record in caplog.records if record.exc_info]


async def test_the_refused_path_is_told_so_that_the_error_has_the_right_shape():
    async with serving() as edge:
        answer = await edge.exchange(b"POST /v1/messages?x HTTP/1.1\r\nhost: a b\r\n\r\n")
        assert b'"path": "/v1/messages"' in answer.body
        answer = await edge.exchange(b"\x00\x01")
        assert b'"path": ""' in answer.body


async def test_what_follows_a_refused_request_is_not_looked_at():
    handled = []

    async def handle(request):
        handled.append(request.path)
        request.respond(200, [], b"")

    async with serving(handle) as edge:
        client = await edge.connect()
        await client.send(POST + b"transfer-encoding: gzip, chunked\r\n\r\n", get(b"/smuggled"))
        assert (await client.read_answer()).status == 400
        assert await client.is_closed()
    assert handled == []


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"DELETE"])
async def test_a_body_where_none_belongs_is_ignored_and_ends_the_connection(method):
    handled = []

    async def handle(request):
        handled.append(request.path)
        request.respond(200, [], b"")

    async with serving(handle) as edge:
        client = await edge.connect()
        smuggled = get(b"/smuggled")
        await client.send(
            method + b" / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(smuggled), smuggled
        )
        answer = await client.read_answer(is_head=True)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await client.is_closed()
    assert handled == ["/"]


async def test_an_early_answer_to_a_large_upload_reaches_the_client():
    async def handle(request):
        request.respond(401, [], b"who are you?")

    async with serving(handle) as edge:
        client = await edge.connect()
        await client.send(POST + b"content-length: 200000\r\n\r\n", b"x" * 190_000)
        answer = await client.read_answer()
        assert (answer.status, answer.body, answer.headers["connection"]) == (401, b"who are you?", "close")
        assert await client.is_closed()


async def test_an_endless_upload_is_cut_after_the_answer():
    async with serving(body_bytes=1000) as edge:
        client = await edge.connect()
        await client.send(POST + b"content-length: 1000000000\r\n\r\n")
        assert (await client.read_answer()).status == 413
        with pytest.raises(ConnectionError):
            for _ in range(100):
                await client.send(b"x" * 100_000)
                await asyncio.sleep(0.001)


async def test_handlers_may_answer_a_refused_body_themselves():
    async def handle(request):
        try:
            await request.body()
        except Refusal as refusal:
            request.respond(refusal.status, [(b"x-mine", b"1")], refusal.message.encode())

    async with serving(handle, body_bytes=10) as edge:
        answer = await edge.exchange(post(b"x" * 11))
    assert (answer.status, answer.headers["x-mine"]) == (413, "1")
    assert answer.body == b"the request body may take 10 bytes"


# Expect: 100-continue


async def test_the_body_is_invited_when_the_handler_wants_it():
    async with serving() as edge:
        client = await edge.connect()
        await client.send(POST + b"expect: 100-Continue\r\ncontent-length: 5\r\n\r\n")
        assert (await client.read_answer()).status == 100
        answer = await client.exchange(b"hello")
        assert (answer.status, answer.body[-5:]) == (200, b"hello")
        assert (await client.exchange(GET)).status == 200


async def test_a_refused_client_is_not_invited_to_send_its_body():
    async def handle(request):
        request.respond(401, [], b"")

    async with serving(handle) as edge:
        answer = await edge.exchange(POST + b"expect: 100-continue\r\ncontent-length: 5\r\n\r\n")
    assert (answer.status, answer.headers["connection"]) == (401, "close")


async def test_no_invitation_when_the_body_is_here_already():
    async with serving() as edge:
        assert (await edge.exchange(post(b"hello", b"expect: 100-continue"))).status == 200


# Streams


async def test_a_streamed_answer_is_chunked_one_chunk_per_write():
    async def handle(request):
        assert not request.is_started
        request.start(200, [(b"content-type", b"text/event-stream")])
        assert request.is_started
        for part in (b"data: 1\n\n", b"", b"data: 2\n\n"):
            request.write(part)
        assert not request.is_finished
        request.finish()
        request.write(b"too late")
        assert request.is_finished

    async with serving(handle) as edge:
        client = await edge.connect()
        for _ in range(2):
            answer = await client.exchange(post())
            assert answer.headers["transfer-encoding"] == "chunked"
            assert answer.chunks == [b"data: 1\n\n", b"data: 2\n\n"]
            assert answer.is_complete


async def test_a_stream_to_an_http_1_0_client_ends_with_the_connection():
    async def handle(request):
        request.start(200, [])
        request.write(b"one")
        request.write(b"two")
        request.finish()

    async with serving(handle) as edge:
        answer = await edge.exchange(b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
    assert (answer.body, answer.headers["connection"]) == (b"onetwo", "close")
    assert "transfer-encoding" not in answer.headers


async def test_an_aborted_stream_delivers_what_was_written_and_looks_incomplete():
    async def handle(request):
        request.start(200, [])
        request.write(b"x" * 500_000)
        request.abort()

    async with serving(handle) as edge:
        answer = await edge.exchange(post())
    assert len(answer.body) == 500_000
    assert not answer.is_complete


async def test_an_aborted_stream_to_an_http_1_0_client_ends_with_a_reset():
    async def handle(request):
        request.start(200, [])
        request.write(b"partial")
        await asyncio.sleep(0.05)
        request.abort()

    async with serving(handle) as edge:
        client = await edge.connect()
        await client.send(b"GET / HTTP/1.0\r\n\r\n")
        answer = await client.read_answer()
    assert (answer.body, answer.is_complete) == (b"partial", False)


async def test_a_head_request_for_a_stream_has_no_body():
    async def handle(request):
        request.start(200, [])
        request.write(b"not for you")
        request.finish()

    async with serving(handle) as edge:
        client = await edge.connect()
        for _ in range(2):
            await client.send(b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\n")
            assert (await client.read_answer(is_head=True)).status == 200
        assert client._buffer == b""


async def test_a_slow_reader_stops_the_source_and_a_reader_that_catches_up_starts_it():
    journal = Journal()

    async def handle(request):
        running = asyncio.Event()
        running.set()
        request.start(200, [])
        request.on_backpressure(
            lambda: (running.clear(), journal.note("pause")), lambda: (running.set(), journal.note("resume"))
        )
        for _ in range(100):
            await running.wait()
            request.write(b"x" * 100_000)
            await asyncio.sleep(0)
        request.finish()

    async with serving(handle) as edge:
        client = await edge.connect(receive_buffer=65536)
        await client.send(post())
        await journal.until("pause")
        answer = await client.read_answer()
        assert (len(answer.body), answer.is_complete) == (10_000_000, True)
    assert "resume" in journal.events


async def test_a_client_that_lags_when_the_callbacks_come_is_paused_at_once():
    journal = Journal()

    async def handle(request):
        request.start(200, [])
        while not request._connection.is_write_paused:
            request.write(b"x" * 100_000)
            await asyncio.sleep(0)
        request.on_backpressure(lambda: journal.note("pause"), lambda: journal.note("resume"))
        journal.note("registered")
        await asyncio.Event().wait()

    async with serving(handle) as edge:
        client = await edge.connect(receive_buffer=65536)
        await client.send(post())
        await journal.until("registered")
        assert journal.events == ["pause", "registered"]


# Clients that go away


@pytest.mark.parametrize("leave", ["close", "half_close", "reset"])
@pytest.mark.parametrize("phase", ["in the body", "before the answer", "in the stream"])
async def test_a_client_that_leaves_cancels_the_handler_at_once(leave, phase):
    journal = Journal()
    hold = holding(journal)

    async def handle(request):
        if phase == "in the stream":
            await request.body()
            request.start(200, [])
            request.write(b"first")
        await hold(request)

    async with serving(handle) as edge:
        client = await edge.connect()
        await client.send(post(b"hello")[: -2 if phase == "in the body" else None])
        await journal.until("begun")
        if phase == "in the stream":
            await client._read_until(b"first\r\n")
        left_at = time.perf_counter()
        getattr(client, leave)()
        await journal.until("gone")
        assert time.perf_counter() - left_at < 2.5, "0.25 s is promised, on a machine that is not busy"
        assert await edge.server.wait_closed(10.0) == 0


async def test_a_client_that_leaves_in_the_head_or_between_requests_is_forgotten():
    async with serving() as edge:
        for data in (b"", b"POST / HT", GET):
            client = await edge.connect()
            await client.send(data)
            if data == GET:
                await client.read_answer()
            client.close()
        assert await edge.server.wait_closed(2.0) == 0


async def test_a_client_that_leaves_after_its_answer_does_not_disturb_settlement():
    journal = Journal()

    async def handle(request):
        request.respond(200, [], b"")
        try:
            while not request.is_gone:
                await asyncio.sleep(0.001)
            journal.note("settled")
        except asyncio.CancelledError:
            journal.note("cancelled")
            raise

    async with serving(handle) as edge:
        client = await edge.connect()
        await client.exchange(GET)
        client.close()
        await journal.until("settled")
        assert journal.events == ["settled"]


async def test_answering_a_client_that_is_gone_does_nothing():
    journal = Journal()

    async def handle(request):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if request.path == "/respond":
                request.respond(200, [], b"")
            else:
                request.start(200, [])
                request.write(b"x")
                request.finish() if request.path == "/finish" else request.abort()
            journal.note(request.path)
            raise

    async with serving(handle) as edge:
        for path in ("/respond", "/finish", "/abort"):
            client = await edge.connect()
            await client.send(get(path.encode()))
            while edge.server.open_connections == 0:
                await asyncio.sleep(0.001)
            client.reset()
            await journal.until(path)


async def test_a_client_that_leaves_before_its_handler_ran_leaves_nothing_behind():
    async with serving() as edge:
        for _ in range(50):
            client = await edge.connect()
            await client.send(post(b"{}"))
            client.reset()
        assert await edge.server.wait_closed(2.0) == 0


# Deadlines


async def test_a_dripped_head_is_cut_by_the_deadline_on_the_first_and_on_later_requests():
    async with serving(header_s=0.3) as edge:
        first, later = await edge.connect(), await edge.connect()
        await later.exchange(GET)
        begun_at = time.perf_counter()
        drips = [client.drip(GET[:-2] + b"x: " + b"a" * 1000, pause_s=0.01) for client in (first, later)]
        ends = await asyncio.gather(*drips, return_exceptions=True)
        assert all(isinstance(end, ConnectionError) for end in ends)
        assert 0.2 < time.perf_counter() - begun_at < 20.0
        assert [(await client.read_answer()).status for client in (first, later)] == [408, 408]


async def test_a_stalled_head_is_answered_with_408():
    async with serving(header_s=0.2) as edge:
        client = await edge.connect()
        answer = await client.exchange(b"POST /v1/chat/completions HTTP/1.1\r\nhost:")
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert b"/v1/chat/completions" in answer.body
        assert await client.is_closed()


@pytest.mark.parametrize("framing", [b"content-length: 100\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"])
async def test_a_stalled_body_is_answered_with_408(framing):
    async with serving(body_s=0.2) as edge:
        client = await edge.connect()
        answer = await client.exchange(POST + framing)
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert await client.is_closed()


async def test_a_body_that_keeps_coming_earns_time():
    async with serving(body_s=0.4) as edge:
        client = await edge.connect()
        size = 1_000_000
        await client.send(POST + b"content-length: %d\r\n\r\n" % size)
        for _ in range(20):
            await client.send(b"x" * (size // 20))
            await asyncio.sleep(0.05)
        assert (await client.read_answer()).status == 200


async def test_a_body_timeout_does_not_stop_a_handler_that_does_not_want_the_body():
    async def handle(request):
        await asyncio.sleep(0.4)
        request.respond(401, [], b"")

    async with serving(handle, body_s=0.1) as edge:
        answer = await edge.exchange(POST + b"content-length: 100\r\n\r\n")
        assert (answer.status, answer.headers["connection"]) == (401, "close")


async def test_an_idle_connection_is_closed_without_a_word():
    async with serving(idle_s=0.2) as edge:
        fresh, used = await edge.connect(), await edge.connect()
        await used.exchange(GET)
        await fresh.send(b"\r\n")
        assert await fresh.is_closed()
        assert await used.is_closed()


async def test_a_client_that_stops_reading_is_dropped():
    journal = Journal()

    async def handle(request):
        running = asyncio.Event()
        running.set()
        request.start(200, [])
        request.on_backpressure(running.clear, running.set)
        try:
            while True:
                await running.wait()
                request.write(b"x" * 100_000)
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            journal.note("gone" if request.is_gone else "cancelled")
            raise

    async with serving(handle, write_stall_s=0.3) as edge:
        client = await edge.connect(receive_buffer=65536)
        await client.send(post())
        await journal.until("gone")
        assert await edge.server.wait_closed(1.0) == 0


async def test_a_client_that_reads_slowly_is_not_dropped():
    async def handle(request):
        request.respond(200, [(b"connection-note", b"closing")], b"x" * 6_000_000)

    async with serving(handle, write_stall_s=1.0, idle_s=1.0) as edge:
        client = await edge.connect(receive_buffer=65536)
        await client.send(post(b"", b"connection: close"))
        received = 0
        while data := await client.receive(150_000):
            received += len(data)
            await asyncio.sleep(0.03)
        assert received > 6_000_000


async def test_a_finished_answer_that_nobody_reads_is_dropped():
    async def handle(request):
        request.respond(200, [], b"x" * 20_000_000)

    async with serving(handle, write_stall_s=0.2, idle_s=0.2) as edge:
        keeping, closing = await edge.connect(receive_buffer=65536), await edge.connect(receive_buffer=65536)
        await keeping.send(post())
        await closing.send(post(b"", b"connection: close"))
        while edge.server.open_connections < 2:
            await asyncio.sleep(0.001)
        assert await edge.server.wait_closed(5.0) == 0


# Bugs of handlers


async def test_a_handler_that_raises_is_answered_with_500_and_the_connection_lives_on(caplog):
    async def handle(request):
        if request.path == "/bug":
            raise KeyError("secret")
        request.respond(200, [], b"")

    async with serving(handle) as edge:
        client = await edge.connect()
        answer = await client.exchange(get(b"/bug"))
        assert (answer.status, answer.headers["x-request-id"]) == (500, "req_edge")
        assert b"secret" not in answer.body
        assert (await client.exchange(GET)).status == 200
    assert "GET /bug failed" in caplog.text


async def test_a_handler_that_raises_in_its_stream_breaks_it_off(caplog):
    async def handle(request):
        request.start(200, [])
        request.write(b"a")
        raise KeyError

    async with serving(handle) as edge:
        answer = await edge.exchange(post())
    assert (answer.body, answer.is_complete) == (b"a", False)


async def test_a_handler_that_forgets_to_answer_is_a_500(caplog):
    async def handle(request):
        pass

    async with serving(handle) as edge:
        assert (await edge.exchange(GET)).status == 500
    assert "left it unanswered" in caplog.text


async def test_a_handler_that_forgets_to_finish_breaks_its_stream_off(caplog):
    async def handle(request):
        request.start(200, [])
        request.write(b"a")

    async with serving(handle) as edge:
        assert not (await edge.exchange(post())).is_complete


async def test_an_answer_given_twice_or_with_a_line_break_in_a_header_is_a_bug(caplog):
    async def handle(request):
        if request.path == "/twice":
            request.respond(200, [], b"once")
            request.respond(200, [], b"twice")
        else:
            request.respond(200, [(b"x", b"a\r\nset-cookie: b")], b"")

    async with serving(handle) as edge:
        client = await edge.connect()
        assert (await client.exchange(get(b"/twice"))).body == b"once"
        answer = await client.exchange(get(b"/split"))
        assert "set-cookie" not in answer.headers
    assert "answered already" in caplog.text
    assert "line break" in caplog.text


async def test_a_handler_cancelled_from_outside_drops_its_connection():
    tasks = []

    async def handle(request):
        tasks.append(asyncio.current_task())
        await asyncio.Event().wait()

    async with serving(handle) as edge:
        client = await edge.connect()
        await client.send(GET)
        while not tasks:
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        assert await client.is_closed()


# The whole server


async def test_connections_over_the_cap_are_told_to_come_back(caplog):
    caplog.set_level(logging.WARNING)
    journal = Journal()
    async with serving(holding(journal), connections=3) as edge:
        kept = [await edge.connect() for _ in range(3)]
        for client in kept:
            await client.send(GET)
        while journal.events.count("begun") < 3:
            await asyncio.sleep(0.001)
        for _ in range(5):
            client = await edge.connect()
            answer = await client.read_answer()
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert answer.headers["connection"] == "close"
            client.close()
        assert edge.server.turned_away == 5
    assert len([r for r in caplog.records if "connection cap" in r.message]) == 1


async def test_the_default_cap_is_a_share_of_the_descriptors():
    assert Server(None, refuse, Limits()).max_connections > 0


async def test_a_drain_closes_idle_connections_and_lets_requests_end():
    gate = asyncio.Event()
    journal = Journal()

    async def handle(request):
        journal.note(request.path)
        if request.path == "/stream":
            request.start(200, [])
            request.write(b"a")
        await gate.wait()
        if request.is_started:
            request.write(b"b")
            request.finish()
        else:
            request.respond(200, [], b"whole")

    async with serving(handle) as edge:
        idle, busy, stream, late = [await edge.connect() for _ in range(4)]
        await busy.send(get(b"/busy"))
        await stream.send(get(b"/stream"))
        await late.send(get(b"/late")[:-1])
        await journal.until("/busy")
        await journal.until("/stream")
        edge.server.stop_keepalive()
        assert await idle.is_closed()
        assert await edge.server.wait_closed(0.05) == 3
        gate.set()
        answer = await busy.read_answer()
        assert (answer.body, answer.headers["connection"]) == (b"whole", "close")
        answer = await stream.read_answer()
        assert (answer.body, answer.is_complete) == (b"ab", True)
        await late.send(b"\n")
        assert (await late.read_answer()).headers["connection"] == "close"
        for client in (busy, stream, late):
            assert await client.is_closed()
        assert await edge.server.wait_closed(2.0) == 0


async def test_a_cancelled_handler_can_still_tell_its_client():
    journal = Journal()

    async def handle(request):
        request.start(200, [])
        request.write(b"a")
        try:
            journal.note("begun")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            assert not request.is_gone
            request.write(b"shutting down")
            request.abort()
            raise

    async with serving(handle) as edge:
        client = await edge.connect()
        await client.send(post())
        await journal.until("begun")
        edge.server.stop_keepalive()
        edge.server.cancel_all()
        answer = await client.read_answer()
        assert (answer.chunks, answer.is_complete) == ([b"a", b"shutting down"], False)
        assert await edge.server.wait_closed(2.0) == 0


async def test_abort_all_drops_everything_and_cancels_the_handlers():
    journal = Journal()
    async with serving(holding(journal)) as edge:
        clients = [await edge.connect() for _ in range(3)]
        await clients[0].send(GET)
        await journal.until("begun")
        edge.server.abort_all()
        for client in clients:
            assert await client.is_closed()
        assert await edge.server.wait_closed(2.0) == 0
    assert journal.events == ["begun", "gone"]

"""Bodies that are handed on as they come: whole whatever the framing, and never much of them in memory."""

import asyncio
import contextlib
import hashlib

from gateway.inbound import Refusal
from gateway.large_body import HELD_BYTES, LargeBody
from tests.support.edge import GET, Journal, serving

PATH = "/v1/files"
UPLOADS = {"upload_paths": frozenset({PATH}), "upload_bytes": 64 * 1024 * 1024, "body_bytes": 1000}
HEAD = b"POST /v1/files HTTP/1.1\r\nhost: gateway\r\n"
BODY = bytes(range(256)) * 20_000


async def digest(request):
    taken, most = hashlib.sha256(), 0
    async for piece in request.pieces():
        taken.update(piece)
        most = max(most, len(piece))
    request.respond(200, [], f"{taken.hexdigest()} {most}".encode())


async def test_a_body_arrives_whole_in_pieces_whatever_its_framing():
    framed = b"".join(
        b"%x\r\n%b\r\n" % (len(BODY[start : start + 70_001]), BODY[start : start + 70_001])
        for start in range(0, len(BODY), 70_001)
    )
    sent = (
        HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY,
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n",
    )
    async with serving(digest, **UPLOADS) as edge:
        client = await edge.connect(timeout_s=60)
        for request in sent:
            answer = await client.exchange(request)
            assert answer.status == 200, answer.body
            told, most = answer.body.split()
            assert told.decode() == hashlib.sha256(BODY).hexdigest()
            assert int(most) < 3 * HELD_BYTES
        assert (await client.exchange(HEAD + b"content-length: 3\r\n\r\nabc")).status == 200
        assert (await client.exchange(HEAD + b"content-length: 0\r\n\r\n")).status == 200


async def test_a_client_is_held_back_while_the_handler_takes_nothing_and_loses_nothing_by_it():
    journal = Journal()
    go = asyncio.Event()

    async def handle(request):
        journal.note("begun")
        await go.wait()
        await digest(request)

    # Nor does the time that it was held back count against it.
    async with serving(handle, **UPLOADS, body_s=0.4) as edge:
        client = await edge.connect(timeout_s=60)
        size = 40 * 1024 * 1024
        sending = asyncio.create_task(
            client.send(HEAD + b"content-length: %d\r\n\r\n" % size, bytes(size)),
        )
        await journal.until("begun")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(sending), 1.0)
        assert not sending.done(), "40 MiB went somewhere although nobody took them"
        go.set()
        await sending
        answer = await client.read_answer()
        assert answer.body.split()[0].decode() == hashlib.sha256(bytes(size)).hexdigest()
        assert (await client.exchange(HEAD + b"content-length: 3\r\n\r\nabc")).status == 200


async def test_only_the_paths_of_uploads_take_large_bodies():
    async with serving(**UPLOADS) as edge:
        answer = await edge.exchange(
            b"POST /v1/batches HTTP/1.1\r\nhost: g\r\ncontent-length: 2000\r\n\r\n" + bytes(2000)
        )
        assert answer.status == 413
        answer = await edge.exchange(HEAD + b"content-length: 900000000\r\n\r\n")
        assert answer.status == 413


async def test_an_early_answer_reaches_a_client_that_is_held_back():
    journal = Journal()
    go = asyncio.Event()

    async def handle(request):
        journal.note("begun")
        await go.wait()
        request.respond(401, [], b"who are you?")

    async with serving(handle, **UPLOADS) as edge:
        client = await edge.connect()
        await client.send(HEAD + b"content-length: 3000000\r\n\r\n", bytes(1_200_000))
        await journal.until("begun")
        go.set()
        answer = await client.read_answer()
        assert (answer.status, answer.headers["connection"]) == (401, "close")


async def test_a_body_that_stalls_or_is_malformed_is_refused_to_the_handler():
    async def handle(request):
        try:
            await digest(request)
        except Refusal as refusal:
            request.respond(refusal.status, [], refusal.code.encode())

    async with serving(handle, **UPLOADS, body_s=0.2) as edge:
        client = await edge.connect()
        await client.send(HEAD + b"content-length: 300000\r\n\r\n", bytes(1000))
        answer = await client.read_answer()
        assert (answer.status, answer.body) == (408, b"request_timeout")
        answer = await edge.exchange(HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n")
        assert (answer.status, answer.body) == (400, b"invalid_chunk")


async def test_a_client_that_leaves_in_the_middle_ends_the_handler():
    journal = Journal()

    async def handle(request):
        journal.note("begun")
        try:
            await digest(request)
        except asyncio.CancelledError:
            journal.note("gone" if request.is_gone else "cancelled")
            raise

    async with serving(handle, **UPLOADS) as edge:
        client = await edge.connect()
        await client.send(HEAD + b"content-length: 300000\r\n\r\n", bytes(1000))
        await journal.until("begun")
        client.reset()
        await journal.until("gone")


async def test_the_body_is_invited_when_the_handler_begins_to_take_it():
    async with serving(digest, **UPLOADS) as edge:
        client = await edge.connect()
        await client.send(HEAD + b"expect: 100-continue\r\ncontent-length: 5\r\n\r\n")
        assert (await client.read_answer()).status == 100
        assert (await client.exchange(b"hello")).status == 200
        assert (await client.exchange(GET)).status == 200


async def test_what_is_held_never_exceeds_the_cap_by_more_than_what_came_at_once():
    paused = []
    body = LargeBody(lambda: paused.append(True), lambda: paused.append(False))
    body.add([bytes(HELD_BYTES)])
    assert not paused
    body.add([b"x"])
    body.add([b"y"])
    assert paused == [True]
    assert len(await body.take()) == HELD_BYTES + 2
    assert paused == [True, False]
    body.end()
    assert await body.take() == b""

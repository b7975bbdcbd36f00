"""Exchanges over real sockets: requests, framings, deadlines, cancellation, upstreams that misbehave."""

import asyncio
import contextlib
import random
import time

import pytest

from backends.errors import UpstreamError
from backends.transport import Deadlines
from tests.support.raw_upstream import LAST_CHUNK, RawUpstream, always, answering, chunk, chunked_head, sized
from tests.support.sinks import SHORT, Recorder, pool_for, post, settled

LOOPS = ("uvloop", "asyncio")

HEAD, BODY = post()
MIB = 1024 * 1024


async def test_a_request_arrives_byte_for_byte_and_its_answer_comes_back():
    seen = []

    async def script(peer):
        seen.append(await peer.request())
        peer.send(sized(b'{"ok":1}', b"Content-Type: application/json", b"x-a: 1", b"X-A: 2"))
        await peer.gone()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        head, body = post("/v1/chat/completions", b'{"model":"m"}')
        reply = await pool.send(head, body, SHORT)
        assert seen == [head + body]
        assert reply.status == 200
        assert reply.header(b"content-type") == b"application/json"
        assert reply.header(b"x-a") == b"1, 2"
        assert reply.header(b"missing") is None
        assert await reply.read(1000) == b'{"ok":1}'
        assert pool.idle_connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        sized(b"abc"),
        sized(b"abc", status=b"500 Internal Server Error"),
        chunked_head() + chunk(b"a") + chunk(b"bc") + LAST_CHUNK,
        chunked_head() + chunk(b"abc") + b"0\r\nx-trailer: 1\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + sized(b"abc"),
        b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 3\r\n\r\nabc",
    ],
)
async def test_every_framing_is_read_and_its_connection_used_again(answer):
    async with RawUpstream(always(answer)) as upstream, pool_for(upstream.url) as pool:
        for _ in range(3):
            assert await (await pool.send(HEAD, BODY, SHORT)).read(10) == b"abc"
        assert upstream.connections == 1


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_answers_without_a_body_end_with_their_head(status):
    answer = b"HTTP/1.1 " + status + b"\r\nx: y\r\n\r\n"
    async with RawUpstream(always(answer)) as upstream, pool_for(upstream.url) as pool:
        for _ in range(2):
            assert await (await pool.send(HEAD, BODY, SHORT)).read(10) == b""
        assert upstream.connections == 1


async def test_an_answer_to_head_has_no_body():
    async with (
        RawUpstream(always(sized(b"")[:-21] + b"content-length: 5\r\n\r\n")) as upstream,
        pool_for(upstream.url) as pool,
    ):
        head, _ = post(method="HEAD", body=b"")
        reply = await pool.send(head, b"", SHORT)
        assert reply.header(b"content-length") == b"5"
        assert await reply.read(10) == b""


async def test_a_body_delimited_by_the_close_is_complete_at_the_close():
    async def script(peer):
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\n\r\nuntil ", b"the end")

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        for _ in range(2):
            assert await (await pool.send(HEAD, BODY, SHORT)).read(100) == b"until the end"
        assert (upstream.connections, pool.open_connections) == (2, 0)


async def test_a_body_delimited_by_the_close_is_incomplete_after_a_reset():
    received = asyncio.Event()

    async def script(peer):
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\n\r\nuntil ")
        await received.wait()
        peer.reset()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        sink = Recorder()
        (await pool.send(HEAD, BODY, SHORT)).relay(sink)
        await sink.arrived(6)
        received.set()
        assert (await sink.end()).kind == "incomplete"
        assert sink.body == b"until "


# Requests


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 5 * MIB])
async def test_bodies_of_any_size_are_written_whole(size):
    body = random.Random(size).randbytes(size)
    got = []

    async def script(peer):
        while True:
            got.append(await peer.request())
            peer.send(sized(b"ok"))

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        head, body = post(body=body)
        for _ in range(2):
            assert await (await pool.send(head, body, SHORT)).read(10) == b"ok"
        assert got == [head + body] * 2
        assert upstream.connections == 1


async def test_an_answer_that_comes_before_the_body_was_read_is_delivered_and_the_connection_is_not_reused():
    async def script(peer):
        await peer.head()
        peer.send(sized(b"too much", status=b"413 Content Too Large"))
        await asyncio.Event().wait()  # never reads the body

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        head, body = post(body=b"x" * (20 * MIB))
        reply = await pool.send(head, body, SHORT)
        assert reply.status == 413
        assert await reply.read(100) == b"too much"
        assert pool.open_connections == 0


async def test_an_upstream_that_answers_early_and_resets_yields_its_answer_or_a_reset():
    async def script(peer):
        await peer.head()
        peer.send(sized(b"too much", status=b"413 Content Too Large"))
        await peer.drain()
        peer.close()  # with the body unread: the kernel sends RST

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        head, body = post(body=b"x" * (20 * MIB))
        for _ in range(5):
            kind = None
            try:
                reply = await pool.send(head, body, SHORT)
                assert (reply.status, await reply.read(100)) == (413, b"too much")
            except UpstreamError as error:
                kind = error.kind
            assert kind in {None, "reset", "incomplete"}
        assert pool.open_connections == 0


# Deadlines: at the configured value, not before, and within a generous bound


def within(seconds, started):
    return seconds * 0.95 <= time.perf_counter() - started < seconds + 3


async def test_an_upstream_that_never_answers_is_a_first_byte_timeout():
    async with RawUpstream(answering(b"")) as upstream, pool_for(upstream.url) as pool:
        started = time.perf_counter()
        with pytest.raises(UpstreamError, match=r"within 0\.3 s") as caught:
            await pool.send(HEAD, BODY, Deadlines(5, 0.3, 5, 10))
        assert caught.value.kind == "first_byte_timeout"
        assert within(0.3, started)
        assert pool.open_connections == 0


async def test_neither_interim_answers_nor_a_dripping_head_put_the_first_byte_off():
    async def script(peer):
        await peer.request()
        peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nx: ")
        while True:
            peer.send(b"y")
            await asyncio.sleep(0.05)

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        started = time.perf_counter()
        with pytest.raises(UpstreamError) as caught:
            await pool.send(HEAD, BODY, Deadlines(5, 0.3, 5, 10))
        assert caught.value.kind == "first_byte_timeout"
        assert within(0.3, started)


@pytest.mark.parametrize("how", ["relay", "read"])
async def test_a_gap_in_the_body_is_an_idle_timeout(how):
    async with (
        RawUpstream(answering(chunked_head() + chunk(b"one"))) as upstream,
        pool_for(upstream.url) as pool,
    ):
        reply = await pool.send(HEAD, BODY, Deadlines(5, 5, 0.3, 10))
        started = time.perf_counter()
        if how == "relay":
            sink = Recorder()
            reply.relay(sink)
            error = await sink.end()
            assert sink.body == b"one"
        else:
            with pytest.raises(UpstreamError) as caught:
                await reply.read(100)
            error = caught.value
        assert error.kind == "idle_timeout"
        assert within(0.3, started - 0.02)
        assert pool.open_connections == 0


async def test_a_gap_after_a_late_head_is_found_as_soon_as_any_other():
    async def script(peer):
        await peer.request()
        await asyncio.sleep(0.4)  # the timer has looked once by then, and found the first byte not overdue
        peer.send(chunked_head())
        await peer.gone()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        reply = await pool.send(HEAD, BODY, Deadlines(5, 8, 0.3, 10))
        started = time.perf_counter()
        with pytest.raises(UpstreamError) as caught:
            await reply.read(100)
        assert caught.value.kind == "idle_timeout"
        assert within(0.3, started - 0.02)


async def test_a_body_that_keeps_coming_outlives_the_idle_deadline_but_not_the_total():
    async def script(peer):
        await peer.request()
        peer.send(chunked_head())
        while True:
            peer.send(chunk(b"x"))
            await asyncio.sleep(0.05)

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        started = time.perf_counter()
        sink = Recorder()
        (await pool.send(HEAD, BODY, Deadlines(5, 0.5, 0.5, 1.2))).relay(sink)
        assert (await sink.end()).kind == "total_timeout"
        assert within(1.2, started)
        assert len(sink.body) > 4


async def test_a_timer_left_by_an_earlier_exchange_neither_cuts_nor_frees_a_later_one():
    async def script(peer):
        for n in range(3):
            await peer.request()
            peer.send(sized(b"%d" % n))
        await peer.request()
        await peer.gone()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        await (await pool.send(HEAD, BODY, Deadlines(5, 0.2, 0.2, 0.2))).read(9)
        await (await pool.send(HEAD, BODY, Deadlines(5, 60, 60, 60))).read(9)
        await asyncio.sleep(0.3)
        await (await pool.send(HEAD, BODY, Deadlines(5, 60, 60, 60))).read(9)
        started = time.perf_counter()
        with pytest.raises(UpstreamError):
            await pool.send(HEAD, BODY, Deadlines(5, 0.2, 60, 60))
        assert within(0.2, started)
        assert upstream.connections == 1


async def test_the_first_byte_deadline_runs_from_the_written_request():
    async def script(peer):
        await peer.head()
        for _ in range(10):  # slower than the deadline, but never still for as long
            await peer.read(2 * MIB)
            await asyncio.sleep(0.06)
        peer.send(sized(b"ok"))
        await peer.gone()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        head, body = post(body=b"x" * (20 * MIB))
        assert await (await pool.send(head, body, Deadlines(5, 0.5, 0.5, 10))).read(10) == b"ok"


async def test_an_upstream_that_takes_nothing_of_a_large_request_is_timed_out():
    async def script(peer):
        peer.streams[1].transport.pause_reading()
        await asyncio.Event().wait()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        head, body = post(body=b"x" * (50 * MIB))
        started = time.perf_counter()
        with pytest.raises(UpstreamError) as caught:
            await pool.send(head, body, Deadlines(5, 0.3, 5, 10))
        assert caught.value.kind == "first_byte_timeout"
        assert time.perf_counter() - started < 5


async def test_total_covers_the_wait_for_the_head_too():
    async with RawUpstream(answering(b"")) as upstream, pool_for(upstream.url) as pool:
        started = time.perf_counter()
        with pytest.raises(UpstreamError) as caught:
            await pool.send(HEAD, BODY, Deadlines(5, 5, 5, 0.3))
        assert caught.value.kind == "total_timeout"
        assert within(0.3, started)


# Cancellation


@pytest.mark.parametrize("phase", ["written", "head", "interim"])
async def test_a_cancelled_send_closes_its_connection_at_once(phase):
    reached, gone = asyncio.Event(), asyncio.Event()

    async def script(peer):
        await peer.request()
        peer.send(
            {"written": b"", "head": b"HTTP/1.1 200 OK\r\nx:", "interim": b"HTTP/1.1 100 C\r\n\r\n"}[phase]
        )
        reached.set()
        await peer.gone()
        gone.set()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        sending = asyncio.ensure_future(pool.send(HEAD, BODY, SHORT))
        await reached.wait()
        await asyncio.sleep(0.01)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert pool.open_connections == 0
        await asyncio.wait_for(gone.wait(), 30)


async def test_a_send_cancelled_while_writing_leaves_nothing():
    reached, gone = asyncio.Event(), asyncio.Event()

    async def script(peer):
        await peer.head()
        reached.set()
        await asyncio.sleep(0.05)
        await peer.gone()
        gone.set()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        head, body = post(body=b"x" * (20 * MIB))
        sending = asyncio.ensure_future(pool.send(head, body, SHORT))
        await reached.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert pool.open_connections == 0
        await asyncio.wait_for(gone.wait(), 30)


async def test_cancels_at_random_moments_leak_nothing_and_break_no_one_elses_answer():
    async with RawUpstream(always(sized(b"abc"))) as upstream, pool_for(upstream.url) as pool:
        rng = random.Random(7)

        async def one(*, is_cancelled):
            task = asyncio.ensure_future(fetch())
            if is_cancelled:
                for _ in range(rng.randrange(12)):
                    await asyncio.sleep(0)
                task.cancel()
            try:
                assert await task == b"abc"
            except asyncio.CancelledError:
                assert is_cancelled

        async def fetch():
            return await (await pool.send(HEAD, BODY, SHORT)).read(10)

        for _ in range(60):
            await asyncio.gather(*(one(is_cancelled=rng.random() < 0.5) for _ in range(10)))
        assert pool.open_connections == pool.idle_connections
        await settled(lambda: upstream.open_connections == pool.open_connections)


async def test_a_send_cancelled_in_the_turn_of_its_head_leaves_nothing():
    async with (
        RawUpstream(answering(chunked_head() + chunk(b"one"))) as upstream,
        pool_for(upstream.url) as pool,
    ):
        for turns in range(60):
            sending = asyncio.ensure_future(pool.send(HEAD, BODY, SHORT))
            for _ in range(turns // 3):
                await asyncio.sleep(0)
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                (await sending).close()
            assert pool.open_connections == 0
        await settled(lambda: upstream.open_connections == 0)


# Upstreams that misbehave


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", "reset"),
        (b"HTTP/1.1 200 O", "reset"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "reset"),
        (b"SSH-2.0-OpenSSH\r\n", "protocol"),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", "protocol"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 1_000_000, "too_large"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000, "too_large"),
    ],
)
async def test_without_a_usable_head_send_raises(answer, kind):
    async def script(peer):
        await peer.request()
        peer.send(answer)
        await peer.drain()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        with pytest.raises(UpstreamError) as caught:
            await pool.send(HEAD, BODY, SHORT)
        assert caught.value.kind == kind
        assert caught.value.sent
        assert not caught.value.stale
        assert (upstream.connections, pool.open_connections) == (1, 0)


@pytest.mark.parametrize(
    ("rest", "body", "kind"),
    [
        (b"content-length: 10\r\n\r\nabc", b"abc", "incomplete"),
        (b"content-length: 10\r\n\r\n", b"", "incomplete"),
        (b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", b"abc", "incomplete"),
        (b"transfer-encoding: chunked\r\n\r\n3\r\nab", b"ab", "incomplete"),
        (b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n", b"abc", "incomplete"),
        (b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\nxyz\r\n", b"abc", "protocol"),
        (b"transfer-encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n", b"abc", "protocol"),
        (b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx: " + b"y" * 1_000_000, b"abc", "too_large"),
    ],
)
async def test_a_body_that_breaks_off_ends_with_an_error_after_what_came(rest, body, kind):
    async def script(peer):
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\n", rest)
        await peer.drain()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        sink = Recorder()
        (await pool.send(HEAD, BODY, SHORT)).relay(sink)
        assert (await sink.end()).kind == kind
        assert sink.body == body
        assert pool.open_connections == 0


@pytest.mark.parametrize("seed", range(8))
async def test_mutated_answers_never_hang_leak_or_raise_anything_else(seed):
    rng = random.Random(seed)
    recorded = [
        sized(b'{"usage":{"prompt_tokens":3}}', b"content-type: application/json", b"keep-alive: timeout=5"),
        chunked_head() + chunk(b"data: {}\n\n") * 3 + chunk(b"data: [DONE]\n\n") + LAST_CHUNK,
        b"HTTP/1.1 100 Continue\r\n\r\n" + sized(b"abc"),
        b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
    ]

    def mutated():
        data = bytearray(rng.choice(recorded))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.choice([0, 1, 1, 4, 50])] = rng.choice(
                [b"", b"\xff", b"\r\n", b"0\r\n\r\n", b"9", b":"]
            )
        return bytes(data)

    answers = []

    async def script(peer):
        await peer.request()
        data = answers[-1]
        at = rng.randrange(len(data) + 1)
        peer.send(data[:at])
        await peer.drain()
        peer.send(data[at:])
        if rng.random() < 0.5:
            peer.close()
        else:
            peer.reset()

    async with RawUpstream(script) as upstream, pool_for(upstream.url, keepalive_s=0.001) as pool:
        for _ in range(40):
            answers.append(mutated())
            sink = Recorder()
            kind = None
            try:
                (await pool.send(HEAD, BODY, SHORT)).relay(sink)
                await sink.end()
            except UpstreamError as error:
                kind = error.kind
            assert kind in {None, "reset", "protocol"}
        await settled(lambda: pool.open_connections == upstream.open_connections == 0)


STREAM_HEAD = chunked_head(b"content-type: text/event-stream; charset=utf-8")


async def test_the_head_of_a_stream_is_no_answer_before_something_follows_it():
    async def script(peer):
        await peer.request()
        peer.send(STREAM_HEAD)
        await peer.gone()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        with pytest.raises(UpstreamError) as caught:
            await pool.send(HEAD, BODY, SHORT._replace(first_byte_s=0.1))
        assert caught.value.kind == "first_byte_timeout"
        assert pool.open_connections == 0


async def test_a_stream_that_dies_after_its_head_can_still_be_sent_elsewhere():
    async def script(peer):
        await peer.request()
        peer.send(STREAM_HEAD)
        await peer.drain()
        await asyncio.sleep(0.02)
        peer.close()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        with pytest.raises(UpstreamError) as caught:
            await pool.send(HEAD, BODY, SHORT)
        assert caught.value.kind == "incomplete"


async def test_a_stream_is_handed_over_with_its_first_bytes_or_its_end():
    for rest in (chunk(b"data: 1\n\n") + LAST_CHUNK, LAST_CHUNK):

        async def script(peer, rest=rest):
            for _ in range(2):
                await peer.request()
                peer.send(STREAM_HEAD)
                await peer.drain()
                await asyncio.sleep(0.02)
                peer.send(rest)
            await peer.gone()

        async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
            for _ in range(2):
                reply = await pool.send(HEAD, BODY, SHORT)
                assert await reply.read(100) == (b"data: 1\n\n" if rest != LAST_CHUNK else b"")
            assert upstream.connections == 1


async def test_who_leaves_between_head_and_first_byte_leaves_no_connection_behind():
    async def script(peer):
        await peer.request()
        peer.send(STREAM_HEAD)
        await peer.gone()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        sending = asyncio.ensure_future(pool.send(HEAD, BODY, SHORT))
        await asyncio.sleep(0.05)
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sending
        await settled(lambda: pool.open_connections == 0)

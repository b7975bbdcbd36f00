"""Delivery over real sockets: whole or relayed, held back, given up, and sinks that fail."""

import asyncio
import logging
import time

import pytest

from backends.errors import UpstreamError
from backends.reply import READ_AHEAD_BYTES
from backends.transport import Deadlines
from tests.support.raw_upstream import LAST_CHUNK, RawUpstream, always, answering, chunk, chunked_head, sized
from tests.support.sinks import SHORT, Recorder, pool_for, post, settled

LOOPS = ("uvloop", "asyncio")

HEAD, BODY = post()
MIB = 1024 * 1024


async def test_each_read_is_relayed_as_one_call_and_at_once():
    sink = Recorder()

    async def script(peer):
        await peer.request()
        peer.send(chunked_head(), chunk(b"first"))
        for n in range(20):
            await sink.arrived(5 + 8 * n)
            peer.send(chunk(b"%04d" % n), chunk(b"more"))  # two chunks, one read
        await sink.arrived(165)
        peer.send(chunk(b"last"), LAST_CHUNK)
        await peer.gone()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        (await pool.send(HEAD, BODY, SHORT)).relay(sink)
        assert await sink.end() is None
        assert sink.bodies == [b"first", *(b"%04dmore" % n for n in range(20)), b"last"]


async def test_what_came_before_relay_is_delivered_first_read_by_read():
    second = asyncio.Event()

    async def script(peer):
        await peer.request()
        peer.send(chunked_head(), chunk(b"one"))
        await second.wait()
        peer.send(chunk(b"two"), LAST_CHUNK)
        await peer.gone()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        reply = await pool.send(HEAD, BODY, SHORT)
        second.set()
        await settled(lambda: pool.idle_connections == 1)  # the whole answer is here, nobody has asked for it
        sink = Recorder()
        reply.relay(sink)
        assert (sink.bodies, sink.ends) == ([b"one", b"two"], [None])


async def test_a_reply_can_be_taken_once():
    async with RawUpstream(always(sized(b"abc"))) as upstream, pool_for(upstream.url) as pool:
        reply = await pool.send(HEAD, BODY, SHORT)
        assert await reply.read(3) == b"abc"
        with pytest.raises(RuntimeError, match="only once"):
            await reply.read(3)
        reply.close()
        reply.close()
        assert pool.idle_connections == 1, "closing after the end costs nothing"


async def test_a_body_over_the_limit_is_refused_and_its_connection_dropped():
    async with RawUpstream(always(sized(b"x" * 1000))) as upstream, pool_for(upstream.url) as pool:
        reply = await pool.send(HEAD, BODY, SHORT)
        with pytest.raises(UpstreamError, match="exceeds 999 bytes") as caught:
            await reply.read(999)
        assert caught.value.kind == "too_large"
        big = always(chunked_head() + chunk(b"x" * MIB) * 4)
        async with RawUpstream(big) as endless, pool_for(endless.url) as other:
            with pytest.raises(UpstreamError, match="exceeds"):
                await (await other.send(HEAD, BODY, SHORT)).read(MIB)
            assert other.open_connections == 0


# Backpressure


async def test_nothing_is_read_far_ahead_of_a_reply_nobody_takes():
    sent = 0

    async def script(peer):
        nonlocal sent
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (64 * MIB))
        for _ in range(1024):
            peer.send(b"x" * 65_536)
            await peer.drain()
            sent += 65_536
        await peer.gone()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        reply = await pool.send(HEAD, BODY, SHORT)
        before = -1
        while before != sent:  # until the upstream is stuck
            before = sent
            await asyncio.sleep(0.1)
        assert sent < 32 * MIB, "the kernel's buffers hold a few MiB"
        assert reply._held_bytes < READ_AHEAD_BYTES + 512 * 1024
        sink = Recorder()
        reply.relay(sink)
        assert await sink.end() is None
        assert len(sink.body) == 64 * MIB


async def test_a_paused_reply_delivers_nothing_and_a_resumed_one_everything():
    class Pausing(Recorder):
        def on_body(self, data):
            super().on_body(data)
            reply.pause()

    resumes = 0

    async def script(peer):
        await peer.request()
        peer.send(chunked_head())
        for _ in range(64):
            peer.send(chunk(b"x" * 65_536))
        peer.send(LAST_CHUNK)
        await peer.gone()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        sink = Pausing()
        reply = await pool.send(HEAD, BODY, SHORT)
        reply.relay(sink)
        while not sink.ends:
            calls = len(sink.bodies)
            await asyncio.sleep(0.002)
            assert len(sink.bodies) <= calls + 1, "one call per resume"
            reply.resume()
            resumes += 1
        assert len(sink.body) == 64 * 65_536
        assert sink.ends == [None]
        assert pool.idle_connections == 1


async def test_the_idle_deadline_stands_still_while_paused_and_starts_anew_at_resume():
    go_on = asyncio.Event()

    async def script(peer):
        await peer.request()
        peer.send(chunked_head(), chunk(b"one"))
        await go_on.wait()
        peer.send(chunk(b"two"), LAST_CHUNK)
        await peer.gone()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        sink = Recorder()
        reply = await pool.send(HEAD, BODY, Deadlines(5, 5, 0.1, 10))
        reply.relay(sink)
        reply.pause()
        await asyncio.sleep(0.35)
        assert sink.ends == []
        before = asyncio.get_running_loop().time()
        reply.resume()
        assert reply._connection._heard_at >= before
        go_on.set()
        assert await sink.end() is None
        assert sink.body == b"onetwo"


async def test_the_end_waits_behind_what_a_paused_reply_still_holds():
    second, third = asyncio.Event(), asyncio.Event()

    async def script(peer):
        await peer.request()
        peer.send(chunked_head(), chunk(b"one"))
        await second.wait()
        peer.send(chunk(b"two"))
        await third.wait()
        peer.send(chunk(b"three"), LAST_CHUNK)
        peer.close()

    class Pausing(Recorder):
        def on_body(self, data):
            super().on_body(data)
            reply.pause()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        reply = await pool.send(HEAD, BODY, Deadlines(5, 5, 5, 0.5))
        second.set()
        await settled(lambda: reply._held == [b"one", b"two"])
        sink = Pausing()
        reply.relay(sink)
        await settled(lambda: pool.open_connections == 0)  # the total deadline passes
        assert (sink.bodies, sink.ends) == ([b"one"], [])
        reply.resume()
        assert sink.bodies == [b"one", b"two"]
        assert [error.kind for error in sink.ends] == ["total_timeout"]


async def test_a_connection_is_read_again_after_an_answer_that_ended_paused():
    sink = None

    async def script(peer):
        while True:
            await peer.request()
            peer.send(chunked_head(), chunk(b"one"))
            await sink.arrived(3)
            peer.send(chunk(b"two"), LAST_CHUNK)

    class Pausing(Recorder):
        def on_body(self, data):
            super().on_body(data)
            if data == b"two":
                reply.pause()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        for _ in range(3):
            sink = Pausing()
            reply = await pool.send(HEAD, BODY, SHORT)
            reply.relay(sink)
            assert await sink.end() is None
        assert upstream.connections == 1


async def test_a_pause_in_the_last_call_does_not_hold_the_connection_back():
    class Pausing(Recorder):
        def on_body(self, data):
            super().on_body(data)
            reply.pause()

    async with RawUpstream(always(sized(b"abc"))) as upstream, pool_for(upstream.url) as pool:
        for _ in range(3):
            sink = Pausing()
            reply = await pool.send(HEAD, BODY, SHORT)
            reply.relay(sink)
            assert await sink.end() is None
        assert upstream.connections == 1


# Sinks that fail or give up


async def test_after_close_the_sink_hears_nothing_and_the_upstream_sees_the_end_at_once():
    gone = asyncio.Event()

    async def script(peer):
        await peer.request()
        peer.send(chunked_head(), chunk(b"one"))
        await peer.gone()
        gone.set()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        sink = Recorder()
        reply = await pool.send(HEAD, BODY, SHORT)
        reply.relay(sink)
        await sink.arrived(3)
        started = time.perf_counter()
        reply.close()
        assert pool.open_connections == 0
        await asyncio.wait_for(gone.wait(), 30)
        assert time.perf_counter() - started < 2, "0.25 s is promised, on a machine that is not busy"
        assert sink.ends == []
        reply.close()
        reply.pause()
        reply.resume()


async def test_a_sink_may_close_from_within():
    class Closing(Recorder):
        def on_body(self, data):
            super().on_body(data)
            reply.close()

    async with RawUpstream(always(sized(b"abc"))) as upstream, pool_for(upstream.url) as pool:
        for _ in range(3):
            sink = Closing()
            reply = await pool.send(HEAD, BODY, SHORT)
            reply.relay(sink)
            await sink.arrived(3)
            assert (sink.bodies, sink.ends) == ([b"abc"], [])


@pytest.mark.parametrize("where", ["on_body", "on_end"])
async def test_a_failing_sink_costs_only_its_own_answer(where, caplog):
    class Failing(Recorder):
        def on_body(self, data):
            super().on_body(data)
            if where == "on_body":
                raise KeyError("a bug")

        def on_end(self, error):
            super().on_end(error)
            if where == "on_end":
                raise KeyError("a bug")

    second = asyncio.Event()

    async def script(peer):
        while True:
            await peer.request()
            peer.send(chunked_head(), chunk(b"one"))
            await second.wait()
            peer.send(chunk(b"two"), LAST_CHUNK)

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        sink = Failing()
        (await pool.send(HEAD, BODY, SHORT)).relay(sink)
        await sink.arrived(3)
        second.set()
        await settled(lambda: any(r.levelno == logging.ERROR for r in caplog.records))
        if where == "on_body":
            assert (sink.bodies, sink.ends, pool.open_connections) == ([b"one"], [], 0)
        assert len(caplog.records) == 1
        assert await (await pool.send(HEAD, BODY, SHORT)).read(10) == b"onetwo"


async def test_a_reader_is_told_when_its_answer_is_given_up():
    async with RawUpstream(answering(chunked_head())) as upstream, pool_for(upstream.url) as pool:
        reply = await pool.send(HEAD, BODY, SHORT)
        reading = asyncio.ensure_future(reply.read(100))
        await asyncio.sleep(0)
        reply.close()
        with pytest.raises(UpstreamError, match="given up"):
            await reading


async def test_a_cancelled_read_closes_its_connection_at_once():
    gone = asyncio.Event()

    async def script(peer):
        await peer.request()
        peer.send(chunked_head(), chunk(b"one"))
        await peer.gone()
        gone.set()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        reading = asyncio.ensure_future((await pool.send(HEAD, BODY, SHORT)).read(100))
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert pool.open_connections == 0
        await asyncio.wait_for(gone.wait(), 30)

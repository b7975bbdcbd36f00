"""The pool: which connections are used again, which are dropped, and that all are counted."""

import asyncio
import os
import socket
import time

import pytest

from backends.errors import UpstreamError
from backends.transport import Deadlines
from tests.support.raw_upstream import LAST_CHUNK, RawUpstream, always, answering, chunk, chunked_head, sized
from tests.support.sinks import SHORT, Recorder, pool_for, post, settled

LOOPS = ("uvloop", "asyncio")

HEAD, BODY = post()


async def fetch(pool, head=HEAD, body=BODY, deadlines=SHORT):
    return await (await pool.send(head, body, deadlines)).read(1 << 20)


async def test_concurrent_requests_each_have_a_connection_and_later_ones_reuse_them():
    async with RawUpstream(always(sized(b"abc"))) as upstream, pool_for(upstream.url) as pool:
        for _ in range(5):
            assert await asyncio.gather(*(fetch(pool) for _ in range(8))) == [b"abc"] * 8
        assert upstream.connections == pool.open_connections == pool.idle_connections == 8


async def test_the_connection_used_last_is_used_first():
    served = []

    async def script(peer):
        while True:
            await peer.request()
            served.append(peer.number)
            peer.send(sized(b"abc"))

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        await asyncio.gather(*(fetch(pool) for _ in range(4)))
        last = served[-1]
        for _ in range(6):
            await fetch(pool)
        assert served[4:] == [last] * 6


async def test_idle_connections_are_closed_when_their_time_is_over():
    async with (
        RawUpstream(always(sized(b"abc"))) as upstream,
        pool_for(upstream.url, keepalive_s=0.1) as pool,
    ):
        await asyncio.gather(*(fetch(pool) for _ in range(3)))
        assert pool.idle_connections == 3
        await settled(lambda: upstream.open_connections == 0)
        assert pool.open_connections == pool.idle_connections == 0
        await fetch(pool)
        assert upstream.connections == 4


async def test_a_connection_past_its_time_is_not_used_even_if_the_sweep_is_late():
    async with (
        RawUpstream(always(sized(b"abc"))) as upstream,
        pool_for(upstream.url, keepalive_s=0.05) as pool,
    ):
        await fetch(pool)
        time.sleep(0.1)  # the loop is stalled, and with it the sweep
        await asyncio.sleep(0)
        await fetch(pool)
        assert upstream.connections == 2


async def test_no_more_than_max_idle_connections_are_kept():
    async with RawUpstream(always(sized(b"abc"))) as upstream:
        async with pool_for(upstream.url, max_idle=2) as pool:
            await asyncio.gather(*(fetch(pool) for _ in range(6)))
            assert pool.open_connections == pool.idle_connections == 2
        async with pool_for(upstream.url, max_idle=0) as pool:
            assert await fetch(pool) == b"abc"
            assert pool.open_connections == 0


@pytest.mark.parametrize(
    ("headers", "kept"),
    [
        ((b"connection: close",), False),
        ((b"keep-alive: timeout=1",), False),
        ((b"keep-alive: timeout=60",), True),
    ],
)
async def test_the_upstreams_wish_about_its_connection_is_respected(headers, kept):
    async with RawUpstream(always(sized(b"abc", *headers))) as upstream, pool_for(upstream.url) as pool:
        assert await fetch(pool) == b"abc"
        assert pool.idle_connections == kept


async def test_an_upstreams_shorter_idle_limit_shortens_ours():
    async with (
        RawUpstream(always(sized(b"abc", b"keep-alive: timeout=2"))) as upstream,
        pool_for(upstream.url, keepalive_s=60) as pool,
    ):
        await fetch(pool)
        (until_at,) = pool._idle.values()
        assert until_at - asyncio.get_running_loop().time() <= 1


async def test_an_upstreams_longer_idle_limit_lengthens_ours_to_a_minute_at_most():
    async with (
        RawUpstream(always(sized(b"abc", b"keep-alive: timeout=75"))) as upstream,
        pool_for(upstream.url, keepalive_s=4) as pool,
    ):
        await fetch(pool)
        (until_at,) = pool._idle.values()
        assert 50 < until_at - asyncio.get_running_loop().time() <= 60


@pytest.mark.parametrize("how", ["close", "reset", "bytes"])
async def test_an_idle_connection_that_ends_or_speaks_is_dropped_at_once(how):
    end = asyncio.Event()

    async def script(peer):
        await peer.request()
        peer.send(sized(b"abc"))
        await end.wait()
        if how == "bytes":
            peer.send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
            await peer.gone()
        elif how == "reset":
            peer.reset()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        await fetch(pool)
        assert pool.idle_connections == 1
        end.set()
        await settled(lambda: pool.open_connections == 0)
        assert pool.idle_connections == 0
        await fetch(pool)
        assert upstream.connections == 2


async def test_bytes_after_a_complete_answer_cost_the_connection_not_the_answer():
    async with (
        RawUpstream(answering(sized(b"abc") + sized(b"smuggled"))) as upstream,
        pool_for(upstream.url) as pool,
    ):
        for _ in range(2):
            assert await fetch(pool) == b"abc"
        assert (upstream.connections, pool.open_connections) == (2, 0)


# A kept connection that the upstream had already closed


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_request_that_met_a_closing_idle_connection_is_repeated_once_on_a_fresh_one(how):
    requests = []

    async def script(peer):
        requests.append(await peer.request())
        peer.send(sized(b"%d" % peer.number))
        await peer.head()  # the next request is met by a close, as when the idle limit passes at that moment
        if how == "reset":
            peer.reset()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        assert await fetch(pool) == b"1"
        assert await fetch(pool, *post("/again", b"x" * 100_000)) == b"2"
        assert upstream.connections == 2
        assert requests[1] == b"".join(post("/again", b"x" * 100_000))


async def test_only_one_repetition_is_made():
    async def script(peer):
        await peer.request()
        if peer.number == 1:
            peer.send(sized(b"abc"))
            await peer.head()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        await fetch(pool)
        with pytest.raises(UpstreamError) as caught:
            await fetch(pool)
        assert (caught.value.kind, caught.value.stale) == ("reset", False)
        assert (upstream.connections, pool.open_connections) == (2, 0)


@pytest.mark.parametrize(
    "first", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"]
)
async def test_nothing_is_repeated_after_the_first_byte_of_an_answer(first):
    async def script(peer):
        await peer.request()
        peer.send(sized(b"abc"))
        await peer.request()
        peer.send(first)
        await peer.drain()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        await fetch(pool)
        with pytest.raises(UpstreamError) as caught:
            await fetch(pool)
        assert not caught.value.stale
        assert upstream.connections == 1


async def test_nothing_is_repeated_when_the_upstream_worked_on_it_first():
    async def script(peer):
        await peer.request()
        peer.send(sized(b"abc"))
        await peer.request()
        await asyncio.sleep(1.1)  # beyond what an idle close can take to be seen

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        await fetch(pool)
        with pytest.raises(UpstreamError) as caught:
            await fetch(pool)
        assert (caught.value.kind, caught.value.stale, upstream.connections) == ("reset", False, 1)


async def test_a_timeout_is_never_repeated():
    async def script(peer):
        await peer.request()
        peer.send(sized(b"abc"))
        await peer.gone()

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        await fetch(pool)
        with pytest.raises(UpstreamError) as caught:
            await fetch(pool, deadlines=Deadlines(5, 0.1, 5, 10))
        assert (caught.value.kind, upstream.connections) == ("first_byte_timeout", 1)


# The end


async def test_close_ends_every_exchange_and_refuses_new_ones():
    async with RawUpstream(answering(b"", b"")) as upstream, pool_for(upstream.url) as pool:
        waiting = asyncio.ensure_future(pool.send(HEAD, BODY, SHORT))
        await settled(lambda: pool.open_connections == 1)
        await pool.close()
        with pytest.raises(UpstreamError) as caught:
            await waiting
        assert caught.value.kind == "reset"
        with pytest.raises(UpstreamError, match="closed its connections"):
            await pool.send(HEAD, BODY, SHORT)
        await settled(lambda: upstream.open_connections == 0)
        await pool.close()


async def test_close_tells_who_is_in_the_middle_of_an_answer():
    async with (
        RawUpstream(answering(chunked_head() + chunk(b"one"))) as upstream,
        pool_for(upstream.url) as pool,
    ):
        sink = Recorder()
        (await pool.send(HEAD, BODY, SHORT)).relay(sink)
        await sink.arrived(3)
        await pool.close()
        assert (await sink.end()).kind == "reset"


async def test_a_connect_that_completes_after_close_is_dropped():
    async with RawUpstream(always(sized(b"abc"))) as upstream, pool_for(upstream.url) as pool:
        sending = asyncio.ensure_future(pool.send(HEAD, BODY, SHORT))
        await asyncio.sleep(0)
        await pool.close()
        with pytest.raises(UpstreamError):
            await sending
        await settled(lambda: upstream.open_connections == 0)


async def test_a_thousand_exchanges_of_every_kind_leave_no_descriptor_behind():
    async def script(peer):
        await peer.request()
        match peer.number % 6:
            case 0:
                peer.send(sized(b"abc", b"connection: close"))
                await peer.gone()
            case 1:
                peer.send(chunked_head() + chunk(b"x"))
            case 2:
                peer.reset()
            case 3:
                peer.send(b"garbage\r\n\r\n")
                await peer.gone()
            case 4:
                await peer.gone()
            case 5:
                peer.send(chunked_head() + chunk(b"abc") + LAST_CHUNK)

    async with RawUpstream(script) as upstream, pool_for(upstream.url) as pool:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            await asyncio.gather(
                *(fetch(pool, deadlines=Deadlines(5, 0.02, 0.02, 5)) for _ in range(20)),
                return_exceptions=True,
            )
        await settled(lambda: pool.open_connections == upstream.open_connections == 0)
        await asyncio.sleep(0.01)
        assert abs(len(os.listdir("/proc/self/fd")) - before) <= 5


async def test_nagle_is_off():
    async with RawUpstream(always(sized(b"abc"))) as upstream, pool_for(upstream.url) as pool:
        await fetch(pool)
        (connection,) = pool._open
        raw = connection._transport.get_extra_info("socket")
        with socket.socket(fileno=os.dup(raw.fileno())) as sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

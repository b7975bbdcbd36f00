"""TLS, proxies, connecting: real handshakes with a CA made for the test."""

import asyncio
import base64
import contextlib
import os
import socket

import pytest

from backends.errors import UpstreamError
from backends.transport import Deadlines
from tests.support.certificates import Authority
from tests.support.raw_upstream import RawUpstream, always, answering, chunk, chunked_head, sized
from tests.support.sinks import SHORT, Recorder, pool_for, post, settled

LOOPS = ("uvloop", "asyncio")

HEAD, BODY = post()
QUICK = Deadlines(0.3, 5, 5, 10)


async def fetch(pool, deadlines=SHORT, head=HEAD, body=BODY):
    return await (await pool.send(head, body, deadlines)).read(1 << 24)


async def failure(pool, deadlines=SHORT):
    with pytest.raises(UpstreamError) as caught:
        await pool.send(HEAD, BODY, deadlines)
    assert pool.open_connections == 0
    return caught.value


def unused_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# Plain TCP


async def test_a_refused_connection_is_a_connect_error_that_names_the_place():
    port = unused_port()
    async with pool_for(f"http://127.0.0.1:{port}") as pool:
        error = await failure(pool)
        assert (error.kind, error.sent) == ("connect", False)
        assert error.message == f"cannot connect to http://127.0.0.1:{port}: connection refused"


async def test_a_name_that_does_not_resolve_is_a_connect_error():
    async with pool_for("http://no-such-host.invalid") as pool:
        error = await failure(pool)
        assert error.kind == "connect"
        assert "the name cannot be resolved" in error.message


@contextlib.contextmanager
def full_backlog():
    """A port whose connections are never completed: its queue is full and nobody accepts."""
    with socket.socket() as server, contextlib.ExitStack() as clients:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()[1]


async def test_a_connect_that_does_not_finish_is_a_connect_timeout():
    with full_backlog() as port:
        async with pool_for(f"http://127.0.0.1:{port}") as pool:
            error = await failure(pool, QUICK)
            assert (error.kind, error.sent) == ("connect_timeout", False)
            assert "within 0.3 s" in error.message


async def test_cancelled_connects_leave_no_descriptor():
    with full_backlog() as port:
        async with pool_for(f"http://127.0.0.1:{port}") as pool:
            before = len(os.listdir("/proc/self/fd"))
            sending = [asyncio.ensure_future(pool.send(HEAD, BODY, SHORT)) for _ in range(20)]
            await asyncio.sleep(0.05)
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
            await settled(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)


# TLS


async def test_tls_is_verified_against_the_configured_ca_and_kept_between_requests(authority, localhost_tls):
    async with (
        RawUpstream(always(sized(b"abc")), tls=localhost_tls) as upstream,
        pool_for(upstream.url, ca_file=authority.ca_file) as pool,
    ):
        for _ in range(3):
            assert await fetch(pool) == b"abc"
        assert (upstream.connections, pool.idle_connections) == (1, 1)


async def test_large_bodies_go_both_ways_over_tls(authority, localhost_tls):
    async def script(peer):
        while True:
            request = await peer.request()
            peer.send(sized(request[-5_000_000:]))

    async with (
        RawUpstream(script, tls=localhost_tls) as upstream,
        pool_for(upstream.url, ca_file=authority.ca_file) as pool,
    ):
        body = os.urandom(5_000_000)
        for _ in range(2):
            assert await fetch(pool, SHORT, *post(body=body)) == body
        assert upstream.connections == 1


async def test_a_paused_reply_over_tls_gets_everything_in_the_end(authority, localhost_tls):
    class Pausing(Recorder):
        def on_body(self, data):
            super().on_body(data)
            reply.pause()
            asyncio.get_running_loop().call_soon(reply.resume)

    async with (
        RawUpstream(always(sized(b"x" * 3_000_000)), tls=localhost_tls) as upstream,
        pool_for(upstream.url, ca_file=authority.ca_file) as pool,
    ):
        sink = Pausing()
        reply = await pool.send(HEAD, BODY, SHORT)
        reply.relay(sink)
        assert await sink.end() is None
        assert sink.body == b"x" * 3_000_000


async def test_sni_carries_the_host(authority, localhost_tls):
    names = []
    localhost_tls.sni_callback = lambda _, name, __: names.append(name)
    async with (
        RawUpstream(always(sized(b"abc")), tls=localhost_tls) as upstream,
        pool_for(upstream.url, ca_file=authority.ca_file) as pool,
    ):
        await fetch(pool)
    localhost_tls.sni_callback = None
    assert names == ["localhost"]


async def test_an_address_is_checked_against_the_certificates_addresses(authority):
    tls = authority.server_context("IP:127.0.0.1")
    async with (
        RawUpstream(always(sized(b"abc")), tls=tls) as upstream,
        pool_for(f"https://127.0.0.1:{upstream.port}", ca_file=authority.ca_file) as pool,
    ):
        assert await fetch(pool) == b"abc"


async def test_an_unknown_issuer_is_a_tls_error_that_says_what_to_do(localhost_tls):
    async with (
        RawUpstream(always(sized(b"abc")), tls=localhost_tls) as upstream,
        pool_for(upstream.url) as pool,
    ):
        error = await failure(pool)
        assert (error.kind, error.sent) == ("tls", False)
        assert f"TLS handshake with https://localhost:{upstream.port} failed" in error.message
        assert "certificate was refused" in error.message
        assert "ca_file" in error.message


async def test_another_ca_is_not_enough(tmp_path, localhost_tls):
    other = Authority(tmp_path, "Other CA")
    async with (
        RawUpstream(always(sized(b"abc")), tls=localhost_tls) as upstream,
        pool_for(upstream.url, ca_file=other.ca_file) as pool,
    ):
        assert (await failure(pool)).kind == "tls"


async def test_a_certificate_for_another_name_is_a_tls_error(authority):
    tls = authority.server_context("DNS:other.example")
    async with (
        RawUpstream(always(sized(b"abc")), tls=tls) as upstream,
        pool_for(upstream.url, ca_file=authority.ca_file) as pool,
    ):
        error = await failure(pool)
        assert error.kind == "tls"
        assert "localhost" in error.message


async def test_verification_can_be_switched_off(localhost_tls):
    async with (
        RawUpstream(always(sized(b"abc")), tls=localhost_tls) as upstream,
        pool_for(upstream.url, verify=False) as pool,
    ):
        assert await fetch(pool) == b"abc"


async def test_plain_http_on_the_tls_port_is_a_tls_error_that_says_so():
    async def script(peer):
        peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await peer.gone()

    async with RawUpstream(script) as upstream, pool_for(f"https://localhost:{upstream.port}") as pool:
        error = await failure(pool)
        assert error.kind == "tls"
        assert "plain http" in error.message


async def test_a_server_that_hangs_up_in_the_handshake_is_a_tls_error():
    async def script(peer):
        await peer.read(1)

    async with RawUpstream(script) as upstream, pool_for(f"https://localhost:{upstream.port}") as pool:
        assert (await failure(pool)).kind == "tls"


async def test_a_handshake_that_stalls_is_a_connect_timeout_and_can_be_cancelled():
    async with RawUpstream(answering()) as upstream, pool_for(f"https://localhost:{upstream.port}") as pool:
        assert (await failure(pool, QUICK)).kind == "connect_timeout"
        sending = asyncio.ensure_future(pool.send(HEAD, BODY, SHORT))
        await settled(lambda: upstream.connections == 2)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await settled(lambda: upstream.open_connections == 0)


async def test_a_body_delimited_by_the_close_is_complete_only_with_tlss_own_end(authority, localhost_tls):
    received = asyncio.Event()

    async def script(peer):
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\n\r\nthe end")
        if peer.number == 1:
            peer.close()
            await peer.gone()
        else:
            await received.wait()
            peer.cut()

    async with (
        RawUpstream(script, tls=localhost_tls) as upstream,
        pool_for(upstream.url, ca_file=authority.ca_file) as pool,
    ):
        assert await fetch(pool) == b"the end"
        sink = Recorder()
        (await pool.send(HEAD, BODY, SHORT)).relay(sink)
        await sink.arrived(7)
        received.set()
        assert (await sink.end()).kind == "incomplete"


async def test_giving_up_over_tls_is_seen_by_the_upstream_at_once(authority, localhost_tls):
    gone = asyncio.Event()

    async def script(peer):
        await peer.request()
        peer.send(chunked_head(), chunk(b"one"))
        await peer.gone()
        gone.set()

    async with (
        RawUpstream(script, tls=localhost_tls) as upstream,
        pool_for(upstream.url, ca_file=authority.ca_file) as pool,
    ):
        reply = await pool.send(HEAD, BODY, SHORT)
        reply.close()
        await asyncio.wait_for(gone.wait(), 30)


# Proxies

CREDENTIALS = "user:s3cr%40t"
AUTHORIZATION = b"proxy-authorization: Basic " + base64.b64encode(b"user:s3cr@t")


def tunnelling(heads, *, answer=b"HTTP/1.1 200 Connection established\r\nx: y\r\n\r\n"):
    """A proxy's script: CONNECT, then bytes both ways."""

    async def script(peer):
        head = await peer.head()
        heads.append(head)
        _, target, _ = head.split(b" ", 2)
        host, port = target.decode().rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        peer.send(answer)

        async def copy(source, destination):
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    destination.write(data)
                    await destination.drain()
            destination.close()

        try:
            await asyncio.gather(copy(peer.streams[0], writer), copy(reader, peer.streams[1]))
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    return script


def proxy_url(proxy, credentials=""):
    return f"http://{credentials + '@' if credentials else ''}localhost:{proxy.port}"


async def test_https_goes_through_a_tunnel_and_only_the_proxy_sees_its_credentials(authority, localhost_tls):
    heads, requests = [], []

    async def script(peer):
        while True:
            requests.append(await peer.request())
            peer.send(sized(b"x" * 300_000))

    async with RawUpstream(script, tls=localhost_tls) as upstream, RawUpstream(tunnelling(heads)) as proxy:
        url = proxy_url(proxy, CREDENTIALS)
        async with pool_for(upstream.url, proxy=url, ca_file=authority.ca_file) as pool:
            head, body = post(body=b"y" * 300_000)
            for _ in range(3):
                assert await fetch(pool, SHORT, head, body) == b"x" * 300_000
            assert (upstream.connections, proxy.connections) == (1, 1)
    (connect,) = heads
    assert connect.startswith(
        b"CONNECT localhost:%d HTTP/1.1\r\nhost: localhost:%d\r\n" % ((upstream.port,) * 2)
    )
    assert AUTHORIZATION in connect
    assert requests == [head + body] * 3


async def test_http_goes_to_the_proxy_in_absolute_form():
    async with RawUpstream(always(sized(b"unused"))) as upstream:
        heads = []

        async def script(peer):
            while True:
                heads.append(await peer.request())
                peer.send(sized(b"from the proxy"))

        async with RawUpstream(script) as proxy:
            async with pool_for(upstream.url, proxy=proxy_url(proxy, CREDENTIALS)) as pool:
                assert await fetch(pool) == b"from the proxy"
            async with pool_for(upstream.url, proxy=proxy_url(proxy)) as pool:
                assert await fetch(pool) == b"from the proxy"
        with_credentials, without = heads
        line = b"POST http://localhost:%d/v1/x HTTP/1.1\r\n" % upstream.port
        assert with_credentials == line + AUTHORIZATION + b"\r\n" + (HEAD + BODY).partition(b"\r\n")[2]
        assert without == line + (HEAD + BODY).partition(b"\r\n")[2]
        assert upstream.connections == 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "refused our credentials (407)"),
        (b"HTTP/1.1 403 Forbidden\r\ncontent-length: 3\r\n\r\nno!", "with status 403"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "with status 502"),
        (b"SOCKS?\r\n\r\n", "did not answer CONNECT with HTTP"),
        (b"", "did not answer CONNECT with HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 20_000, "did not answer CONNECT with HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\nearly bytes", "before the TLS handshake"),
    ],
)
async def test_a_refused_tunnel_is_a_proxy_error_without_the_password(answer, words):
    async def script(peer):
        await peer.head()
        peer.send(answer)
        await peer.drain()

    async with RawUpstream(script) as proxy:
        async with pool_for("https://upstream.example", proxy=proxy_url(proxy, CREDENTIALS)) as pool:
            error = await failure(pool)
            assert (error.kind, error.sent) == ("proxy", False)
            assert words in error.message
            assert "s3cr" not in error.message
        await settled(lambda: proxy.open_connections == 0)


async def test_a_proxy_that_refuses_credentials_for_http_is_a_proxy_error():
    async with (
        RawUpstream(always(sized(b"", status=b"407 Proxy Authentication Required"))) as proxy,
        pool_for("http://upstream.example", proxy=proxy_url(proxy)) as pool,
    ):
        with pytest.raises(UpstreamError, match="refused our credentials") as caught:
            await pool.send(HEAD, BODY, SHORT)
        assert (caught.value.kind, caught.value.sent) == ("proxy", False)


@pytest.mark.parametrize("url", ["http://upstream.example", "https://upstream.example"])
async def test_an_unreachable_proxy_is_a_connect_error_that_names_the_proxy(url):
    port = unused_port()
    async with pool_for(url, proxy=f"http://u:s3cr@127.0.0.1:{port}") as pool:
        error = await failure(pool)
        assert error.kind == "connect"
        assert error.message == f"cannot connect to the proxy 127.0.0.1:{port}: connection refused"


async def test_certificates_are_verified_inside_the_tunnel(localhost_tls):
    async with (
        RawUpstream(always(sized(b"abc")), tls=localhost_tls) as upstream,
        RawUpstream(tunnelling([])) as proxy,
        pool_for(upstream.url, proxy=proxy_url(proxy)) as pool,
    ):
        error = await failure(pool)
        assert error.kind == "tls"
        assert "certificate was refused" in error.message
        await settled(lambda: proxy.open_connections == 0)


async def test_an_upstream_that_hangs_up_in_the_tunnels_handshake_is_a_tls_error():
    async def script(peer):
        await peer.read(1)

    async with (
        RawUpstream(script) as upstream,
        RawUpstream(tunnelling([])) as proxy,
        pool_for(f"https://localhost:{upstream.port}", proxy=proxy_url(proxy)) as pool,
    ):
        assert (await failure(pool)).kind == "tls"


@pytest.mark.parametrize("phase", ["connect", "handshake"])
async def test_a_tunnel_that_stalls_is_a_connect_timeout_and_can_be_cancelled(phase):
    async def script(peer):
        await peer.head()
        if phase == "handshake":
            peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        await peer.gone()

    async with (
        RawUpstream(script) as proxy,
        pool_for("https://upstream.example", proxy=proxy_url(proxy)) as pool,
    ):
        assert (await failure(pool, QUICK)).kind == "connect_timeout"
        await settled(lambda: proxy.open_connections == 0)
        for steps in range(12):
            sending = asyncio.ensure_future(pool.send(HEAD, BODY, SHORT))
            if steps < 11:
                for _ in range(steps):
                    await asyncio.sleep(0)
            else:
                await asyncio.sleep(0.05)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
        assert pool.open_connections == 0
        await settled(lambda: proxy.open_connections == 0)

"""Makes connections: name, TCP, the proxy's tunnel, TLS.

Owns the order of these steps and what their failures are called. Refuses to know HTTP beyond CONNECT. Invariant:
whatever happens, cancellation included, either the protocol is connected or no socket is left behind.
"""

import asyncio
import os
import re
import socket
import ssl
from typing import Final

from backends.errors import UpstreamError
from backends.origin import Origin, Proxy

_MAX_TUNNEL_HEAD_BYTES: Final = 16_384
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")


async def dial(origin: Origin, protocol: asyncio.Protocol, limit_s: float) -> None:
    """Connects `protocol` to the origin, through its proxy if it has one.

    UpstreamError of kind connect, tls, proxy or connect_timeout. The protocol's owner must close the protocol
    should it have been connected nevertheless.
    """
    try:
        async with asyncio.timeout(limit_s):
            # The loop's own limit on handshakes must not come before ours.
            if origin.proxy is None:
                await _connect_directly(origin, protocol, limit_s + 1)
            elif origin.scheme == "http":
                await _connect_to_proxy(origin.proxy, protocol)
            else:
                await _connect_through_tunnel(origin, origin.proxy, protocol, limit_s + 1)
    except TimeoutError:
        raise UpstreamError(
            "connect_timeout", f"no connection to {_place(origin)} within {limit_s:g} s"
        ) from None


async def _connect_directly(origin: Origin, protocol: asyncio.Protocol, handshake_limit_s: float) -> None:
    loop = asyncio.get_running_loop()
    tls = origin.tls_context()
    try:
        if tls is None:
            await loop.create_connection(lambda: protocol, origin.host, origin.port)
        else:
            await loop.create_connection(
                lambda: protocol,
                origin.host,
                origin.port,
                ssl=tls,
                server_hostname=origin.host,
                ssl_handshake_timeout=handshake_limit_s,
            )
    except TimeoutError:
        raise
    except (OSError, UnicodeError) as error:
        # A TCP connect is refused or unreachable, never reset; a handshake is.
        if isinstance(error, ssl.SSLError | ConnectionResetError | ConnectionAbortedError | BrokenPipeError):
            raise _tls_error(origin, error) from None
        raise UpstreamError("connect", f"cannot connect to {_place(origin)}: {_reason(error)}") from None


async def _connect_to_proxy(proxy: Proxy, protocol: asyncio.Protocol) -> asyncio.Transport:
    try:
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: protocol, proxy.host, proxy.port
        )
    except TimeoutError:
        raise
    except (OSError, UnicodeError) as error:
        raise UpstreamError("connect", f"cannot connect to the {proxy}: {_reason(error)}") from None
    return transport


async def _connect_through_tunnel(
    origin: Origin, proxy: Proxy, protocol: asyncio.Protocol, handshake_limit_s: float
) -> None:
    loop = asyncio.get_running_loop()
    tunnel = _Tunnel(loop)
    raw = await _connect_to_proxy(proxy, tunnel)
    try:
        raw.write(_connect_head(origin, proxy))
        _check_tunnel(await tunnel.answer, origin, proxy)
        tls = origin.tls_context()
        assert tls is not None, "only https needs a tunnel"
        # uvloop's start_tls asserts if the transport is paused for writing (its issue 564) and loses what was read
        # before (707). Neither can be: the proxy has answered our one small write, and nothing came after that.
        transport = await loop.start_tls(
            raw, protocol, tls, server_hostname=origin.host, ssl_handshake_timeout=handshake_limit_s
        )
    except BaseException as error:
        # A cancelled start_tls leaves the socket open on uvloop: it closes only the TLS side it has not attached yet.
        raw.abort()
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            raise _tls_error(origin, error) from None
        raise
    if transport is None:
        raise UpstreamError("tls", f"the connection to {_place(origin)} was lost during the TLS handshake")
    protocol.connection_made(transport)


class _Tunnel(asyncio.Protocol):
    """Gathers a proxy's answer to CONNECT: the head with all that came with it, or None if it never was whole."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.answer: asyncio.Future[bytes | None] = loop.create_future()
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        if b"\r\n\r\n" in self._received:
            self._settle(self._received)
        elif len(self._received) > _MAX_TUNNEL_HEAD_BYTES:
            self._settle(None)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the loop's signature
        self._settle(None)

    def _settle(self, answer: bytes | None) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)


def _connect_head(origin: Origin, proxy: Proxy) -> bytes:
    target = f"{_bracketed(origin.host)}:{origin.port}"
    credentials = f"proxy-authorization: {proxy.authorization}\r\n" if proxy.authorization else ""
    return f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n{credentials}\r\n".encode()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _check_tunnel(answer: bytes | None, origin: Origin, proxy: Proxy) -> None:
    status_line = _STATUS_LINE.match(answer) if answer is not None else None
    if answer is None or status_line is None:
        raise UpstreamError("proxy", f"the {proxy} did not answer CONNECT with HTTP")
    status = int(status_line[1])
    if status == 407:
        raise UpstreamError(
            "proxy", f"the {proxy} refused our credentials (407); set user and password in its URL"
        )
    if not 200 <= status < 300:
        raise UpstreamError("proxy", f"the {proxy} refused a tunnel to {origin} with status {status}")
    if not answer.endswith(b"\r\n\r\n"):
        raise UpstreamError("proxy", f"the {proxy} sent bytes into the tunnel before the TLS handshake")


def _tls_error(origin: Origin, error: Exception) -> UpstreamError:
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = f"its certificate was refused: {error.verify_message}"
        if "issuer" in reason or "self-signed" in reason:
            reason += "; if the certificate is right, name its CA's file in ca_file"
    elif isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).replace("_", " ").lower()
        if error.reason == "WRONG_VERSION_NUMBER":
            reason += "; does it speak plain http on this port?"
    else:
        reason = "the connection was closed"
    return UpstreamError("tls", f"TLS handshake with {_place(origin)} failed: {reason}")


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name cannot be resolved ({error.strerror})"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error)


def _place(origin: Origin) -> str:
    return f"{origin} through the {origin.proxy}" if origin.proxy is not None else str(origin)

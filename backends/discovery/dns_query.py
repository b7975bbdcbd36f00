"""Questions to a name server over UDP, and over TCP where the answer is too long (RFC 1035, 2782).

For service records, which the system's resolver cannot be asked for, and for a server that is not the system's. Owns the
bytes. Refuses to cache, and to follow a chain of names: a recursive server does.
"""

import asyncio
import contextlib
import ipaddress
import secrets
import struct
from pathlib import Path
from typing import Final, Literal, NamedTuple

from backends.discovery.found import MOST, DiscoveryError

Kind = Literal["A", "AAAA", "SRV"]
_KINDS: Final[dict[Kind, int]] = {"A": 1, "AAAA": 28, "SRV": 33}
_HEADER: Final = struct.Struct("!6H")
_RECORD: Final = struct.Struct("!HHIH")
_SERVICE: Final = struct.Struct("!3H")
_RECURSE, _ANSWER, _CUT, _INTERNET = 0x0100, 0x8000, 0x0200, 1
_NO_SUCH_NAME: Final = 3
_POINTER: Final = 0xC0
_MOST_JUMPS: Final = 64
_TIMEOUT_S: Final = 2.0
_RESOLV_CONF: Final = Path("/etc/resolv.conf")

Address = tuple[str, int]


class Service(NamedTuple):
    """A service record."""

    priority: int
    weight: int
    port: int
    host: str


def server_address(text: str) -> Address:
    """`10.0.0.2`, `127.0.0.1:5353`, `[::1]:53`."""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        return host, int(port.lstrip(":") or 53)
    host, _, port = text.partition(":")
    return host, int(port or 53)


def system_server(path: Path = _RESOLV_CONF) -> Address:
    """The first one of /etc/resolv.conf."""
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                return words[1], 53
    raise DiscoveryError(f"{path} names no name server: give `nameserver`")


async def query(name: str, kind: Kind, server: Address) -> list[str] | list[Service]:
    """Addresses, or services; none if there is no such name. DiscoveryError without an answer that can be used."""
    number = secrets.randbelow(1 << 16)
    question = _question(number, name, kind)
    try:
        async with asyncio.timeout(2 * _TIMEOUT_S):
            answer = await _over_udp(question, server)
            if _flags(answer) & _CUT:
                answer = await _over_tcp(question, server)
        return _read(answer, question, kind)
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise DiscoveryError(f"the name server did not answer ({type(error).__name__})") from error
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
        raise DiscoveryError("the name server's answer cannot be read") from error


def _question(number: int, name: str, kind: Kind) -> bytes:
    labels = name.rstrip(".").encode("ascii").split(b".")
    written = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    return _HEADER.pack(number, _RECURSE, 1, 0, 0, 0) + written + struct.pack("!HH", _KINDS[kind], _INTERNET)


class _Exchange(asyncio.DatagramProtocol):
    """One question; an answer to another is not heard."""

    def __init__(self, question: bytes) -> None:
        self._question = question
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        del addr  # the socket is connected: it is the server's
        is_ours = data[:2] == self._question[:2] and data[12 : len(self._question)] == self._question[12:]
        if is_ours and _flags(data) & _ANSWER and not self.answer.done():
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


async def _over_udp(question: bytes, server: Address) -> bytes:
    loop = asyncio.get_running_loop()
    transport, exchange = await loop.create_datagram_endpoint(lambda: _Exchange(question), remote_addr=server)
    try:
        transport.sendto(question)
        async with asyncio.timeout(_TIMEOUT_S):
            return await exchange.answer
    finally:
        transport.close()


async def _over_tcp(question: bytes, server: Address) -> bytes:
    reader, writer = await asyncio.open_connection(*server)
    try:
        writer.write(len(question).to_bytes(2) + question)
        return await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
    finally:
        writer.close()


def _flags(message: bytes) -> int:
    return int.from_bytes(message[2:4])


def _read(answer: bytes, question: bytes, kind: Kind) -> list[str] | list[Service]:
    number, flags, _, count, _, _ = _HEADER.unpack_from(answer)
    if number.to_bytes(2) != question[:2] or not flags & _ANSWER:
        raise ValueError("not an answer to this")
    code = flags & 0xF
    if code == _NO_SUCH_NAME:
        return []
    if code:
        raise DiscoveryError(f"the name server refused (code {code})")
    at = len(question)
    addresses: list[str] = []
    services: list[Service] = []
    for _ in range(min(count, MOST)):
        at = _name_at(answer, at)[1]
        of_kind, _, _, length = _RECORD.unpack_from(answer, at)
        at += _RECORD.size
        if at + length > len(answer):
            raise ValueError("cut off")
        if of_kind == _KINDS[kind] and kind == "SRV":
            host = _name_at(answer, at + _SERVICE.size)[0]
            priority, weight, port = _SERVICE.unpack_from(answer, at)
            services.append(Service(priority, weight, port, host))
        elif of_kind == _KINDS[kind]:
            addresses.append(str(ipaddress.ip_address(answer[at : at + length])))
        at += length
    return services if kind == "SRV" else addresses


def _name_at(message: bytes, at: int) -> tuple[str, int]:
    """The name, and where what follows it begins. Pointers only lead back, so that it ends."""
    labels: list[str] = []
    end = 0
    for _ in range(_MOST_JUMPS):
        length = message[at]
        if length >= _POINTER:
            end = end or at + 2
            target = int.from_bytes(message[at : at + 2]) & 0x3FFF
            if target >= at:
                raise ValueError("a name that points ahead")
            at = target
        elif length:
            labels.append(message[at + 1 : at + 1 + length].decode("ascii"))
            at += 1 + length
        else:
            return ".".join(labels), end or at + 1
    raise ValueError("a name without an end")

"""A client that sends exact bytes over a raw socket: drips, half-closes, resets, stops reading.

Ordinary HTTP clients normalise away what the tests of the inbound side are about. Reads answers strictly.
"""

import asyncio
import socket
import struct
from dataclasses import dataclass, field


@dataclass
class Answer:
    """An HTTP answer; `is_complete` is False when the connection ended before its framing did."""

    status: int
    reason: str = ""
    version: str = "HTTP/1.1"
    headers: dict[str, str] = field(default_factory=dict)  # lower-case names
    names: list[str] = field(default_factory=list)  # as received, with repetitions
    body: bytes = b""
    chunks: list[bytes] = field(default_factory=list)
    is_complete: bool = True


class RawClient:
    """One TCP connection. Every wait has a deadline, so a hang fails the test."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self.socket = sock
        self._timeout_s = timeout_s
        self._buffer = b""

    @classmethod
    async def connect(
        cls, port: int, host: str = "127.0.0.1", *, receive_buffer: int = 0, timeout_s: float = 10.0
    ) -> "RawClient":
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = cls(sock, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(sock, (host, port))
        except BaseException:
            sock.close()
            raise
        return client

    async def send(self, *data: bytes) -> None:
        async with asyncio.timeout(self._timeout_s):
            await asyncio.get_running_loop().sock_sendall(self.socket, b"".join(data))

    async def drip(self, data: bytes, pause_s: float = 0.0, size: int = 1) -> None:
        """In pieces of `size` bytes; ConnectionError when the server has hung up."""
        for start in range(0, len(data), size):
            await self.send(data[start : start + size])
            await asyncio.sleep(pause_s)

    def half_close(self) -> None:
        """FIN, but keeps reading."""
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """RST instead of FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def is_stale(self) -> bool:
        """Whether the server has closed its side already, as an HTTP client looks before it uses a kept connection."""
        try:
            return not self._buffer and self.socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def receive(self, size: int = 65536) -> bytes:
        """What has arrived, at least a byte; b"" when the server has closed. ConnectionResetError on a reset."""
        if self._buffer:
            data, self._buffer = self._buffer[:size], self._buffer[size:]
            return data
        async with asyncio.timeout(self._timeout_s):
            return await asyncio.get_running_loop().sock_recv(self.socket, size)

    async def read_to_end(self) -> bytes:
        """Everything until the server closes (or resets, after which nothing more can come)."""
        parts: list[bytes] = []
        try:
            while data := await self.receive():
                parts.append(data)
        except ConnectionResetError:
            pass
        return b"".join(parts)

    async def is_closed(self) -> bool:
        """Waits for the server's FIN or RST; False if it sends something first."""
        try:
            return await self.receive() == b""
        except ConnectionResetError:
            return True

    async def read_answer(self, *, is_head: bool = False) -> Answer:
        """The next answer, an interim one too. EOFError if the connection ends before its head does."""
        lines = (await self._read_until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, status, reason = lines[0].split(" ", 2)
        answer = Answer(int(status), reason, version)
        for line in lines[1:-2]:
            name, _, value = line.partition(":")
            answer.names.append(name)
            answer.headers[name.lower()] = value.strip()
        if is_head or answer.status < 200 or answer.status in (204, 304):
            return answer
        try:
            await self._read_body(answer)
        except (EOFError, ConnectionResetError):
            answer.is_complete = False
        return answer

    async def exchange(self, *data: bytes) -> Answer:
        await self.send(*data)
        return await self.read_answer()

    async def _read_body(self, answer: Answer) -> None:
        if answer.headers.get("transfer-encoding") == "chunked":
            while True:
                size = int((await self._read_until(b"\r\n"))[:-2], 16)
                chunk = await self._read_exactly(size)
                assert await self._read_exactly(2) == b"\r\n"
                if not size:
                    return
                answer.chunks.append(chunk)
                answer.body += chunk
        elif "content-length" in answer.headers:
            answer.body = await self._read_exactly(int(answer.headers["content-length"]))
        else:
            while data := await self.receive():
                answer.body += data

    async def _read_until(self, mark: bytes) -> bytes:
        data = b""
        while mark not in data:
            received = await self.receive()
            if not received:
                raise EOFError(data)
            data += received
        end = data.index(mark) + len(mark)
        self._buffer = data[end:] + self._buffer
        return data[:end]

    async def _read_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            received = await self.receive(size - len(data))
            if not received:
                raise EOFError(data)
            data += received
        return data

"""A name server on loopback that says what the test wants: A, AAAA and SRV records, over UDP and TCP."""

import ipaddress
import socket
import socketserver
import struct
import threading
from typing import Any, Self

KINDS = {"A": 1, "AAAA": 28, "SRV": 33, "CNAME": 5}
Records = dict[tuple[str, str], list[Any]]


class NameServer:
    """`records` by name and kind; services as (priority, weight, port, host). What it does not have does not exist.

    `is_cut`: over UDP it says only that the answer is too long. `code`: what it answers to everything, if not 0.
    """

    def __init__(self, records: Records | None = None) -> None:
        self.records: Records = records or {}
        self.is_cut = False
        self.is_silent = False
        self.code = 0
        self.raw: bytes | None = None  # instead of what follows the question
        self.questions: list[tuple[str, str]] = []
        owner = self

        class Udp(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                data, channel = self.request
                if not owner.is_silent:
                    channel.sendto(owner.answer(data, is_cut=owner.is_cut), self.client_address)

        class Tcp(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                size = int.from_bytes(self.request.recv(2))
                answer = owner.answer(self.request.recv(size), is_cut=False)
                self.request.sendall(len(answer).to_bytes(2) + answer)

        while True:  # the same port for both
            udp = socketserver.ThreadingUDPServer(("127.0.0.1", 0), Udp)
            try:
                tcp = socketserver.ThreadingTCPServer(("127.0.0.1", udp.server_address[1]), Tcp)
            except OSError:
                udp.server_close()
            else:
                break
        self._servers = (udp, tcp)
        self.address = ("127.0.0.1", int(udp.server_address[1]))

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.address[1]}"

    def answer(self, question: bytes, *, is_cut: bool) -> bytes:
        labels, at = [], 12
        while question[at]:
            labels.append(question[at + 1 : at + 1 + question[at]].decode())
            at += 1 + question[at]
        (number,) = struct.unpack_from("!H", question, at + 1)
        kind = next(name for name, value in KINDS.items() if value == number)
        name = ".".join(labels)
        self.questions.append((name, kind))
        found = self.records.get((name, kind))
        is_known = any(of == name for of, _ in self.records)
        code = self.code or (0 if is_known else 3)
        flags = 0x8180 | code | (0x0200 if is_cut else 0)
        records = [] if is_cut or not found else [self._record(kind, record) for record in found]
        aliases = [] if is_cut or not found else self.records.get((name, "CNAME"), [])
        records = [self._record("CNAME", alias) for alias in aliases] + records
        head = question[:2] + struct.pack("!5H", flags, 1, len(records), 0, 0)
        if self.raw is not None:
            return question[:2] + struct.pack("!5H", flags, 1, 1, 0, 0) + question[12 : at + 5] + self.raw
        return head + question[12 : at + 5] + b"".join(records)

    def _record(self, kind: str, record: Any) -> bytes:
        if kind == "SRV":
            priority, weight, port, host = record
            data = struct.pack("!3H", priority, weight, port) + _name(host)
        elif kind == "CNAME":
            data = _name(record)
        else:
            data = ipaddress.ip_address(record).packed
        return b"\xc0\x0c" + struct.pack("!HHIH", KINDS[kind], 1, 5, len(data)) + data

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def _name(host: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode() for label in host.split(".")) + b"\0"


def silent_address() -> tuple[str, int]:
    """Nobody listens there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return "127.0.0.1", probe.getsockname()[1]

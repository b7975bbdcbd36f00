"""The cost log: every ledger row as one line of JSON, in a file that is rotated by size.

A copy for log shippers, not the record of truth: a line that cannot be written is counted and dropped, and rows
recovered after a kill are only in the database. One process writes one path. Invariant: a file never keeps a
part of a line.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from gateway.ledger_row import LedgerRow, record_of
from gateway.stores.sqlite import StorageError

_TAIL_BYTES: Final = 65_536
_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


def line_of(row: LedgerRow) -> bytes:
    """The row as a JSON object with the table's column names, and a newline."""
    return _encode(record_of(row)) + b"\n"


class JsonlLog:
    """Appends to `path`; at `max_bytes` it becomes `path.1`, and so on up to `path.<keep>`, `keep` at least 1."""

    def __init__(self, path: Path, *, max_bytes: int = 100 * 1024 * 1024, keep: int = 5) -> None:
        self.path = path
        self.lines_lost = 0
        self._max_bytes = max_bytes
        self._keep = keep
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = self._open()
        except OSError as error:
            raise StorageError(f"Cannot write the cost log {path}: {error.strerror}.") from error

    def write(self, rows: Sequence[LedgerRow]) -> None:
        """Appends the rows' lines, whole or not at all. Never raises for want of space or permission."""
        lines = b"".join(map(line_of, rows))
        try:
            if self._size and self._size + len(lines) > self._max_bytes:
                self._rotate()
            self._append(lines)
        except OSError as error:
            if not self.lines_lost:
                _log.error("cost log %s: cannot write: %s", self.path, error.strerror)
            self.lines_lost += len(rows)

    def close(self) -> None:
        os.close(self._descriptor)

    def _open(self) -> int:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(descriptor).st_size
        tail_at = max(0, self._size - _TAIL_BYTES)
        tail = os.pread(descriptor, _TAIL_BYTES, tail_at)
        if tail and not tail.endswith(b"\n"):  # a process was killed while it wrote
            self._size = tail_at + tail.rfind(b"\n") + 1
            os.ftruncate(descriptor, self._size)
        return descriptor

    def _append(self, lines: bytes) -> None:
        written = 0
        try:
            while written < len(lines):
                written += os.write(self._descriptor, lines[written:])
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += written

    def _rotate(self) -> None:
        for number in range(self._keep - 1, 0, -1):
            older = _numbered(self.path, number)
            if older.exists():
                older.replace(_numbered(self.path, number + 1))
        self.path.replace(_numbered(self.path, 1))
        os.close(self._descriptor)
        self._descriptor = self._open()


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")

"""What is written down of running engines, so that the next gateway can take over or end those of one that was killed.

One file for each replica, private, written whole. Owns the format and the rule of who may be touched: a process whose pid,
start and boot are those of the record, and nobody else. One gateway at a time has the directory.
"""

import contextlib
import fcntl
import os
import re
from pathlib import Path
from typing import Final

import msgspec

from local_engine.process_table import ProcessId, boot_id, identify

_VERSION: Final = 1


class TakenError(Exception):
    """Another gateway has the directory. The message says so."""


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One engine. `fingerprint` is of its command and environment, `ports` are those its plan was given
    (first, count, host; None: it names its own).

    `members` are the processes of its group when it was last looked at, the guard included; `shared_memory` are names of
    files under /dev/shm.
    """

    version: int = _VERSION
    name: str
    pool: str
    slot: int
    boot: str
    guard: tuple[int, int]
    fingerprint: str
    api_key: str
    ports: tuple[int, int, str] | None
    members: list[tuple[int, int]] = []
    shared_memory: list[str] = []
    sockets: list[str] = []

    @property
    def guard_id(self) -> ProcessId:
        return ProcessId(*self.guard)

    def living(self) -> list[ProcessId]:
        """Of its processes, those that are still there; none after a reboot."""
        if self.boot != boot_id():
            return []
        return [one for one in (ProcessId(*each) for each in self.members) if one.is_alive()]

    def __repr__(self) -> str:
        return f"EngineRecord({self.name!r})"


class EngineRecords:
    """The directory. TakenError while another process has it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise TakenError(
                f"another Headgate runs engines with this storage directory ({directory.parent}): "
                "stop it, or give each its own storage.directory"
            ) from None
        self.owner_path = directory / "owner"
        self.log_directory = directory / "logs"
        self.log_directory.mkdir(mode=0o700, exist_ok=True)
        me = identify(os.getpid())
        self._write(self.owner_path, f"{os.getpid()} {me.started if me is not None else 0}\n".encode())

    def all(self) -> list[EngineRecord]:
        """In no order. What cannot be read is not ours, or of another version, and left alone."""
        found = []
        for path in self._directory.glob("*.json"):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=EngineRecord)
            except (OSError, msgspec.MsgspecError):
                continue
            if record.version == _VERSION:
                found.append(record)
        return found

    def put(self, record: EngineRecord) -> None:
        self._write(self._path(record.name), msgspec.json.encode(record))

    def forget(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self._path(name).unlink()

    def log_path(self, name: str) -> Path:
        return self.log_directory / f"{_file_name(name)}.log"

    def close(self) -> None:
        """Another gateway may have the directory from now on."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _path(self, name: str) -> Path:
        return self._directory / f"{_file_name(name)}.json"

    def _write(self, path: Path, content: bytes) -> None:
        temporary = path.with_name(f"{path.name}.new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(content)
        temporary.replace(path)


def _file_name(name: str) -> str:
    """`pool/1` as a file: nothing in a pool's name leads elsewhere."""
    return re.sub(r"[^A-Za-z0-9_-]", lambda match: "." if match[0] == "/" else f"%{ord(match[0]):x}", name)

"""Files of callers: what they upload for batches, and what batches bring back.

Owns a directory: one folder for each tenant, in it for each file a body and, last, its record, by whose presence the file
exists. A file is written beside its place and moved there when all of it is on the disk, so that what was acknowledged
survives a power cut and half a file is never seen. Bodies are a row of sealed frames (`gateway.overflow.bodies`), read and
written one frame at a time. Everything here blocks: `gateway.overflow.files` runs it on threads. Knows no lines.
"""

import contextlib
import hashlib
import os
import re
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import msgspec
from pydantic import Field

from backends.config import BlankIsNone
from backends.local_path import LocalPath
from gateway.overflow.bodies import Bodies, BodyError
from gateway.stores.sqlite import StorageError
from local_engine.config import RESTART, Section

FRAME_BYTES: Final = 256 * 1024
_ID: Final = re.compile(r"file-[0-9a-f]{44}")
_LENGTH: Final = struct.Struct(">I")
# What a process that was killed has left half-written.
_LEFT_OVER_S: Final = 86_400.0


class FilesConfig(Section):
    """`/v1/files`: what callers upload for batches, and what batches bring back."""

    directory: Annotated[LocalPath | None, BlankIsNone] = Field(default=None, json_schema_extra=RESTART)
    """Where they are; null: `files` in the storage directory. Several nodes need one that all of them see."""
    file_bytes: int = Field(default=209_715_200, ge=1024, json_schema_extra=RESTART)
    """One upload."""
    tenant_bytes: int = Field(default=10_737_418_240, ge=1024)
    """All files of a tenant, as stored. Beyond it uploads are refused; what batches bring back is always kept."""
    keep_s: float = Field(default=2_592_000.0, ge=60, le=31_536_000)
    """How long a file is kept if its owner says nothing (`expires_after`)."""


class FileRecord(msgspec.Struct, frozen=True):
    """What is known of a file. Times are wall clock, in whole seconds."""

    id: str
    bytes: int
    created_time: int
    expires_time: int
    filename: str
    purpose: str

    def shown(self) -> dict[str, object]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_time,
            "expires_at": self.expires_time,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Draft:
    """A file that is being written. Ends with `publish` or `abandon`."""

    def __init__(self, folder: Path, file_id: str, bodies: Bodies) -> None:
        self.id = file_id
        self.size_bytes = 0
        self._folder = folder
        self._bodies = bodies
        self._frames = 0
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        # Two writers of one file, one of whom was given up, must not meet.
        self._part = folder / f"{file_id}.{secrets.token_hex(4)}.part"
        with _explained(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = open(os.open(self._part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb")  # noqa: SIM115 - closed by publish and abandon

    def write(self, data: bytes) -> None:
        """Adds to the content. StorageError when the disk does not take it."""
        self.size_bytes += len(data)
        self._held_bytes += len(data)
        self._pieces.append(data)
        if self._held_bytes >= FRAME_BYTES:
            held = b"".join(self._pieces)
            whole = len(held) - len(held) % FRAME_BYTES
            for start in range(0, whole, FRAME_BYTES):
                self._write_frame(held[start : start + FRAME_BYTES])
            self._pieces = [held[whole:]]
            self._held_bytes = len(held) - whole

    def publish(self, filename: str, purpose: str, created_time: float, keep_s: float) -> FileRecord:
        """From now on the file exists, and a power cut does not undo it."""
        if self._held_bytes:
            self._write_frame(b"".join(self._pieces))
        record = FileRecord(
            self.id, self.size_bytes, int(created_time), int(created_time + keep_s), filename, purpose
        )
        with _explained(self._folder):
            _sync(self._file)
            self._file.close()
            self._part.replace(self._folder / f"{self.id}.body")
            with self._part.open("wb") as file:
                file.write(msgspec.json.encode(record))
                _sync(file)
            self._part.replace(self._folder / f"{self.id}.json")
            _sync_folder(self._folder)
        return record

    def abandon(self) -> None:
        self._file.close()
        with contextlib.suppress(OSError):
            self._part.unlink()

    def _write_frame(self, content: bytes) -> None:
        stored = self._bodies.write(content, f"{self.id}/{self._frames}")
        self._frames += 1
        with _explained(self._folder):
            self._file.write(_LENGTH.pack(len(stored)) + stored)


class Shelf:
    """The directory of files. Times are wall clock, seconds."""

    def __init__(self, directory: Path, bodies: Bodies) -> None:
        self._directory = directory
        self._bodies = bodies

    def begin(self, tenant: str, file_id: str) -> Draft:
        """StorageError when there is no writing."""
        return Draft(self._folder(tenant), file_id, self._bodies)

    def find(self, tenant: str, file_id: str, now_time: float) -> FileRecord | None:
        """None: there is none, not for this tenant, or not any more."""
        if not _ID.fullmatch(file_id):
            return None
        try:
            record = msgspec.json.decode(
                (self._folder(tenant) / f"{file_id}.json").read_bytes(), type=FileRecord
            )
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise StorageError(f"The record of {file_id} in {self._directory} cannot be read.") from error
        return record if record.expires_time > now_time else None

    def ids(self, tenant: str) -> list[str]:
        """Oldest first."""
        names: list[str] = []
        with _explained(self._directory), contextlib.suppress(FileNotFoundError):
            names = os.listdir(self._folder(tenant))
        return sorted(name[:-5] for name in names if name.endswith(".json"))

    def stored_bytes(self, tenant: str) -> int:
        """What a tenant's files take on the disk."""
        total = 0
        folder = self._folder(tenant)
        with _explained(folder), contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat().st_size
        return total

    def read(self, tenant: str, record: FileRecord) -> Iterator[bytes]:
        """The content, frame by frame. BodyError when it is not what was written, StorageError when it is gone."""
        size_bytes = frames = 0
        path = self._folder(tenant) / f"{record.id}.body"
        with _explained(path), path.open("rb") as file:
            while head := file.read(_LENGTH.size):
                stored = file.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""
                content = self._bodies.read(stored, f"{record.id}/{frames}")
                frames += 1
                size_bytes += len(content)
                yield content
        if size_bytes != record.bytes:
            raise BodyError(f"The file {record.id} is not whole: restore a backup.")

    def delete(self, tenant: str, file_id: str) -> None:
        """The record first: what cannot be read does not exist."""
        folder = self._folder(tenant)
        with _explained(folder):
            for name in (f"{file_id}.json", f"{file_id}.body"):
                (folder / name).unlink(missing_ok=True)
            if folder.exists():
                _sync_folder(folder)

    def sweep(self, now_time: float) -> int:
        """Deletes what has expired, and what was never finished. How many files that were."""
        swept = 0
        for folder in self._directory.iterdir() if self._directory.exists() else ():
            for path in list(folder.iterdir()) if folder.is_dir() else ():
                with contextlib.suppress(OSError):
                    if self._is_over(path, now_time):
                        path.unlink()
                        swept += path.suffix == ".json"
        return swept

    def _is_over(self, path: Path, now_time: float) -> bool:
        if path.suffix == ".json":
            try:
                record = msgspec.json.decode(path.read_bytes(), type=FileRecord)
            except msgspec.DecodeError:
                return False
            return record.expires_time <= now_time
        is_left_over = path.suffix == ".part" or not path.with_suffix(".json").exists()
        return is_left_over and path.stat().st_mtime < now_time - _LEFT_OVER_S

    def _folder(self, tenant: str) -> Path:
        # A name of its own for every tenant, whatever is in it.
        return self._directory / hashlib.blake2b(tenant.encode(), digest_size=16).hexdigest()


def new_file_id(now_time: float) -> str:
    """Milliseconds, so that names are in the order of time, then 128 random bits."""
    return f"file-{int(now_time * 1000):012x}{secrets.token_hex(16)}"


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"Cannot use {path}: {error.strerror}.") from error

"""Requests in flight, on disk: what a worker that is killed leaves behind, and how its rows are recovered.

Each worker owns one preallocated file of fixed slots, mapped into memory: what is in the map survives the death
of the process (not a power cut) and costs no system call. A slot has two areas, each with length and CRC-32: the
intent, written at dispatch, and the whole row, written at settlement. A slot is given back only after its row
was committed to the ledger. The owner holds the file's lock for life: who gets the lock has found an orphan.
Knows the row's encoding, not how requests run.
"""

import fcntl
import logging
import mmap
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from gateway.ledger_row import DispatchFields, LedgerRow, shortened
from gateway.stores import ledger_table
from gateway.stores.sqlite import DATABASE_NAME, StorageError, database, prepare_directory

NO_SLOT: Final = -1
DIRECTORY_NAME: Final = "inflight"
SLOT_BYTES: Final = 1024
_ROW_AT: Final = 352  # where the row's area begins within its slot
_AREA: Final = struct.Struct("<II")  # length and CRC-32 of what follows; both 0: empty
_EMPTY: Final = _AREA.pack(0, 0)
_INTENT_ROOM: Final = _ROW_AT - _AREA.size
_ROW_ROOM: Final = SLOT_BYTES - _ROW_AT - _AREA.size
_MAGIC: Final = b"headgate slots 1\n"  # fills the first slot's place; the number is the layout's version
_SHORTENED: Final = (64, 20, 5)  # characters per text, tried in turn; with the last any row fits

_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(LedgerRow).decode


class Intents:
    """One worker's slots. `open` and `settle` belong to the loop's thread, `free` to the ledger's writer."""

    def __init__(self, storage: Path, worker: str, *, slots: int = 4096) -> None:
        directory = storage / DIRECTORY_NAME
        prepare_directory(directory)
        self.slots = slots
        self.missed = 0  # requests sent without an intent: a kill may lose their rows
        size = (slots + 1) * SLOT_BYTES
        self.path, self._descriptor = _create_locked(directory, worker)
        try:
            # Real blocks now: a map over a hole would be a SIGBUS on a full disk.
            os.posix_fallocate(self._descriptor, 0, size)
            self._map = mmap.mmap(self._descriptor, size)
        except OSError as error:
            self.path.unlink()
            os.close(self._descriptor)
            raise StorageError(
                f"Cannot reserve {size // 1024} KiB in {directory} for requests in flight: {error.strerror}. "
                "Free some space, or choose another `storage.directory`."
            ) from error
        self._map[: len(_MAGIC)] = _MAGIC
        # A stack, so that few pages are ever touched; append, pop and extend are atomic.
        self._free = list(range(slots * SLOT_BYTES, 0, -SLOT_BYTES))

    @property
    def in_use(self) -> int:
        return self.slots - len(self._free)

    def open(self, fields: DispatchFields) -> int:
        """Writes the intent of a request about to be sent; its slot, or NO_SLOT when all are taken."""
        data = _encode(fields)
        if len(data) > _INTENT_ROOM:
            data = _cut(fields, _INTENT_ROOM)
        try:
            slot = self._free.pop()
        except IndexError:
            self.missed += 1
            return NO_SLOT
        self._map[slot : slot + _AREA.size + len(data)] = _AREA.pack(len(data), zlib.crc32(data)) + data
        return slot

    def settle(self, slot: int, row: LedgerRow) -> int:
        """Writes the finished row beside its intent; for a request that never had one, to a slot of its own."""
        data = _encode(row)
        if len(data) > _ROW_ROOM:
            data = _cut(row, _ROW_ROOM)
        if slot == NO_SLOT:
            try:
                slot = self._free.pop()
            except IndexError:
                return NO_SLOT
        at = slot + _ROW_AT
        self._map[at : at + _AREA.size + len(data)] = _AREA.pack(len(data), zlib.crc32(data)) + data
        return slot

    def free(self, slots: Iterable[int]) -> None:
        """Gives back the slots of rows that are committed, and of those only."""
        for slot in slots:
            self._map[slot : slot + _AREA.size] = _EMPTY
            self._map[slot + _ROW_AT : slot + _ROW_AT + _AREA.size] = _EMPTY
            self._free.append(slot)

    def close(self) -> None:
        """Removes the file; with slots still in use it stays, for `recover_orphans`."""
        if not self.in_use:
            self.path.unlink(missing_ok=True)
        self._map.close()
        os.close(self._descriptor)


def _cut(record: DispatchFields | LedgerRow, room_bytes: int) -> bytes:
    """The record encoded without its tags and with its texts cut, so that it fits."""
    fields: tuple[Any, ...] = msgspec.structs.astuple(record) if isinstance(record, LedgerRow) else record
    for longest in _SHORTENED:
        data = _encode(shortened(fields, longest))
        if len(data) <= room_bytes:
            return data
    return b""  # a request id beyond all bounds: an empty area is no record


def _create_locked(directory: Path, worker: str) -> tuple[Path, int]:
    name = "".join(c if c.isalnum() else "_" for c in worker)[:40]
    while True:
        path = directory / f"{name}-{os.getpid()}-{secrets.token_hex(4)}.slots"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"Cannot write in {directory}: {error.strerror}.") from error
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Somebody recovering orphans may have had the lock first, and removed the empty file.
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)


def recover_orphans(storage: Path) -> int:
    """Enters into the ledger what dead workers left, and removes their files; returns how many rows that were.

    A settled request gets its row, one that was under way a row that says `interrupted`; a row that is there
    already stays as it is. StorageError when that cannot be done now: then the files stay too.
    """
    recovered = 0
    for path in sorted((storage / DIRECTORY_NAME).glob("*.slots")):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                recovered += _recover(storage, path, descriptor)
            finally:
                os.close(descriptor)
        except (FileNotFoundError, BlockingIOError):
            continue  # its owner lives, or somebody recovering beside us was first
        except OSError as error:
            raise StorageError(f"Cannot recover the rows in {path}: {error.strerror}.") from error
    return recovered


def _recover(storage: Path, path: Path, descriptor: int) -> int:
    content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    if not content.startswith(_MAGIC) and any(content):
        damaged = path.with_suffix(".damaged")
        path.rename(damaged)
        _log.error("in-flight file cannot be read and was set aside as %s", damaged.name)
        return 0
    # Settled rows first: of two rows with one request id the table keeps the one that came first.
    rows = [*_areas(content, _ROW_AT, _ROW_ROOM), *_areas(content, 0, _INTENT_ROOM)]
    added = 0
    if rows:
        with database(storage / DATABASE_NAME, is_full_sync=True) as connection:
            added, refused = ledger_table.insert_possible(connection, rows)
        for row, reason in refused:
            _log.error("recovered row of request %s was refused: %s", row.request_id, reason)
    path.unlink(missing_ok=True)
    return added


def _areas(content: bytes, offset: int, room_bytes: int) -> Iterator[LedgerRow]:
    """The records in one of a slot's two areas, over all slots; torn ones are left out."""
    for at in range(SLOT_BYTES + offset, len(content) - room_bytes - _AREA.size + 1, SLOT_BYTES):
        length, checksum = _AREA.unpack_from(content, at)
        data = content[at + _AREA.size : at + _AREA.size + length]
        if not 0 < length <= room_bytes or zlib.crc32(data) != checksum:
            continue
        try:
            yield _decode(data)
        except msgspec.MsgspecError:
            _log.exception("a record in an in-flight file cannot be read")

"""Opening the SQLite database: version floor, pragmas, permissions, schema steps.

Every connection of Headgate is made here, and outside of `gateway.stores` its errors are StorageErrors. Refuses
to know what the tables mean. Invariants: nobody but the owner may read the file (0600), and a database is never
used with a schema this version does not know.
"""

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import apsw

from gateway.stores.schema import STEPS

Connection = apsw.Connection

DATABASE_NAME: Final = "headgate.db"
# Below it two connections that checkpoint one WAL file can corrupt it (sqlite.org/wal.html, "WAL-reset bug").
VERSION_FLOOR: Final = (3, 51, 3)
_BUSY_TIMEOUT_MS: Final = 5000
_BUSY_POLL_S: Final = 0.01
_WAL_LIMIT_BYTES: Final = 64 * 1024 * 1024


class StorageError(Exception):
    """The storage cannot be used; the message says what to change."""


def check_version(version: str | None = None) -> None:
    """StorageError when the SQLite inside apsw is older than the floor."""
    version = version or apsw.sqlite_lib_version()
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < VERSION_FLOOR:
        floor = ".".join(map(str, VERSION_FLOOR))
        raise StorageError(f"SQLite {version} can corrupt its log; {floor} or newer is needed: upgrade apsw.")


def prepare_directory(directory: Path) -> None:
    """Makes the storage directory, for its owner only."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"Cannot make the storage directory {directory}: {error.strerror}. Choose another `storage.directory`."
        ) from error


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors inside become a StorageError with a sentence."""
    try:
        yield
    except apsw.Error as error:
        raise StorageError(_explain(path, error)) from error


@contextmanager
def database(path: Path, *, is_full_sync: bool = False, may_write: bool = True) -> Iterator[Connection]:
    """`open_database` for a while; SQLite's errors in the meantime become StorageErrors."""
    connection = open_database(path, is_full_sync=is_full_sync, may_write=may_write)
    try:
        with explained(path):
            yield connection
    finally:
        connection.close()


def open_database(
    path: Path, *, is_full_sync: bool = False, may_write: bool = True, steps: Sequence[str] = STEPS
) -> Connection:
    """A connection with the current schema; StorageError with a sentence when there can be none.

    `is_full_sync` makes each commit survive a power cut; without it the last few may be lost then, never on
    the death of a process. With `may_write` False the file must exist, and changing statements are refused.
    """
    check_version()
    if may_write:
        prepare_directory(path.parent)
        _create_private(path)
    else:
        _find(path)
    with explained(path):
        connection = Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            _configure(connection, is_full_sync=is_full_sync)
            _migrate(connection, steps)
            if not may_write:
                connection.execute("PRAGMA query_only = ON")
        except BaseException:
            connection.close()
            raise
    return connection


def _create_private(path: Path) -> None:
    # SQLite gives its -wal and -shm files the permissions of the database.
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StorageError(f"Cannot write the database {path}: {error.strerror}.") from error


def _find(path: Path) -> None:
    try:
        path.stat()
    except FileNotFoundError as error:
        raise StorageError(
            f"There is no database at {path}: start the gateway once, or name its directory."
        ) from error
    except OSError as error:
        raise StorageError(f"Cannot read the database {path}: {error.strerror}.") from error


def _configure(connection: Connection, *, is_full_sync: bool) -> None:
    connection.set_busy_timeout(_BUSY_TIMEOUT_MS)
    if _begin_log(connection) != "wal":
        raise StorageError(
            f"The file system of {connection.filename} cannot hold a write-ahead log (a network share?): "
            "put `storage.directory` on a local disk."
        )
    connection.pragma("synchronous", "FULL" if is_full_sync else "NORMAL")
    connection.pragma("journal_size_limit", _WAL_LIMIT_BYTES)
    connection.pragma("foreign_keys", True)
    connection.pragma("trusted_schema", False)
    # Without it INSERT OR REPLACE would get past the triggers that refuse DELETE.
    connection.pragma("recursive_triggers", True)


def _begin_log(connection: Connection) -> object:
    """The journal mode. Of several that make the same new file at once, SQLite tells all but one "busy" without waiting."""
    deadline_at = time.monotonic() + _BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            return connection.pragma("journal_mode", "wal")
        except apsw.BusyError:
            if time.monotonic() >= deadline_at:
                raise
            time.sleep(_BUSY_POLL_S)


def _migrate(connection: Connection, steps: Sequence[str]) -> None:
    if connection.pragma("user_version") == len(steps):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = connection.pragma("user_version")  # again: another process may have been first
        _refuse_newer(connection, version, len(steps))
        for step in steps[version:]:
            connection.execute(step)
        connection.pragma("user_version", len(steps))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _refuse_newer(connection: Connection, version: int, known: int) -> None:
    if version > known:
        raise StorageError(
            f"{connection.filename} was written by a newer Headgate (schema {version}, this one knows "
            f"{known}): upgrade, or restore a backup."
        )


def _explain(path: Path, error: apsw.Error) -> str:
    if isinstance(error, apsw.NotADBError):
        return f"{path} is not a SQLite database: move it away, or choose another `storage.directory`."
    if isinstance(error, apsw.CorruptError):
        return f"{path} is damaged ({error}): restore a backup."
    if isinstance(error, apsw.BusyError):
        return (
            f"{path} is locked by another program (waited {_BUSY_TIMEOUT_MS // 1000} s): close it and retry."
        )
    if isinstance(error, apsw.FullError):
        return f"No space left for {path}: free some, or choose another `storage.directory`."
    if isinstance(error, apsw.ReadOnlyError):
        return f"{path} is read-only: give the gateway's user write access."
    return f"The database {path} cannot be used: {error}."

"""Whose the storage directory is: one service's at a time.

Two of them would take each other's jobs, and a file is no place to argue about it. The kernel's lock is the parent's
alone: it ends with that process however it ends, so nothing is ever left to be removed by hand, and workers that
outlive a killed parent hold nobody up. Refuses to know what is stored.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gateway.stores.sqlite import StorageError, prepare_directory

LOCK_NAME: Final = "lock"


@contextlib.contextmanager
def storage_lock(directory: Path) -> Iterator[None]:
    """The directory is ours inside. StorageError when it is another's, or cannot be written."""
    prepare_directory(directory)
    try:
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(
            f"Cannot write in the storage directory {directory}: {error.strerror}. "
            "Choose another `storage.directory`."
        ) from error
    try:
        _lock(descriptor, directory)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(
            f"Another Headgate uses the storage directory {directory}, or is still draining: "
            "stop it, or give each its own `storage.directory`."
        ) from None
    except OSError as error:
        raise StorageError(
            f"The storage directory {directory} cannot be locked ({error.strerror}): it must be on a local disk."
        ) from error

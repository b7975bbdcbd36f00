"""Where engines' Unix sockets are.

Owns the choice of a path that is short enough for one, and that nobody else can have put there: what engines say on
these sockets are the tokens of prompts.
"""

import contextlib
import hashlib
import stat
import tempfile
from os import geteuid
from pathlib import Path
from typing import Final

from local_engine.plan import PlanError

# Of the 107 bytes that a socket's path may have (sun_path of unix(7)), the rest is for a pool's longest name.
_MOST_BYTES: Final = 40


def run_directory(storage: Path) -> Path:
    """In the data directory, or, if its path is too long, one of its own beside other programs'."""
    found = storage.absolute() / "run"
    if len(str(found)) <= _MOST_BYTES:
        return found
    digest = hashlib.sha256(str(found).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"headgate-{digest}"


def make(directory: Path) -> None:
    """For its owner alone. PlanError when it is somebody else's."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != geteuid() or found.st_mode & 0o077:
        raise PlanError(
            f"{directory}, where engines' sockets go, is not this user's alone: remove it, or choose a shorter "
            "storage.directory, which then holds it"
        )


def leave(directory: Path) -> None:
    """Removed when it is empty: engines that still run have sockets in it."""
    with contextlib.suppress(OSError):
        directory.rmdir()

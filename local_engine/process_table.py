"""What the kernel says of processes: who they are, which are of a group, which shared memory they hold.

A pid alone names nobody for long, so a process is a pid and its start. Linux only; elsewhere nothing is found, and
callers do without. Refuses to know engines.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_PROC: Final = Path("/proc")
_SHM: Final = "/dev/shm/"  # noqa: S108 - looked at, not made
_STATE, _GROUP, _STARTED = 0, 2, 19  # fields of /proc/PID/stat behind the name


class ProcessId(NamedTuple):
    """`started` is in clock ticks since the boot."""

    pid: int
    started: int

    def is_alive(self) -> bool:
        """Whether it, and no later one of the same pid, is there and not a zombie."""
        fields = _stat(self.pid)
        return fields is not None and fields[_STATE] != "Z" and int(fields[_STARTED]) == self.started


def identify(pid: int) -> ProcessId | None:
    """None: there is no such process."""
    fields = _stat(pid)
    return None if fields is None else ProcessId(pid, int(fields[_STARTED]))


def boot_id() -> str:
    """Another after every boot; empty where the kernel does not say."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def group_members(group: int) -> list[ProcessId]:
    """Living processes of a process group."""
    found = []
    for pid in _pids():
        fields = _stat(pid)
        if fields is not None and int(fields[_GROUP]) == group and fields[_STATE] != "Z":
            found.append(ProcessId(pid, int(fields[_STARTED])))
    return found


def shared_memory(pids: list[int]) -> set[str]:
    """Names under /dev/shm of files that any of these has mapped or open, as they are now."""
    inodes = {inode for pid in pids for inode in _shared_inodes_of(pid)}
    if not inodes:
        return set()
    try:
        with os.scandir(_SHM) as entries:
            return {entry.name for entry in entries if entry.inode() in inodes}
    except OSError:
        return set()


def remove_unused(names: set[str]) -> list[str]:
    """Unlinks those of our own files of these names under /dev/shm that no process has any more; returns which."""
    present = {name for name in names if _is_own_file(name)}
    if not present:
        return []
    removed = []
    for name in sorted(present - shared_memory(list(_pids()))):
        try:
            os.unlink(f"{_SHM}{name}")
        except OSError:
            continue
        removed.append(name)
    return removed


def remove_socket(path: Path) -> None:
    """Unlinks a Unix socket, and nothing that is anything else."""
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    except OSError:
        pass  # it is not there, or not ours


def _stat(pid: int) -> list[str] | None:
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _pids() -> Iterator[int]:
    try:
        names = os.listdir(_PROC)
    except OSError:
        return
    yield from (int(name) for name in names if name.isdecimal())


def _shared_inodes_of(pid: int) -> set[int]:
    """The kernel shows the name that a file had first: a semaphore's real one was given to it later, by a link."""
    directory = _PROC / str(pid)
    found = set()
    try:
        for line in (directory / "maps").read_text(errors="replace").splitlines():
            fields = line.split(None, 5)
            if len(fields) == 6 and fields[5].startswith(_SHM):
                found.add(int(fields[4]))
        for name in os.listdir(directory / "fd"):
            descriptor = directory / "fd" / name
            if os.readlink(descriptor).startswith(_SHM):
                found.add(descriptor.stat().st_ino)
    except OSError:
        pass  # it has gone, or is somebody else's
    return found


def _is_own_file(name: str) -> bool:
    """A plain name, of a plain file of ours: a record leads nowhere else."""
    if "/" in name or name in ("", ".", ".."):
        return False
    try:
        found = os.lstat(f"{_SHM}{name}")
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()

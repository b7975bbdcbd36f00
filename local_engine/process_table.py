"""What the kernel says of processes: who they are, which are of a group, which shared memory they hold.

A pid alone names nobody for long, so a process is a pid and its start. Linux only; elsewhere nothing is found, and
callers do without. Refuses to know engines.
"""

import os
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
    """Files under /dev/shm that any of these has mapped or open."""
    return {path for pid in pids for path in _shared_memory_of(pid)}


def remove_unused(paths: set[str]) -> list[str]:
    """Unlinks those of our own files under /dev/shm that no process has any more; returns which."""
    present = {path for path in paths if path.startswith(_SHM) and _is_ours(path)}
    if not present:
        return []
    unused = sorted(present - shared_memory(list(_pids())))
    removed = []
    for path in unused:
        try:
            os.unlink(path)
        except OSError:
            continue
        removed.append(path)
    return removed


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


def _shared_memory_of(pid: int) -> set[str]:
    directory = _PROC / str(pid)
    found = set()
    try:
        for line in (directory / "maps").read_text(errors="replace").splitlines():
            path = line.partition("/")[1:]
            found.add("".join(path).removesuffix(" (deleted)"))
        for descriptor in os.listdir(directory / "fd"):
            found.add(os.readlink(directory / "fd" / descriptor).removesuffix(" (deleted)"))
    except OSError:
        pass  # it has gone, or is somebody else's
    return {path for path in found if path.startswith(_SHM)}


def _is_ours(path: str) -> bool:
    try:
        return os.lstat(path).st_uid == os.getuid()
    except OSError:
        return False

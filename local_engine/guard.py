"""Runs an engine, keeps its log, and ends it when nobody looks after it any more: `python guard.py ... -- COMMAND`.

An engine's own processes outlive each other (vLLM's computes on when the one that speaks HTTP is killed), and a gateway
that is killed can end nothing. The guard leads the engine's process group and outlives the gateway: it waits for one that
takes over (whose pid is in the owner file) for a while, so that a restarted gateway finds its models loaded, then ends
the group. The engine's main process dies with the guard (Linux). Run as a file, not imported, so that it starts without
the package and stays small.

Owns log rotation: `LOG`, `LOG.1` ... the highest number being the oldest; every start begins a new `LOG`. SIGTERM is
passed on to the engine's main process only: what that does with its own is its business.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

_PR_SET_PDEATHSIG: Final = 1
_CHECK_S: Final = 1.0
_TERM_S: Final = 10.0
_LAST_WORDS_S: Final = 1.0  # others may hold the log's pipe open when the main process is gone
_STARTED_FIELD: Final = 19  # of /proc/PID/stat, counted behind the name


class Log:
    """Output into files of at most `max_bytes`, the newest `keep` of which stay beside the current one."""

    def __init__(self, path: Path, max_bytes: int, keep: int) -> None:
        self._path, self._max_bytes, self._keep = path, max_bytes, keep
        self._file: BinaryIO | None = None
        self._rotate()

    def write(self, data: bytes) -> None:
        """A full disk loses lines, not the engine."""
        with contextlib.suppress(OSError):
            while data:
                room = self._max_bytes - (self._file.tell() if self._file is not None else self._max_bytes)
                if len(data) > room and b"\n" not in data[:room]:
                    self._rotate()
                    room = self._max_bytes
                if self._file is None:
                    return
                # Files begin with whole lines where lines are of a sane length.
                end = len(data) if len(data) <= room else data.rfind(b"\n", 0, room) + 1 or room
                self._file.write(data[:end])
                data = data[end:]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _rotate(self) -> None:
        self.close()
        with contextlib.suppress(OSError):
            names = [self._path, *(Path(f"{self._path}.{n}") for n in range(1, self._keep + 1))]
            for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
                if newer.exists():
                    newer.replace(older)
            self._file = self._path.open("wb", buffering=0)


class Guard:
    """One engine, from its start to its end."""

    def __init__(
        self, owner: Path, grace_s: float, log: Log, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._owner, self._grace_s, self._log, self._clock = owner, grace_s, log, clock
        self._orphaned_at: float | None = None
        self._signals = -1  # readable after a signal

    def run(self, command: list[str]) -> int:
        """The exit code of the engine's main process; 128 + n if signal n ended it, 127 if it cannot be started."""
        reading, writing = os.pipe()
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                preexec_fn=_die_with_parent(os.getpid()),  # noqa: PLW1509 - there are no threads here
            )
        except OSError as error:
            self._log.write(f"cannot start {command[0]}: {error.strerror}\n".encode())
            return 127
        os.close(writing)
        signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
        self._hear_signals()
        while child.poll() is None:
            self._copy(reading, _CHECK_S)
            if self.is_abandoned():
                self._end(child, reading)
        deadline_at = self._clock() + _LAST_WORDS_S
        while self._clock() < deadline_at and self._copy(reading, 0.05):
            pass
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def _hear_signals(self) -> None:
        """So that the child's end is seen at once, though others hold the log's pipe open."""
        self._signals, told = os.pipe()
        for descriptor in (self._signals, told):
            os.set_blocking(descriptor, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def is_abandoned(self) -> bool:
        """Whether no gateway has been there for as long as one may be away."""
        if _owner_lives(self._owner):
            self._orphaned_at = None
            return False
        if self._orphaned_at is None:
            self._orphaned_at = self._clock()
        return self._clock() - self._orphaned_at > self._grace_s

    def _end(self, child: "subprocess.Popen[bytes]", reading: int) -> None:
        self._log.write(b"no gateway has come to look after this engine: it ends\n")
        child.send_signal(signal.SIGTERM)
        deadline_at = self._clock() + _TERM_S
        while child.poll() is None and self._clock() < deadline_at:
            self._copy(reading, 0.2)
        os.killpg(0, signal.SIGKILL)  # ourselves as well: there is nobody to tell an exit code

    def _copy(self, reading: int, timeout_s: float) -> bool:
        """What there is of the log; False if nothing came."""
        ready, _, _ = select.select([reading, self._signals], [], [], timeout_s)
        if self._signals in ready:
            os.read(self._signals, 512)
        if reading not in ready:
            return False
        data = os.read(reading, 65536)
        if not data:
            time.sleep(0.05)  # closed by the engine, which goes on, or is about to end
        self._log.write(data)
        return bool(data)


def _owner_lives(owner: Path) -> bool:
    """Whether the process that the file names (pid and start time in clock ticks) is there."""
    try:
        pid, started = owner.read_text().split()[:2]
        if sys.platform != "linux":
            os.kill(int(pid), 0)
            return True
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0] != "Z" and fields[_STARTED_FIELD] == started
    except (OSError, ValueError, IndexError):
        return False


def _die_with_parent(guard: int) -> Callable[[], None]:
    def ask() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guard:
                os._exit(1)

    return ask


def main(argv: list[str]) -> int:
    """`argv`: owner file, grace in seconds, log, its largest size, how many are kept, `--`, the command."""
    owner, grace_s, log, max_bytes, keep = argv[1:6]
    guard = Guard(Path(owner), float(grace_s), Log(Path(log), int(max_bytes), int(keep)))
    return guard.run(argv[7:])


if __name__ == "__main__":
    sys.exit(main(sys.argv))

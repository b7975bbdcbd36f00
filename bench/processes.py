"""Processes on chosen cores, and what they cost: CPU time to the nanosecond, resident memory.

CPU time comes from the kernel's per-process CPU clock, which counts every thread, ended ones too. A process that ends takes its
figure along, so callers compare `pids()` before and after a run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

CPU_CLOCK = 2  # CPUCLOCK_SCHED in the kernel's encoding of a process's clock id


def cores() -> tuple[int, int]:
    """(the target's core, the core of the mock and the load); the same one on a machine with a single core."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[1] if len(allowed) > 1 else allowed[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    command: Sequence[str],
    core: int,
    *,
    log: IO[bytes] | int,
    env: Mapping[str, str] | None = None,
    stdout: IO[bytes] | int | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a pinned process in its own session; its children inherit the core."""
    return subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=log if stdout is None else stdout,
        stderr=log,
        env={**os.environ, **(env or {})},
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # noqa: PLW1509  # the bench has no threads
    )


def stop(process: subprocess.Popen[bytes], patience_s: float = 8.0) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Every living child, grandchild, ... of a process, in order of pid."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return sorted(found)


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds used so far by these processes; ended ones count as nothing."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~pid << 3) | CPU_CLOCK)
    return total


def wait_idle(pids: Sequence[int], patience_s: float = 20.0) -> None:
    """Until these processes use less than a tenth of a core: a saturated one still works on what nobody waits for."""
    give_up_at = time.monotonic() + patience_s
    while time.monotonic() < give_up_at:
        used_s = cpu_s(pids)
        time.sleep(0.1)
        if cpu_s(pids) - used_s < 0.01:
            return


def rss_mb(pids: Iterable[int]) -> float:
    """Resident megabytes of the largest of these processes."""
    largest = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    largest = max(largest, int(line.split()[1]))
    return largest / 1024


def machine_busy_s() -> float:
    """CPU seconds used by everything on the machine since it started."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

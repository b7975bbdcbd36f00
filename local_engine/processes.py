"""Child processes that are kept running: started, waited for, restarted when they die, ended by group.

Owns the life of a process and its port. Refuses to know what runs in it. Every child leads its own process group,
so that what it started ends with it, and is on a leash: it cannot outlive its parent.
"""

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)

_LEASH: Final = str(Path(__file__).with_name("leash.py"))
# Below the range the kernel takes outgoing ports from, so that no connection of ours sits on a child's port when
# the child is restarted.
PORTS: Final = range(18000, 28000)
_READY_POLL_S: Final = 0.05


class StartError(Exception):
    """A child did not become ready; the message says why."""


class Backoff:
    """How long to wait before the next start: nothing for the first `free` deaths within `window_s`, then 1, 2, 4 ... `max_s`."""

    def __init__(self, free: int = 5, window_s: float = 30.0, max_s: float = 30.0) -> None:
        self._free = free
        self._window_s = window_s
        self._max_s = max_s
        self._deaths: list[float] = []
        self._delay_s = 0.0

    def died(self, now: float) -> float:
        """Seconds to wait, given that a process died at `now` (monotonic)."""
        if self._deaths and now - self._deaths[-1] > self._window_s + self._delay_s:
            self._delay_s = 0.0  # the last one lived well
        self._deaths = [at for at in self._deaths if now - at <= self._window_s + self._delay_s]
        self._deaths.append(now)
        if len(self._deaths) <= self._free:
            self._delay_s = 0.0
        else:
            self._delay_s = min(max(1.0, self._delay_s * 2), self._max_s)
        return self._delay_s


class Child:
    """One process, restarted until `stop`. `on_restart` is told of every death that was not asked for."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        is_ready: Callable[[], Awaitable[bool]],
        on_restart: Callable[[str], None] = lambda name: None,  # noqa: ARG005 - nobody to tell
    ) -> None:
        self.name = name
        self.restarts = 0
        self._command = [sys.executable, "-I", "-S", _LEASH, str(os.getpid()), *command]
        self._is_ready = is_ready
        self._on_restart = on_restart
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._backoff = Backoff()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self, timeout_s: float = 30.0) -> None:
        """Returns when the child is ready. StartError if it ends before that or takes longer."""
        self._process = await self._spawn()
        deadline_at = time.monotonic() + timeout_s
        while not await self._is_ready():
            if self._process.returncode is not None:
                raise StartError(
                    f"{self.name} ended with code {self._process.returncode} before it was ready"
                )
            if time.monotonic() > deadline_at:
                await self.stop(grace_s=1.0)
                raise StartError(f"{self.name} was not ready after {timeout_s:g} s")
            await asyncio.sleep(_READY_POLL_S)
        self._keeper = asyncio.create_task(self._keep(self._process), name=f"keep {self.name}")

    async def stop(self, grace_s: float = 5.0) -> None:
        """End the whole process group: SIGTERM, then SIGKILL after `grace_s`."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            _signal_group(process.pid, signal.SIGTERM)
            ended = asyncio.ensure_future(process.wait())
            await asyncio.wait({ended}, timeout=grace_s)
            if not ended.done():
                _signal_group(process.pid, signal.SIGKILL)
            await ended
        # What the child itself had started may still be there.
        _signal_group(process.pid, signal.SIGKILL)

    async def _spawn(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,  # ours is for people; what matters goes to standard error
            start_new_session=True,
        )

    async def _keep(self, process: asyncio.subprocess.Process) -> None:
        while True:
            code = await process.wait()
            self.restarts += 1
            self._on_restart(self.name)
            delay_s = self._backoff.died(time.monotonic())
            _log.warning(
                "a child process ended by itself and is started again",
                extra={"child": self.name, "exit_code": code, "delay_s": delay_s},
            )
            _signal_group(process.pid, signal.SIGKILL)
            await asyncio.sleep(delay_s)
            process = self._process = await self._spawn_again()

    async def _spawn_again(self) -> asyncio.subprocess.Process:
        while True:
            try:
                return await self._spawn()
            except OSError as error:
                # No memory, no process slot: it passes, and giving up would leave the pool without this engine.
                _log.warning("a child process cannot be started", exc_info=error, extra={"child": self.name})
                await asyncio.sleep(5.0)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports that nobody listens on now. StartError when there are not so many."""
    found: list[int] = []
    with contextlib.ExitStack() as probes:
        for port in random.sample(PORTS, len(PORTS)):
            if len(found) == count:
                return found
            probe = probes.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind((host, port))
                found.append(port)
    raise StartError(f"no {count} free ports on {host} between {PORTS.start} and {PORTS.stop}")


async def answers_ok(host: str, port: int, path: str, timeout_s: float = 2.0) -> bool:
    """Whether `GET path` is answered with 200: the readiness of anything that speaks HTTP."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
                status_line = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status_line.split(b" ")[1:2] == [b"200"]

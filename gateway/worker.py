"""The main of a worker process: one event loop, one application, the shared listening socket.

Owns the order of start and end, and the worker's side of the control channel. Refuses to know what the
application does. A worker ends when it is told to, or when its parent is gone: its loop sees the channel close and
drains; should the loop hang, a thread sees it too and leaves without it.
"""

import asyncio
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

import uvloop

from gateway.acceptor import Acceptor, Loads
from gateway.config import Config
from gateway.control import (
    BlocksHeld,
    Channel,
    Configure,
    CountInFlight,
    Drain,
    Drained,
    Draw,
    EndpointState,
    Failed,
    Heartbeat,
    InFlight,
    Membership,
    Metrics,
    OfEndpoint,
    Probed,
    Ready,
    Reload,
    Reloaded,
    Report,
    Scraped,
    Told,
    ToWorker,
    open_channel,
)
from gateway.logs import AccessLog, Logs, start_logging, watch_loop
from gateway.placed import PlacedConfig
from gateway.stores.sqlite import StorageError
from gateway.telemetry import Telemetry

# Without a parent there is nobody to report to and nobody who restarts us: leave soon.
ORPHAN_DRAIN_S: Final = 10.0
ORPHAN_LIMIT_S: Final = 30.0
_ACCEPTED_S: Final = 0.25
# A kept connection that is closed just as its client sends the next request loses that. With a successor there is no hurry.
_KEPT_S: Final = 2.0
_KEPT_POLL_S: Final = 0.05
_TICK_S: Final = 0.25
_HEARTBEAT_S: Final = 1.0
_REPORT_S: Final = 5.0

_log = logging.getLogger(__name__)


class Application(Protocol):
    """What a worker runs."""

    @property
    def server(self) -> Callable[[], asyncio.Protocol]:
        """Makes the protocol of one accepted connection."""

    @property
    def open_connections(self) -> int: ...

    def attach(self, tell: Callable[[Told], None]) -> None:
        """Before `start`: how the parent hears what is thought of an endpoint, and what is wanted."""

    def hear(self, word: OfEndpoint) -> None:
        """What the parent knows of an endpoint."""

    def in_flight(self, endpoints: list[str]) -> int:
        """Requests at endpoints of these names."""

    async def start(self) -> None: ...

    def reload(self, config: Config) -> None:
        """Swap the configuration, whole or not at all."""

    def draw(self, *, is_on: bool) -> None:
        """Whether jobs of the queue are to be claimed from now on."""

    def unready(self) -> None:
        """From now on `/readyz` says no; requests are served as before."""

    def announce_drain(self) -> None:
        """From now on each answer ends its connection."""

    async def drain(self, timeout_s: float) -> int:
        """No connection is kept after its answer; what is open may end within `timeout_s`, then it is cut.

        Returns how many requests were cut; all are settled then. May be called again with a shorter timeout
        after the first call was cancelled.
        """

    async def stop(self) -> None:
        """Writes what is to be written, closes what is open."""


Build = Callable[[Config, str, Telemetry, AccessLog], Application]


class StartError(Exception):
    """The application cannot start; the message is a sentence for the operator."""


class Worker:
    """From the first message of the parent to the exit."""

    def __init__(self, name: str, listener: socket.socket, loads: Loads, place: int, build: Build) -> None:
        self._name = name
        self._loads = loads
        self._place = place
        self._listener = listener
        self._build = build
        self._telemetry = Telemetry()
        self._application: Application | None = None
        self._channel: Channel | None = None
        self._acceptor: Acceptor | None = None
        self._drain_timeout_s = ORPHAN_DRAIN_S
        self._configured: asyncio.Future[Config] = asyncio.get_running_loop().create_future()
        self._drain_order: asyncio.Queue[Drain] = asyncio.Queue()
        self._ticked_at = 0.0
        self._worst_lag_s = 0.0
        self._reported_at = 0.0
        self._heartbeat_at = 0.0

    async def run(self, control: socket.socket) -> int:
        """The process's exit code."""
        self._channel = await open_channel(control, ToWorker, self._hear, self._orphaned)
        config = await self._configured
        settings = config.logging
        logs = start_logging(settings.level, settings.format, source=self._name, has_access=settings.access)
        loop = asyncio.get_running_loop()
        watch_loop(loop)
        loop.add_signal_handler(signal.SIGTERM, self._terminated)
        self._watch_process(logs)
        try:
            application = await self._start(config, logs)
        except StartError as error:
            self._channel.send(Failed(str(error)))
            self._channel.close()
            logs.close()
            return 1
        self._tick(loop)
        self._channel.send(Ready())
        cut = await self._drained(application)
        await application.stop()
        self._channel.send(Metrics(self._telemetry.snapshot()))
        self._channel.send(Drained(cut))
        self._channel.close()
        logs.close()
        return 0

    async def _start(self, config: Config, logs: Logs) -> Application:
        self._drain_timeout_s = config.server.drain_timeout_s
        try:
            application = self._build(config, self._name, self._telemetry, logs.access)
            application.attach(self._send)
            await application.start()
        except (OSError, ValueError, StorageError) as error:
            raise StartError(str(error)) from error
        except Exception as bug:
            _log.exception("the application cannot start")
            raise StartError(f"a bug, {type(bug).__name__}: the worker's log says where") from bug
        self._application = application
        self._acceptor = Acceptor(
            self._listener, application.server, lambda: application.open_connections, self._loads, self._place
        )
        _settle_memory()
        return application

    def _hear(self, message: ToWorker) -> None:
        match message:
            case Configure():
                self._configured.set_result(PlacedConfig.from_json(message.config))
            case Reload():
                self._reload(message)
            case Drain():
                self._drain_order.put_nowait(message)
            case Report():
                self._report(message.number)
            case CountInFlight():
                self._count(message)
            case Draw() if self._application is not None:
                self._application.draw(is_on=message.is_on)
            case EndpointState() | Probed() | Scraped() | Membership() | BlocksHeld() if (
                self._application is not None
            ):
                self._application.hear(message)

    def _count(self, question: CountInFlight) -> None:
        assert self._channel is not None
        application = self._application
        requests = application.in_flight(question.endpoints) if application is not None else 0
        self._channel.send(InFlight(question.number, requests))

    def _send(self, word: Told) -> None:
        assert self._channel is not None
        self._channel.send(word)

    def _reload(self, message: Reload) -> None:
        assert self._channel is not None
        error = "it is still starting"
        if self._application is not None:
            try:
                config = PlacedConfig.from_json(message.config)
                self._application.reload(config)
                self._drain_timeout_s = config.server.drain_timeout_s
                error = ""
            except Exception as bug:  # noqa: BLE001 - nothing in a configuration may end a worker that serves
                # The parent had validated it: that it cannot be built is a bug, and the old one still serves.
                _log.exception("a configuration could not be applied")
                error = type(bug).__name__
        self._channel.send(Reloaded(message.number, error))
        _settle_memory()

    async def _drained(self, application: Application) -> int:
        """Waits for the order to end, and carries out the latest one. Returns how many requests were cut."""
        order = await self._drain_order.get()
        while True:
            drain = asyncio.ensure_future(self._drain(application, order))
            another = asyncio.ensure_future(self._drain_order.get())
            await asyncio.wait({drain, another}, return_when=asyncio.FIRST_COMPLETED)
            if drain.done():
                another.cancel()
                return drain.result()
            drain.cancel()
            await asyncio.wait({drain})
            order = another.result()

    async def _drain(self, application: Application, order: Drain) -> int:
        if order.is_shutdown:
            application.unready()
        if order.pre_stop_s:
            await asyncio.sleep(order.pre_stop_s)
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
            # Connections accepted a moment ago have their first request on the way: it is to be answered. So is the
            # next one of a kept connection that is in use: closed under it, it would be lost.
            application.announce_drain()
            await asyncio.sleep(min(_ACCEPTED_S, order.timeout_s))
            if not order.is_shutdown:
                await _until_unused(application, min(_KEPT_S, order.timeout_s))
        return await application.drain(order.timeout_s)

    def _terminated(self) -> None:
        # Not by our parent, which uses the channel. It will replace us.
        self._drain_order.put_nowait(Drain(timeout_s=self._drain_timeout_s, is_shutdown=False))

    def _orphaned(self) -> None:
        if not self._configured.done():
            os._exit(1)
        self._drain_order.put_nowait(Drain(timeout_s=min(self._drain_timeout_s, ORPHAN_DRAIN_S)))

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        if self._ticked_at:
            self._worst_lag_s = max(self._worst_lag_s, now - self._ticked_at - _TICK_S)
        self._ticked_at = now
        if self._acceptor is not None:
            self._acceptor.tell()
        if now - self._heartbeat_at >= _HEARTBEAT_S:
            self._heartbeat_at = now
            self._beat(now)
        loop.call_later(_TICK_S, self._tick, loop)

    def _beat(self, now: float) -> None:
        channel, application = self._channel, self._application
        assert channel is not None
        assert application is not None
        if channel.is_congested:
            return
        channel.send(Heartbeat(max(0.0, self._worst_lag_s), application.open_connections))
        self._worst_lag_s = 0.0
        if now - self._reported_at >= _REPORT_S:
            # What is counted between this and a sudden death is lost to the metrics, never to the ledger.
            self._reported_at = now
            self._report(0)

    def _report(self, number: int) -> None:
        assert self._channel is not None
        self._channel.send(Metrics(self._telemetry.snapshot(), number))

    def _watch_process(self, logs: Logs) -> None:
        watch = self._telemetry.watch
        # The slot, not the name: names are never used again, labels must not pile up.
        slot = self._name.removeprefix("w").partition("-")[0]
        watch(
            "headgate_worker_resident_bytes",
            "gauge",
            "Memory of a worker process.",
            lambda: {slot: _resident_bytes()},
            "worker",
        )
        watch(
            "headgate_worker_cpu_seconds_total",
            "counter",
            "CPU time of a worker process.",
            lambda: {slot: time.process_time()},
            "worker",
        )
        watch(
            "headgate_loop_lag_seconds",
            "gauge",
            "How late the event loop ran at worst since the last heartbeat.",
            lambda: {slot: max(0.0, self._worst_lag_s)},
            "worker",
        )
        watch(
            "headgate_log_lines_dropped_total",
            "counter",
            "Log lines nobody read in time.",
            lambda: logs.dropped,
        )


async def _until_unused(application: Application, within_s: float) -> None:
    until_at = time.monotonic() + within_s
    while application.open_connections and time.monotonic() < until_at:  # noqa: ASYNC110 - nobody tells of the last one
        await asyncio.sleep(_KEPT_POLL_S)


def _resident_bytes() -> int:
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _settle_memory() -> None:
    """After start and reload what is alive stays: keep the collector from walking it again and again.

    A full collection over 0.6 million objects was measured at 94 ms, after a freeze at 0.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1000)


def leave_with_parent(
    control_fd: int, limit_s: float = ORPHAN_LIMIT_S, leave: Callable[[int], object] = os._exit
) -> None:
    """A thread that ends the process `limit_s` after its parent, however the event loop is doing."""
    descriptor = os.dup(control_fd)
    poll = select.poll()
    poll.register(descriptor, 0)  # POLLHUP and POLLERR are always reported

    def wait() -> None:
        poll.poll()
        time.sleep(limit_s)
        leave(1)

    threading.Thread(target=wait, name="leave-with-parent", daemon=True).start()


def main(argv: list[str], build: Build) -> int:
    """`argv`: name; the descriptors of listening socket, control channel and shared loads; the place in those."""
    name, listen_fd, control_fd, loads_fd, place = argv[1], *map(int, argv[2:6])
    leave_with_parent(control_fd)

    async def run() -> int:
        listener = socket.socket(fileno=listen_fd)
        listener.setblocking(False)
        worker = Worker(name, listener, Loads(loads_fd), place, build)
        return await worker.run(socket.socket(fileno=control_fd))

    return uvloop.run(run())


if __name__ == "__main__":
    # Only here: nothing else in this module knows which application it is.
    from gateway.app import App

    sys.exit(main(sys.argv, App))

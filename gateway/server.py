"""The parent process: the listening socket, the workers, the engines, the management plane, and what signals do.

Owns the order of start and end. Serves no inference request itself and so outlives whatever goes wrong in one.
SIGTERM and SIGINT drain (a second one cuts the drain short), SIGHUP reloads, SIGUSR2 replaces the workers.
"""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from aiohttp import web

from gateway import floors
from gateway.alert_delivery import AlertOutbox, receivers_of
from gateway.config import Config
from gateway.control import OfEndpoint
from gateway.discovering import Discovering
from gateway.engines import Engines
from gateway.exposition import Page
from gateway.first_start import Addresses, FirstKeys, keys_text, make_first_keys, ready_text, try_text
from gateway.fleet import Fleet, FleetSettings, WorkerError
from gateway.intents import recover_orphans
from gateway.keys import Keyring, load_pepper
from gateway.kv_feeds import KvFeeds
from gateway.listener import ListenError, bound, url_of
from gateway.logs import start_logging, watch_loop
from gateway.management.app import Plane
from gateway.node import Node
from gateway.overflow.operating import QueueOperators
from gateway.overflow.service_queue import ServiceQueue
from gateway.overflow.webhooks import QueueWebhooks
from gateway.patrol import Patrol
from gateway.placed import PlacedConfig
from gateway.reload import ConfigWatch, Reloaded
from gateway.self_check import SelfCheck
from gateway.shared_check import SharedCheck
from gateway.simulators import Simulators
from gateway.storage_lock import storage_lock
from gateway.stores.sqlite import StorageError
from gateway.switchboard import Switchboard
from gateway.tenants import Declared, TenantsWatch
from gateway.webhook_delivery import WebhookDelivery
from local_engine.plan import PlanError
from local_engine.processes import StartError

# More is of no use to one process, and some systems have a hard limit of a thousand million.
MAX_DESCRIPTORS: Final = 65536

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class ServeError(Exception):
    """The service cannot start; the message says what to change."""


class _Stopped(Exception):  # noqa: N818 - not an error: a signal came before all was up
    pass


class Overrides(NamedTuple):
    """What the command line says instead of the file; a reload leaves it alone."""

    port: int | None = None
    management_port: int | None = None
    workers: int | None = None


class Server:
    """One run of the service. `run` returns the process's exit code."""

    def __init__(self, path: Path, environ: Mapping[str, str], config: Config, overrides: Overrides) -> None:
        self._path = path
        self._environ = environ
        self._config = config
        self._overrides = overrides
        self._storage = config.storage.directory
        self._started_time = time.time()
        self._page = Page(metadata.version("headgate"))
        self._simulators = Simulators(lambda child: self._page.engines.restarts.labels(child).inc())
        self._keyring: Keyring | None = None
        self._fleet: Fleet | None = None
        self._patrol: Patrol | None = None
        self._watch: _CountingWatch | None = None
        self._rotation: asyncio.Task[None] | None = None
        is_alone = config.storage.redis is None
        self._check = SelfCheck(lambda: self._config) if is_alone else SharedCheck(lambda: self._config)
        self._node: Node | None = None
        alerts = AlertOutbox(self._storage, lambda: receivers_of(self._config.alerts))
        self._alerts = WebhookDelivery(alerts, "alert")
        self._switchboard = Switchboard(
            self._page, alerts, lambda: self._for_workers(self._config), self._publish
        )
        self._engines = Engines(self._storage, self._switchboard)
        self._discovering = Discovering(self._switchboard.republish)
        self._applying = asyncio.Lock()
        self._queue: ServiceQueue | None = None
        self._stop = asyncio.Event()
        self._had_terminal = os.isatty(2)

    async def run(self) -> int:
        """Serves until a signal. ServeError when it cannot begin."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGHUP, self._on_reload)
        loop.add_signal_handler(signal.SIGUSR2, self.restart)
        watch_loop(loop)
        _prepare_process()
        settings = self._config.logging
        logs = start_logging(settings.level, settings.format, source="parent", has_access=False)
        try:
            async with contextlib.AsyncExitStack() as ending:
                await self._start(ending)
                await self._stop.wait()
                _notify("STOPPING=1")
                timeout_s = self._config.server.drain_timeout_s
                _log.info("draining; a second signal cuts it short", extra={"timeout_s": timeout_s})
        except _Stopped:
            pass
        except (ListenError, WorkerError, StartError, StorageError) as error:
            raise ServeError(str(error)) from error
        finally:
            logs.close()
        return 0

    async def _start(self, ending: contextlib.AsyncExitStack) -> None:
        """Everything that must end registers itself in `ending`, which undoes it in reverse."""
        too_old = floors.problems()
        if too_old:
            raise ServeError("\n".join(too_old))
        listener = ending.enter_context(bound("server", self._config.server, self._overrides.port))
        operators = ending.enter_context(
            bound("management", self._config.management, self._overrides.management_port)
        )
        addresses = Addresses(url_of(listener), url_of(operators))
        ending.enter_context(storage_lock(self._storage))
        pepper = load_pepper(self._storage, self._config.pepper())
        first_keys = make_first_keys(self._storage, pepper, self._config.declared_keys())
        try:
            self._recover()
            await self._open_queue(pepper, ending)
            await self._open_management(operators, pepper, ending)
            ending.push_async_callback(self._simulators.stop)
            await self._unless_stopped(self._simulators.start(self._config))
            ending.push_async_callback(self._engines.stop)
            await self._unless_stopped(self._engines.start(self._config))
            ending.push_async_callback(self._discovering.stop)
            await self._unless_stopped(self._discovering.apply(self._config))
            ending.push_async_callback(self._switchboard.stop)
            await self._join_nodes(ending)
            await self._start_workers(listener, ending)
        except BaseException:
            if first_keys is not None:
                _tell(keys_text(first_keys, self._storage))  # their only chance
            raise
        self._watch = _CountingWatch(self._page, self._path, self._environ, self._config, self._apply)
        tenants = TenantsWatch(self._storage, Declared(), lambda _: self._check.want())
        ending.callback(tenants.close)
        works = [self._watch.run(), self._check.run(), self._alerts.run()]
        if self._queue is not None:
            works.append(self._queue.run())
        for work in works:
            ending.push_async_callback(_cancel, asyncio.create_task(work))
        self._announce(addresses, first_keys)

    async def _open_queue(self, pepper: bytes, ending: contextlib.AsyncExitStack) -> None:
        """Closed after the last worker is gone, whose jobs it gives back."""
        if self._config.queue.enabled:
            self._queue = ServiceQueue(lambda: self._config, pepper, self._draw_jobs)
            ending.push_async_callback(self._queue.close)
            await self._queue.recover()

    async def _open_management(
        self, listener: socket.socket, pepper: bytes, ending: contextlib.AsyncExitStack
    ) -> None:
        """Up before the workers are, so that readiness can be asked for from the first moment."""
        self._keyring = keyring = Keyring(self._storage, pepper, self._config.declared_keys())
        ending.callback(keyring.close)
        plane = Plane(self, keyring, self._storage, pepper)
        runner = web.AppRunner(
            plane.application(),
            access_log=None,
            handle_signals=False,
            auto_decompress=False,  # a bomb would be unpacked before its size is known
            keepalive_timeout=30.0,
            shutdown_timeout=2.0,
        )
        await runner.setup()
        ending.push_async_callback(runner.cleanup)
        await web.SockSite(runner, listener).start()

    async def _join_nodes(self, ending: contextlib.AsyncExitStack) -> None:
        """Before the workers, which are to find an empty Redis filled from the ledger."""
        if self._config.storage.redis is not None:
            self._node = Node(lambda: self._config, self._check.want)
            await self._unless_stopped(self._node.start())
            ending.push_async_callback(_cancel, asyncio.create_task(self._node.run()))

    async def _start_workers(self, listener: socket.socket, ending: contextlib.AsyncExitStack) -> None:
        settings = FleetSettings(
            workers=self._worker_count(), hang_timeout_s=self._config.server.hang_timeout_s
        )
        self._patrol = Patrol(
            self._tell_workers,
            self._page.probes,
            KvFeeds(self._tell_workers, self._page.counter),
            self._engines.wanted,
        )
        on_exit = None if self._queue is None else self._queue.worker_died
        self._fleet = Fleet(listener, settings, self._page, self._recover, self._patrol, on_exit)
        self._switchboard.connect(self._fleet, self._patrol)
        ending.push_async_callback(self._patrol.stop)
        ending.push_async_callback(self._drain)
        await self._patrol.apply(self._placed(self._config))
        await self._unless_stopped(self._fleet.start(self._for_workers(self._config)))

    def _tell_workers(self, word: OfEndpoint, but: str) -> None:
        if self._fleet is not None:
            self._fleet.tell(word, but)

    def _for_workers(self, config: Config) -> bytes:
        """With what only the parent knows: the engines' addresses, and how many workers there are."""
        server = config.server.model_copy(update={"workers": self._worker_count()})
        return self._placed(config).model_copy(update={"server": server}).to_json()

    def _placed(self, config: Config) -> PlacedConfig:
        found = self._simulators.placed() | self._engines.placed() | self._discovering.placed()
        return PlacedConfig.of(config, found)

    def _draw_jobs(self, is_on: bool) -> None:  # noqa: FBT001 - a callback's one argument
        if self._fleet is not None:
            self._fleet.draw(is_on=is_on)

    def _worker_count(self) -> int:
        if self._overrides.workers is not None:
            return self._overrides.workers
        configured = self._config.server.workers
        return available_cpus() if isinstance(configured, str) else configured

    async def _drain(self) -> None:
        assert self._fleet is not None
        if self._rotation is not None:
            await _cancel(self._rotation)
        settings = self._config.server
        await self._fleet.drain(settings.pre_stop_s, settings.drain_timeout_s)

    async def _unless_stopped(self, work: Coroutine[Any, Any, _T]) -> _T:
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(stop)
        if not task.done():
            await _cancel(task)
            raise _Stopped
        return task.result()

    def _recover(self) -> None:
        """Rows of requests whose worker died. Any thread."""
        try:
            rows = recover_orphans(self._storage)
        except StorageError as error:
            _log.error("rows of a dead worker wait for the next start: %s", error)
        else:
            self._check.want()
            if rows:
                _log.warning("rows of a dead worker were recovered", extra={"rows": rows})

    def _announce(self, addresses: Addresses, first_keys: FirstKeys | None) -> None:
        models = sorted(self._config.served_models())
        text = ready_text(addresses, models, self._worker_count(), self._config.notes())
        if first_keys is not None:
            text += keys_text(first_keys, self._storage)
            if models and first_keys.caller:
                model = "demo" if "demo" in models else models[0]
                text += try_text(first_keys.caller, addresses, model, self._path)
        _tell(text)
        _log.info("ready", extra={"address": addresses.data_plane, "workers": self._worker_count()})
        _notify("READY=1")

    def _on_stop(self) -> None:
        if self._stop.is_set() and self._fleet is not None:
            self._fleet.hurry()
        self._stop.set()

    def _on_reload(self) -> None:
        if self._had_terminal and not os.isatty(2):
            self._on_stop()  # not an operator's wish: the terminal we were started from was closed
        elif self._watch is not None:
            self._watch.on_sighup()

    async def _apply(self, config: Config) -> None:
        assert self._keyring is not None
        async with self._applying:
            try:
                await self._engines.start_late(config)
                self._engines.apply(config)
                await self._discovering.apply(config)
                await self._give(config)
            except (PlanError, StartError, ReloadError) as error:
                # All workers serve the same configuration, so those that took it go back.
                self._engines.apply(self._config)
                await self._discovering.apply(self._config)
                await self._give(self._config)
                raise ReloadError(str(error)) from error
            self._keyring.declare(config.declared_keys())
            self._config = config
            if self._fleet is not None:
                self._fleet.amend(
                    self._for_workers(config)
                )  # an engine that opened meanwhile told of the old one
        self._check.want()

    async def _give(self, config: Config) -> None:
        """To every worker and the patrol. ReloadError: a worker did not take it."""
        assert self._fleet is not None
        assert self._patrol is not None
        problems = await self._fleet.reload(self._for_workers(config))
        if problems:
            raise ReloadError("; ".join(problems))
        await self._patrol.apply(self._placed(config))

    async def _publish(self) -> None:
        """The running configuration again: endpoints have other addresses."""
        async with self._applying:
            await self._give(self._config)

    @property
    def engines(self) -> Engines:
        return self._engines

    @property
    def is_ready(self) -> bool:
        return not self._stop.is_set() and self._fleet is not None and self._fleet.is_ready

    def readiness(self) -> dict[str, str]:
        """Details for operators: what this node misses does not make it unready."""
        return {} if self._node is None else self._node.details()

    @property
    def has_open_metrics(self) -> bool:
        return self._config.management.open_metrics

    @property
    def declared(self) -> Declared:
        return self._config.declared()

    @property
    def declared_key_names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self._config.keys)

    @property
    def webhooks(self) -> QueueWebhooks | None:
        return None if self._queue is None else self._queue.webhooks

    @property
    def jobs(self) -> QueueOperators | None:
        return None if self._queue is None else self._queue.operators

    async def metrics(self) -> bytes:
        if self._fleet is not None:
            await self._fleet.collect()
        if self._node is not None:
            self._page.totals.update("node", self._node.snapshot())
        self._page.set_budgets(self._check.drift_nanousd, self._check.corrections, self._check.checked_time)
        self._page.engines.show(self._engines.view())
        self._page.set_alerts(self._alerts.delivered, self._alerts.failed)
        if self._queue is not None:
            deliveries = self._queue.webhooks.delivery
            self._page.set_webhooks(deliveries.delivered, deliveries.failed)
            self._page.totals.update("queue", await self._queue.operators.snapshot())
        return self._page.render()

    async def reload(self) -> Reloaded:
        if self._watch is None:
            raise ReloadError("the service is still starting")
        return await self._watch.reload()

    def restart(self) -> bool:
        if self._fleet is None or self._stop.is_set() or (self._rotation and not self._rotation.done()):
            return False
        self._rotation = asyncio.create_task(self._rotate(self._fleet))
        return True

    async def _rotate(self, fleet: Fleet) -> None:
        _log.info("replacing the workers one by one")
        try:
            await fleet.rotate(self._config.server.drain_timeout_s)
        except WorkerError as error:
            _log.error("the workers that are left keep running: %s", error)
        else:
            _log.info("all workers were replaced")

    def status(self) -> dict[str, Any]:
        """For operators. No address of an upstream, no secret."""
        now = time.time()
        workers = self._fleet.workers() if self._fleet is not None else []
        return {
            "version": metadata.version("headgate"),
            "is_ready": self.is_ready,
            "uptime_s": round(now - self._started_time),
            "models": sorted(self._config.served_models()),
            "pools": sorted(self._config.enabled_pools()),
            "providers": sorted(self._config.enabled_providers()),
            "workers": [
                {
                    "name": worker.name,
                    "pid": worker.process.pid,
                    "state": worker.state,
                    "age_s": round(now - worker.started_time),
                    "open_connections": worker.heartbeat.open_connections,
                    "loop_lag_ms": round(worker.heartbeat.loop_lag_s * 1000, 2),
                }
                for worker in workers
            ],
            "endpoints": self._patrol.view() if self._patrol is not None else [],
            "engines": [
                {"name": child.name, "pid": child.pid, "restarts": child.restarts}
                for child in self._simulators.children()
            ],
            "engine_pools": self._engines.view(),
        }


class ReloadError(RuntimeError):
    """A valid configuration could not be applied; the old one is in force."""


class _CountingWatch(ConfigWatch):
    """Counts what becomes of reloads, whatever caused them."""

    def __init__(
        self,
        page: Page,
        path: Path,
        environ: Mapping[str, str],
        config: Config,
        apply: Callable[[Config], Awaitable[None]],
    ) -> None:
        super().__init__(path, environ, config, apply)
        self._reloads = page.reloads

    async def reload(self) -> Reloaded:
        try:
            result = await super().reload()
        except ReloadError:
            self._reloads.labels("failed").inc()
            raise
        self._reloads.labels("refused" if result.problems else "applied").inc()
        return result


def available_cpus() -> int:
    """CPUs this process may use, by its affinity and its control group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no control groups, or the older kind
    return count


def _prepare_process() -> None:
    """What workers and engines inherit."""
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold keys and prompts
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _tell(text: str) -> None:
    """To people, on standard output, wherever the logs go."""
    with contextlib.suppress(OSError):
        print(text, flush=True)  # noqa: T201 - the one thing this process says to people


def _notify(state: str) -> None:
    """Tells systemd, when it asked (Type=notify)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            notifier.send(state.encode())


async def _cancel(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})

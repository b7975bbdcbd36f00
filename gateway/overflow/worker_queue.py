"""The queue's part of one worker, put together: what is drawn and run here, what spills, and the doors.

Owns the order of start, drain and stop, and what the metrics page shows. The composition root calls it where the queue
is enabled; a worker without one has none of this.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

from gateway.config import Config
from gateway.ledger import Ledger
from gateway.overflow.admission import QueueAdmission
from gateway.overflow.background import Background
from gateway.overflow.background_answer import BackgroundPark
from gateway.overflow.batches import Batches
from gateway.overflow.bodies import open_bodies
from gateway.overflow.doors import Doors
from gateway.overflow.drawing import Drawing
from gateway.overflow.endpoints import Endpoints
from gateway.overflow.files import Files
from gateway.overflow.headroom import Headroom
from gateway.overflow.native_requests import NativeRequests
from gateway.overflow.opening import (
    node_of,
    open_endpoints,
    open_held,
    open_shelf,
    open_store,
    owner_name,
)
from gateway.overflow.running import Handle, Runner
from gateway.overflow.settled_flow import SettledFlow
from gateway.overflow.spill import Spill, SpillParts
from gateway.overflow.submit import Submitter
from gateway.overflow.watching import Watch
from gateway.runtime import Runtime
from gateway.settle import Settler
from gateway.telemetry import Telemetry
from policies.exchange import Exchange


class Surroundings(NamedTuple):
    """What the queue uses of its worker. `waiting`: interactive requests that wait, by pool; `want` is told of pools that
    there are jobs for and whose engines may be asleep."""

    config: Callable[[], Config]
    runtime: Callable[[], Runtime]
    handle: Handle
    settler: Settler
    ledger: Ledger
    waiting: Callable[[], dict[str, int]]
    want: Callable[[str], None]
    budget_used: Callable[[Exchange], float]
    processes: int
    pepper: bytes


class WorkerQueue:
    """One per worker. StorageError when its storage cannot be used."""

    def __init__(self, name: str, around: Surroundings) -> None:
        config = around.config()
        self._config = around.config
        self._store = store = open_store(config, bodies := open_bodies(config.queue.encryption))
        self.owner = owner = owner_name(node_of(config), name, os.getpid())
        self._held = open_held(config)
        self.watch = Watch(store)
        admission = QueueAdmission(around.runtime, around.config, around.budget_used)
        submitter = Submitter(store, admission)
        self._flow = SettledFlow(store, owner, around.ledger.enter)
        runner = Runner(store, around.handle, around.settler, around.runtime, self._changed)
        self._headroom = Headroom(
            lambda: around.config().queue, around.waiting, around.processes, around.want
        )
        self.drawing = Drawing(
            store, owner, runner, self._headroom, around.runtime, config.queue.result_bytes
        )
        self._endpoints = Endpoints(
            lambda: around.config().queue.webhooks, open_endpoints(config), around.pepper
        )
        self.spill = Spill(
            SpillParts(
                store,
                submitter,
                self._held,
                self._endpoints.names,
                self.watch,
                around.runtime,
                lambda: around.config().queue,
                self.drawing.hint,
                self.drawing.cancelled,
            )
        )
        files = Files(open_shelf(config, bodies), lambda: around.config().queue.files)
        self.doors = Doors(
            store,
            submitter,
            self._endpoints,
            files,
            Batches(store, submitter, files, owner, lambda: around.config().queue.batches),
            NativeRequests(store, submitter),
            Background(store, submitter, self.watch, self.drawing.hint, self.drawing.cancelled),
            self.watch,
            self.drawing.hint,
            self.drawing.cancelled,
        )
        self.background = BackgroundPark(self.doors.background, self._endpoints)

    def start(self) -> None:
        self._flow.start()
        self.drawing.start()
        self.doors.start()
        self.configured()

    def configured(self) -> None:
        """A configuration is in force; some model of it may hold requests."""
        config = self._config()
        if any(model.on_full in {"hold", "queue"} for model in config.models.values()) or any(
            rule.on_full == "queue" for rule in config.rules
        ):
            self.spill.start()

    def room_freed(self) -> None:
        """A request has left an endpoint."""
        self.drawing.room_freed()

    def close(self) -> None:
        """Draws nothing more, and holds nobody."""
        self.spill.close()
        self.drawing.close()

    async def drain(self, timeout_s: float) -> None:
        """Lets what runs here end, then gives the rest back to the queue."""
        self.close()
        await self.drawing.drain(timeout_s)

    async def stop(self) -> None:
        """After `drain`, while the ledger still takes rows."""
        await self.drawing.stop()
        await self.spill.stop()
        await self._flow.stop()
        await self.doors.stop()
        await self._endpoints.close()
        await self._held.close()
        await self._store.close()

    def _changed(self, job_id: str) -> None:
        self.watch.changed(job_id)
        self._flow.wake()

    def watch_metrics(self, telemetry: Telemetry) -> None:
        """What this worker counts; how deep the queue is, the parent tells."""
        drawing, watch = self.drawing, telemetry.watch
        watch(
            "headgate_queue_claims_total",
            "counter",
            "Jobs that were claimed, by class.",
            lambda: drawing.claims,
            "class",
        )
        watch(
            "headgate_queue_runs_total",
            "counter",
            "Runs of jobs that have ended, by class and what their job is then (queued: it is tried again).",
            lambda: drawing.counts,
            ("class", "outcome"),
        )
        watch(
            "headgate_queue_dwell_seconds_total",
            "counter",
            "Time that jobs waited before their first run, added up.",
            lambda: drawing.dwell_s,
        )
        watch(
            "headgate_queue_running",
            "gauge",
            "Jobs that run, by the pool they were claimed for.",
            drawing.running_by_pool,
            "pool",
        )
        watch(
            "headgate_queue_limit",
            "gauge",
            "How many jobs may run at a pool, as learned from its refusals.",
            self._headroom.limits,
            "pool",
        )
        watch(
            "headgate_queue_spilled_total",
            "counter",
            "Requests that found no room and met the queue, by what became of them.",
            lambda: self.spill.counts,
            "outcome",
        )
        watch(
            "headgate_queue_settled_rows_total",
            "counter",
            "Ledger rows of jobs that were handed on to the ledger.",
            lambda: self._flow.rows,
        )

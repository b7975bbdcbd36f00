"""One replica: from what is wanted of it to a process that serves, and back, as an explicit state machine.

Owns the states of one slot and what leads from each to the next. Knows processes, probes, the clock and the gateway's
candidates only by the protocols of `surroundings`, so that all of it runs against a script. Refuses to know other replicas, but for
the places in which engines may start at once. Invariants: it is a candidate in the state `ready` and in no other; it
has left the candidates before its process is told to end; a process is never given up while it lives.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Literal, TypeVar

from local_engine.plan import ReplicaPlan
from local_engine.start_causes import Cause, cause_of
from local_engine.supervision_config import SupervisionConfig
from local_engine.surroundings import Event, Process, Surroundings

State = Literal[
    "planned",
    "starting",
    "probing",
    "ready",
    "draining",
    "stopping",
    "backing_off",
    "crash_looped",
    "asleep",
]
Wish = Literal["ready", "drained", "asleep", "stopped"]
_T = TypeVar("_T")

# What may follow what. A process that dies leads to backing_off from wherever it was.
TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    "planned": frozenset({"starting"}),
    "starting": frozenset({"probing", "stopping", "backing_off", "crash_looped"}),
    "probing": frozenset({"ready", "stopping", "backing_off", "crash_looped"}),
    "ready": frozenset({"draining", "backing_off", "crash_looped"}),
    "draining": frozenset({"ready", "stopping", "asleep", "planned", "backing_off", "crash_looped"}),
    "stopping": frozenset({"planned", "backing_off", "crash_looped"}),
    "backing_off": frozenset({"planned"}),
    "crash_looped": frozenset({"planned"}),
    "asleep": frozenset({"probing", "stopping", "backing_off", "crash_looped"}),
}
_POLL_S: Final = 0.5
_DRAIN_POLL_S: Final = 0.2
_GONE_S: Final = 10.0  # after SIGKILL: only one that the kernel holds takes longer
_JITTER: Final = 0.2

_log = logging.getLogger(__name__)


class Replica:
    """One slot of a pool. `run` until cancelled; everything else says what is wanted and returns at once."""

    def __init__(self, plan: ReplicaPlan, settings: SupervisionConfig, around: Surroundings) -> None:
        self.plan = plan  # of the process, if there is one
        self.settings = settings
        self.state: State = "planned"
        self.wish: Wish = "stopped"
        self.since_at = around.clock.now()
        self.process: Process | None = None
        self.restarts = 0  # that nobody asked for
        self.failures = 0  # in a row, of weight one each
        self.cause: Cause | None = None  # of the last failure
        self._around = around
        self._next_plan = plan
        self._is_restart_wanted = False
        self._changed = asyncio.Event()
        self._exit: asyncio.Future[int | None] | None = None
        self._seen: dict[
            str, tuple[float, float, float]
        ] = {}  # by label: steps, for how long, when looked at
        self._has_place = False
        self._adopts = True

    @property
    def is_settled(self) -> bool:
        """Whether it is as it is wanted, or will not come nearer by itself."""
        if self._is_restart_wanted or self._next_plan is not self.plan:
            return False
        settled: dict[Wish, tuple[State, ...]] = {
            "ready": ("ready", "crash_looped"),
            "drained": ("draining", "crash_looped", "planned"),
            "asleep": ("asleep", "crash_looped", "planned"),
            "stopped": ("planned", "crash_looped"),
        }
        return self.state in settled[self.wish]

    def want(self, wish: Wish) -> None:
        """`asleep` is `stopped` for an engine that cannot sleep. One that crash-looped stays down until it is restarted,
        replaced or stopped."""
        if wish == "asleep" and not self._next_plan.can_sleep:
            wish = "stopped"
        if wish != self.wish:
            self.wish = wish
            self._changed.set()

    def restart(self) -> None:
        """Drain, end, start again; one that is down is tried at once."""
        self._is_restart_wanted = True
        self.failures = 0
        self._changed.set()

    def replace(self, plan: ReplicaPlan, settings: SupervisionConfig) -> None:
        """From the next start on this is what runs; a process that runs by another plan is restarted."""
        self.settings = settings
        if plan != self._next_plan:
            self._next_plan = plan
            self.failures = 0
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled; its process then goes on (`end` ends it)."""
        steps: dict[State, Callable[[], Awaitable[State]]] = {
            "planned": self._planned,
            "starting": self._starting,
            "probing": self._probing,
            "ready": self._ready,
            "draining": self._draining,
            "stopping": self._stopping,
            "backing_off": self._backing_off,
            "crash_looped": self._crash_looped,
            "asleep": self._asleep,
        }
        try:
            while True:
                self._enter(await steps[self.state]())
        finally:
            self._give_place_back()

    async def end(self, drain_s: float) -> None:
        """Instead of `run`, at the end of the service: nothing is sent to it any more, and its process ends."""
        if self.process is None:
            return
        self._around.rotation.close(self.plan)
        if drain_s > 0 and self.state in ("ready", "draining"):
            await self._drained(drain_s)
        await self._end_process()

    def _enter(self, state: State) -> None:
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"{self.plan.name}: {self.state} does not lead to {state}")
        if state not in ("starting", "probing"):
            self._give_place_back()
        fields: dict[str, Any] = {"engine": self.plan.name, "was": self.state}
        if state in ("backing_off", "crash_looped") and self.cause is not None:
            _log.warning("an engine is %s: %s", state.replace("_", " "), self.cause.text, extra=fields)
        else:
            _log.info("an engine is %s", state.replace("_", " "), extra=fields)
        self.state, self.since_at = state, self._around.clock.now()
        if state == "ready":
            self._around.rotation.open(self.plan)
            self._around.tell(Event("ready", self.plan.name))

    # Each state's work, and the state that follows.

    async def _planned(self) -> State:
        while True:
            self._is_restart_wanted = False
            self.plan = self._next_plan
            if self.wish != "ready":
                await self._change()
                continue
            await self._around.starts.acquire()
            self._has_place = True
            if self.wish == "ready":
                self._is_restart_wanted = False
                self.plan = self._next_plan
                return "starting"
            self._give_place_back()

    async def _starting(self) -> State:
        around = self._around
        began_at = around.clock.now()
        try:
            adopted = around.launcher.adopt(self.plan) if self._adopts else None
            self._adopts = False
            self.process = adopted or await around.launcher.launch(self.plan)
        except OSError as error:
            reason = error.strerror or str(error)
            return self._fail("start_failed", Cause("no_process", f"it cannot be started: {reason}"))
        self._exit = asyncio.ensure_future(self.process.wait())
        while True:
            if await self._race(around.prober.is_up(self.plan)):
                return "probing"
            follows = await self._on_the_way(began_at)
            if follows is not None:
                return follows

    async def _probing(self) -> State:
        began_at = self._around.clock.now()
        assert self.process is not None
        await self.process.observe()
        while True:
            reason = await self._race(self._around.prober.generate(self.plan))
            if reason == "":
                await self.process.observe()
                self._seen.clear()
                return "ready"
            follows = await self._on_the_way(began_at, reason or "")
            if follows is not None:
                return follows

    async def _on_the_way(self, began_at: float, reason: str = "") -> State | None:
        """What ends a start before it is there; else a pause."""
        if self._has_exited:
            return await self._died("start_failed")
        if self._must_end or self.wish in ("asleep", "stopped"):
            return "stopping"
        if self._around.clock.now() - began_at > self.plan.start_timeout_s:
            await self._end_process()
            last = f"; the last probe said {reason}" if reason else ""
            text = f"it was not ready after {self.plan.start_timeout_s:g} s{last}"
            return self._fail("start_failed", Cause("start_timeout", text))
        await self._pause(_POLL_S)
        return None

    async def _ready(self) -> State:
        looked_at = self._around.clock.now()
        while True:
            await self._pause(self.settings.look_every_s)
            now = self._around.clock.now()
            if self._has_exited:
                self._around.rotation.close(self.plan)
                self._forgive(now)
                return await self._died("died")
            if self._must_end or self.wish != "ready":
                return "draining"
            if now - looked_at >= self.settings.look_every_s:
                looked_at = now
                hung = await self._hung()
                if hung is not None:
                    self._around.rotation.close(self.plan)
                    self._forgive(now)
                    await self._end_process(at_once=True)
                    return self._fail("hung", hung)

    async def _draining(self) -> State:
        self._around.rotation.close(self.plan)
        is_idle = await self._drained(self.plan.drain_timeout_s)
        while True:
            if self._has_exited:
                if self._must_end or self.wish == "stopped":
                    await self._end_process()
                    return "planned"
                return await self._died("died")
            if self._must_end or self.wish == "stopped":
                if not is_idle:
                    self._around.tell(Event("cut", self.plan.name))
                return "stopping"
            if self.wish == "ready":
                return "ready"
            if self.wish == "asleep" and await self._race(self._around.prober.sleep(self.plan)):
                return "asleep"
            if self.wish == "asleep":
                _log.warning("an engine does not sleep and is stopped", extra={"engine": self.plan.name})
                self.wish = "stopped"
                continue
            await self._change()

    async def _stopping(self) -> State:
        await self._end_process()
        return "planned"

    async def _backing_off(self) -> State:
        settings = self.settings
        delay_s = min(settings.backoff_s * 2.0 ** max(0, self.failures - 1), settings.backoff_max_s)
        delay_s *= 1 + _JITTER * random.random()  # noqa: S311 - so that several do not start in step
        until_at = self._around.clock.now() + delay_s
        while not (self._must_end or self.wish in ("asleep", "stopped")):
            left_s = until_at - self._around.clock.now()
            if left_s <= 0:
                break
            await self._pause(left_s)
        return "planned"

    async def _crash_looped(self) -> State:
        while not self._must_end and self.wish != "stopped":
            await self._change()
        return "planned"

    async def _asleep(self) -> State:
        while True:
            if self._has_exited:
                return await self._died("died")
            if self._must_end or self.wish == "stopped":
                return "stopping"
            if self.wish in ("ready", "drained"):
                if await self._race(self._around.prober.wake(self.plan)):
                    return "probing"
                _log.warning("an engine does not wake and is restarted", extra={"engine": self.plan.name})
                return "stopping"
            await self._change()

    # What several states share.

    @property
    def _must_end(self) -> bool:
        return self._is_restart_wanted or self._next_plan is not self.plan

    @property
    def _has_exited(self) -> bool:
        return self._exit is not None and self._exit.done()

    async def _died(self, kind: str) -> State:
        """Its process has ended by itself: why, and what of it is left."""
        assert self.process is not None
        assert self._exit is not None
        cause = cause_of(self.process.tail(), self._exit.result())
        await self._end_process()
        return self._fail(kind, cause)

    def _fail(self, kind: str, cause: Cause) -> State:
        self.cause = cause
        self.restarts += 1
        # One that is sure to fail again gets a second chance, not a fifth.
        weight = (self.settings.crash_loop + 1) // 2 if cause.is_final else 1
        self.failures += weight
        self._around.tell(Event(kind, self.plan.name, cause))
        if self.failures < self.settings.crash_loop:
            return "backing_off"
        self._around.tell(Event("crash_looped", self.plan.name, cause))
        return "crash_looped"

    def _forgive(self, now: float) -> None:
        if now - self.since_at >= self.settings.settled_s:
            self.failures = 0

    async def _hung(self) -> Cause | None:
        """A cause if some engine of it has requests and has done nothing for too long, or it says nothing at all."""
        assert self.process is not None
        await self.process.observe()
        limit_s = self.settings.hang_timeout_s
        told = await self._race(self._around.prober.work(self.plan))
        if not limit_s or self._has_exited:
            return None
        now = self._around.clock.now()
        if told is None:
            silent_s = self._without_progress("", 0.0, now)
            if silent_s > limit_s:
                return Cause("hung", f"it has answered nothing for {silent_s:.0f} s and was killed")
            return None
        self._seen.pop("", None)
        for label, work in told.items():
            if not work.requests:
                self._seen.pop(label, None)
                continue
            idle_s = self._without_progress(label, work.steps, now)
            if idle_s > limit_s:
                text = f"{work.requests} requests and no progress for {idle_s:.0f} s: it was killed"
                return Cause("hung", text)
        return None

    def _without_progress(self, label: str, steps: float, now: float) -> float:
        """For how long it was seen so. Time in which we did not look, being stopped ourselves, does not count."""
        known_steps, idle_s, looked_at = self._seen.get(label, (steps, 0.0, now))
        idle_s = (
            0.0 if steps != known_steps else idle_s + min(now - looked_at, 2 * self.settings.look_every_s)
        )
        self._seen[label] = (steps, idle_s, now)
        return idle_s

    async def _drained(self, timeout_s: float) -> bool:
        """Whether it has no requests any more; waits for that, as long as they may take and nobody wants it back."""
        deadline_at = self._around.clock.now() + timeout_s
        while not self._has_exited:
            if await self._around.rotation.in_flight(self.plan) == 0:
                return True
            left_s = deadline_at - self._around.clock.now()
            if left_s <= 0 or (self.wish == "ready" and not self._must_end):
                return False
            await self._pause(min(_DRAIN_POLL_S, left_s))
        return True

    async def _end_process(self, *, at_once: bool = False) -> None:
        """SIGTERM, SIGKILL to the group when that takes too long, and away with what is left."""
        process = self.process
        if process is None:
            return
        clock = self._around.clock
        if not self._has_exited and not at_once:
            await process.observe()
            process.terminate()
            await self._exited_within(self.plan.stop_timeout_s)
        while not self._has_exited:
            process.kill()
            if not await self._exited_within(_GONE_S):
                _log.error("an engine does not die", extra={"engine": self.plan.name, "pid": process.pid})
        await process.clean()
        self.process = self._exit = None
        self.since_at = clock.now()

    async def _exited_within(self, timeout_s: float) -> bool:
        assert self._exit is not None
        late: asyncio.Future[Any] = asyncio.ensure_future(self._around.clock.sleep(timeout_s))
        await asyncio.wait([self._exit, late], return_when=asyncio.FIRST_COMPLETED)
        await _cancelled(late)
        return self._exit.done()

    async def _race(self, work: Awaitable[_T]) -> _T | None:
        """The result, or None if the process ended first."""
        task = asyncio.ensure_future(work)
        waits: set[asyncio.Future[Any]] = {task}
        if self._exit is not None:
            waits.add(self._exit)
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            await _cancelled(task)

    async def _change(self) -> None:
        """Until something else is wanted, or the process ends."""
        await self._until(self._changed.wait())
        self._changed.clear()

    async def _pause(self, seconds: float) -> None:
        """The same, but no longer than this."""
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await self._until(self._around.clock.sleep(seconds), changed)
        finally:
            await _cancelled(changed)
        self._changed.clear()

    async def _until(self, work: Awaitable[Any], *more: asyncio.Future[Any]) -> None:
        task = asyncio.ensure_future(work)
        waits: set[asyncio.Future[Any]] = {task, *more}
        if self._exit is not None:
            waits.add(self._exit)
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancelled(task)

    def _give_place_back(self) -> None:
        if self._has_place:
            self._has_place = False
            self._around.starts.release()


async def _cancelled(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})

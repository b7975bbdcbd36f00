"""The workers: started, watched, replaced when they crash or hang, rotated one by one, drained together.

Owns the processes and their channels. Refuses to know what a worker does; its configuration is bytes here. The
listening socket is handed down to every worker, so that connections waiting to be accepted outlive any of them.
Invariant: a slot has at most one worker that counts, and one that is to follow it.
"""

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from gateway.acceptor import Loads
from gateway.control import (
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
    Metrics,
    OfEndpoint,
    Ready,
    Reload,
    Reloaded,
    Report,
    Scraped,
    ToParent,
    ToWorker,
    Wanted,
    open_channel,
)
from gateway.exposition import Page
from local_engine.processes import Backoff

# -P: from where this very process has its code, which need not be the working directory (a compiled build in a checkout).
COMMAND: Final = (sys.executable, "-P", "-m", "gateway.worker")
# After the drain's own deadline: for settling, writing the ledger and leaving.
EXIT_S: Final = 10.0
_CHECK_S: Final = 1.0
# One that was ready for longer did not die of starting: to wait before the next start would help nobody.
_SETTLED_S: Final = 0.5

State = Literal["starting", "ready", "draining", "gone"]

_log = logging.getLogger(__name__)


class WorkerError(Exception):
    """A worker did not become ready; the message is a sentence for the operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """`hang_timeout_s`: without a heartbeat for so long a worker is killed and replaced."""

    workers: int
    command: Sequence[str] = COMMAND
    start_timeout_s: float = 60.0
    hang_timeout_s: float = 30.0


class Worker:
    """The parent's view of one worker process. Its name is never used again."""

    def __init__(self, slot: int, name: str, place: int, process: asyncio.subprocess.Process) -> None:
        self.slot = slot
        self.place = place  # in the shared loads
        self.name = name
        self.process = process
        self.state: State = "starting"
        self.started_time = time.time()
        self.heard_at = time.monotonic()
        self.ready_at: float | None = None
        self.heartbeat = Heartbeat(loop_lag_s=0.0, open_connections=0)
        self.config_number = 0
        self.is_trial = False  # a rotation's newcomer: when it fails, its predecessor simply stays
        self.is_hung = False
        self.failure = ""
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # the channel is
        self.ended: asyncio.Future[None] = (
            asyncio.get_running_loop().create_future()
        )  # the process has, and is reaped
        self.channel: Channel | None = None

    def send(self, message: ToWorker) -> None:
        if self.channel is not None and not (self.channel.is_congested and isinstance(message, Scraped)):
            self.channel.send(message)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)


class Watcher(Protocol):
    """Who gathers what workers think of endpoints."""

    def joined(self, worker: str) -> Sequence[OfEndpoint]:
        """A worker is ready; what it is to be told."""

    def heard(self, worker: str, word: EndpointState) -> None: ...
    def wanted(self, pool: str) -> None:
        """Somebody waits for a pool of which no endpoint takes requests."""

    def left(self, worker: str) -> None: ...


class Fleet:
    """All workers. `on_death` is called on a thread after a worker died without being asked to, `on_exit` on the loop
    with the name and the process of each that is gone."""

    def __init__(
        self,
        listener: socket.socket,
        settings: FleetSettings,
        page: Page,
        on_death: Callable[[], None],
        watcher: Watcher | None = None,
        on_exit: Callable[[str, int], Awaitable[None]] | None = None,
    ) -> None:
        self._on_exit = on_exit
        self._listener = listener
        self._settings = settings
        self._page = page
        self._on_death = on_death
        self._watcher = watcher
        self._config = b""
        self._config_number = 0
        self._names = itertools.count(1)
        self._numbers = itertools.count(1)
        self._workers: dict[str, Worker] = {}
        # Old and new one of a slot are there together while it is rotated.
        self._loads = Loads.create(2 * settings.workers)
        self._places: set[int] = set()
        self._answers: dict[tuple[str, int], asyncio.Future[Any]] = {}
        self._backoff = Backoff()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._rotation = asyncio.Lock()
        self._is_stopping = False
        self._is_hurried = False
        self._draws = True
        self._deadline_at = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether any worker takes requests."""
        return not self._is_stopping and any(worker.state == "ready" for worker in self._workers.values())

    def workers(self) -> list[Worker]:
        """Those whose process lives, by slot."""
        return sorted(self._workers.values(), key=lambda worker: (worker.slot, worker.started_time))

    async def start(self, config: bytes) -> None:
        """Returns when every worker is ready; WorkerError when one cannot start, the others then being ended."""
        self._config = config
        self._config_number = next(self._numbers)
        launches = [self._launch(slot, is_trial=True) for slot in range(self._settings.workers)]
        results = await asyncio.gather(*launches, return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException):
                await self.drain(0.0, 0.0)
                raise error
        self._keep_task(self._watch())

    async def reload(self, config: bytes) -> list[str]:
        """Every worker swaps to `config`; returns what went wrong, one sentence for each worker."""
        self._config = config
        self._config_number = number = next(self._numbers)
        asked = [worker for worker in self._workers.values() if worker.state == "ready"]
        answers = await asyncio.gather(*(self._ask(worker, Reload(number, config), 30.0) for worker in asked))
        problems = []
        for worker, answer in zip(asked, answers, strict=True):
            if isinstance(answer, Reloaded) and not answer.error:
                worker.config_number = number
            elif not worker.ended.done():  # else its successor begins with it
                told = answer.error if isinstance(answer, Reloaded) else "no answer"
                problems.append(f"worker {worker.name} keeps its old configuration: {told}")
        return problems

    def amend(self, config: bytes) -> None:
        """What workers that start later begin with. The others have been told what is different, or will be."""
        self._config = config

    async def in_flight(self, endpoints: Sequence[str], timeout_s: float = 5.0) -> int | None:
        """Requests at these endpoints, of all workers; None: a worker that may have some does not answer."""
        asked = [worker for worker in self._workers.values() if worker.state in ("ready", "draining")]
        questions = (
            self._ask(worker, CountInFlight(next(self._numbers), list(endpoints)), timeout_s)
            for worker in asked
        )
        requests = 0
        for worker, answer in zip(asked, await asyncio.gather(*questions), strict=True):
            if isinstance(answer, InFlight):
                requests += answer.requests
            elif not worker.ended.done():  # else what it had has ended with it
                return None
        return requests

    async def rotate(self, drain_timeout_s: float) -> None:
        """Replace the workers one by one, each new one ready before the old one drains. WorkerError: stopped there."""
        async with self._rotation:
            for old in [worker for worker in self.workers() if worker.state == "ready"]:
                if self._is_stopping:
                    return
                if old.state != "ready":
                    continue  # died meanwhile, and is being replaced anyway
                await self._launch(old.slot, is_trial=True)
                self._page.worker_restarts.labels("rotated").inc()
                await self._end(old, drain_timeout_s)

    async def drain(self, pre_stop_s: float, timeout_s: float) -> None:
        """Returns when every worker has ended. `hurry` shortens it. The listening socket is closed on the way."""
        self._is_stopping = True
        # Our copy would keep taking connections that nobody accepts; closed, the next ones are refused at once.
        asyncio.get_running_loop().call_later(pre_stop_s, self._listener.close)
        if self._is_hurried:
            pre_stop_s = timeout_s = 0.0
        self._set_deadline(pre_stop_s + timeout_s)
        for worker in self.workers():
            worker.state = "draining"
            worker.send(Drain(timeout_s=timeout_s, pre_stop_s=pre_stop_s))
        while self._workers:
            left_s = self._deadline_at - time.monotonic()
            if left_s <= 0:
                _log.error(
                    "workers did not end in time and are killed", extra={"workers": len(self._workers)}
                )
                for worker in self.workers():
                    worker.kill()
                left_s = EXIT_S
            await asyncio.wait({worker.ended for worker in self._workers.values()}, timeout=min(left_s, 0.5))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def hurry(self) -> None:
        """Cut what is still open: streams get their error, everything is settled, then the workers end."""
        self._is_hurried = True
        self._set_deadline(0.0)
        for worker in self.workers():
            worker.send(Drain(timeout_s=0.0))

    def draw(self, *, is_on: bool) -> None:
        """Whether workers claim jobs, those that come later too."""
        self._draws = is_on
        for worker in self._workers.values():
            if worker.state == "ready":
                worker.send(Draw(is_on))

    def tell(self, word: OfEndpoint, but: str) -> None:
        """Every worker that is ready, but the one of this name."""
        for worker in self._workers.values():
            if worker.state in ("ready", "draining") and worker.name != but:
                worker.send(word)

    async def collect(self, timeout_s: float = 4.0) -> None:
        """Have every worker's metrics up to date in the page; those of one that does not answer stay as they were."""
        number = next(self._numbers)
        asked = [worker for worker in self._workers.values() if worker.state in ("ready", "draining")]
        await asyncio.gather(*(self._ask(worker, Report(number), timeout_s) for worker in asked))
        states = [worker.state for worker in self._workers.values()]
        for state in ("starting", "ready", "draining"):
            self._page.workers.labels(state).set(states.count(state))

    async def _watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(_CHECK_S)
            now = time.monotonic()
            for worker in self.workers():
                if now - before > 2 * _CHECK_S:
                    worker.heard_at = now  # it was us who did not run: what they said is still unread
                elif worker.state != "starting" and now - worker.heard_at > self._settings.hang_timeout_s:
                    worker.is_hung = True
                    worker.kill()

    async def _end(self, worker: Worker, timeout_s: float) -> None:
        worker.state = "draining"
        worker.send(Drain(timeout_s=timeout_s, is_shutdown=False))
        await asyncio.wait({worker.ended}, timeout=timeout_s + EXIT_S)
        worker.kill()
        await worker.ended

    def _set_deadline(self, timeout_s: float) -> None:
        self._deadline_at = time.monotonic() + timeout_s + EXIT_S

    def _keep_task(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _launch(self, slot: int, *, is_trial: bool) -> Worker:
        """Start a worker and wait until it is ready. WorkerError: it is not, and has been ended."""
        worker = await self._spawn(slot)
        worker.is_trial = is_trial
        worker.config_number = self._config_number
        worker.send(Configure(self._config))
        await asyncio.wait(
            {worker.ready, worker.ended},
            timeout=self._settings.start_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if worker.state != "ready":
            reason = worker.failure or f"it was not ready after {self._settings.start_timeout_s:g} s"
            if worker.ended.done() and not worker.failure:
                reason = f"its process ended with code {worker.process.returncode}"
            worker.kill()
            await worker.ended
            raise WorkerError(f"a worker could not start: {reason}")
        worker.is_trial = False
        if worker.config_number != self._config_number:
            # A reload happened while it was starting.
            worker.config_number = self._config_number
            worker.send(Reload(next(self._numbers), self._config))
        return worker

    async def _spawn(self, slot: int) -> Worker:
        ours, theirs = socket.socketpair()
        name = f"w{slot}-{next(self._names)}"
        place = self._loads.take_place(self._places)
        self._places.add(place)
        with theirs:
            inherited = (self._listener.fileno(), theirs.fileno(), self._loads.descriptor)
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._settings.command,
                    *(name, *map(str, inherited), str(place)),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,  # our own standard output is for people
                    pass_fds=inherited,
                    start_new_session=True,  # a Ctrl-C in the terminal is for the parent, which drains the workers
                )
            except OSError as error:
                ours.close()
                self._places.discard(place)
                raise WorkerError(f"a worker could not start: {error.strerror or error}") from error
        worker = self._workers[name] = Worker(slot, name, place, process)
        self._keep_task(self._attend(worker))
        worker.channel = await open_channel(
            ours,
            ToParent,
            lambda message: self._hear(worker, message),
            lambda: worker.closed.set_result(None),
        )
        if self._is_stopping:
            worker.kill()  # the drain did not see it
        return worker

    def _hear(self, worker: Worker, message: ToParent) -> None:
        worker.heard_at = time.monotonic()
        match message:
            case Heartbeat():
                worker.heartbeat = message
            case Metrics():
                self._page.totals.update(worker.name, message.snapshot)
                self._answer(worker, message.number, message)
            case InFlight():
                self._answer(worker, message.number, message)
            case Reloaded():
                self._answer(worker, message.number, message)
                if message.error:
                    _log.error("a worker refused a configuration", extra={"worker": worker.name})
            case Ready() if worker.state == "starting":
                worker.state = "ready"
                worker.ready_at = worker.heard_at
                worker.ready.set_result(None)
                if not self._draws:
                    worker.send(Draw(is_on=False))
                for word in self._watcher.joined(worker.name) if self._watcher is not None else ():
                    worker.send(word)
            case EndpointState() if self._watcher is not None:
                self._watcher.heard(worker.name, message)
            case Wanted() if self._watcher is not None:
                self._watcher.wanted(message.pool)
            case Failed():
                worker.failure = message.message
            case Drained() if message.cut:
                _log.warning(
                    "requests were cut by a drain", extra={"worker": worker.name, "count": message.cut}
                )

    def _ask(
        self, worker: Worker, question: Reload | Report | CountInFlight, timeout_s: float
    ) -> Coroutine[Any, Any, Reloaded | Metrics | InFlight | None]:
        """Sent at once: what is told to the worker later must not come before it."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[worker.name, question.number] = answer
        worker.send(question)
        return self._answer_of(worker, question.number, timeout_s)

    async def _answer_of(
        self, worker: Worker, number: int, timeout_s: float
    ) -> Reloaded | Metrics | InFlight | None:
        answer = self._answers[worker.name, number]
        try:
            await asyncio.wait({answer, worker.ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._answers[worker.name, number]
        return answer.result() if answer.done() else None

    def _answer(self, worker: Worker, number: int, message: Reloaded | Metrics | InFlight) -> None:
        answer = self._answers.get((worker.name, number))
        if answer is not None and not answer.done():
            answer.set_result(message)

    async def _attend(self, worker: Worker) -> None:
        """One process to its end, and what follows from it."""
        code = await worker.process.wait()
        was_asked = worker.state == "draining"
        worker.state = "gone"
        # Its last words may still be in the channel when the process is already reaped.
        await asyncio.wait({worker.closed}, timeout=1.0)
        del self._workers[worker.name]
        self._loads.set(worker.place, None)
        self._places.discard(worker.place)
        self._page.totals.retire(worker.name)
        if self._watcher is not None:
            self._watcher.left(worker.name)
        if self._on_exit is not None:
            await self._on_exit(worker.name, worker.process.pid)
        worker.ended.set_result(None)
        if was_asked and code == 0:
            return
        _log.error(
            worker.failure or "a worker ended by itself",
            extra={
                "worker": worker.name,
                "exit_code": code,
                "reason": "hung" if worker.is_hung else "crashed",
            },
        )
        await asyncio.to_thread(self._on_death)
        if not (self._is_stopping or worker.is_trial or was_asked):
            self._page.worker_restarts.labels("hung" if worker.is_hung else "crashed").inc()
            was_settled = worker.ready_at is not None and time.monotonic() - worker.ready_at > _SETTLED_S
            await self._replace(worker.slot, is_at_once=was_settled)

    async def _replace(self, slot: int, *, is_at_once: bool) -> None:
        while not self._is_stopping:
            delay_s = 0.0 if is_at_once else self._backoff.died(time.monotonic())
            if delay_s:
                _log.warning("workers keep ending; waiting before the next start", extra={"delay_s": delay_s})
                await asyncio.sleep(delay_s)
            try:
                await self._launch(slot, is_trial=True)
            except WorkerError as error:
                is_at_once = False
                if not self._is_stopping:  # else it was told to end before it was ready
                    _log.error("%s", error)
            else:
                return

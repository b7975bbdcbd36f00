"""Where the pipeline meets the queue: a request for which there is no room becomes a job.

One who asked for it (`x-headgate-on-full: queue`, `service_tier: "flex"`) is answered 202. By a model's rule (`on_full: hold`)
a request waits as a job while its connection stays open, and is answered as if it had never been one; past `hold_s`
it is told to come back, and then takes up the same job. Nobody who did not ask for it is ever answered 202.

While a request is held nothing is sent: any byte would settle the status before it is known (decision 0024). A stream that
has begun gets comments in its silences.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, NamedTuple

from gateway.errors import answer_headers, denial_answer, stream_event
from gateway.inbound import Request
from gateway.intake import Message
from gateway.overflow.config import HoldConfig, QueueConfig
from gateway.overflow.held import Held, HeldStore, scope_of
from gateway.overflow.job import Door, Job, Result
from gateway.overflow.job_view import accepted, ended_badly, still_held
from gateway.overflow.stand_in import Pairs, read_head_event, read_kept_headers
from gateway.overflow.store import QueueStore, StoreAwayError
from gateway.overflow.submit import Submitter, Wish
from gateway.overflow.watching import Watch
from gateway.runtime import Runtime
from gateway.stores.sqlite import StorageError
from policies.access import may_use
from policies.exchange import Caller, Exchange
from policies.verdict import Denial

ASKS_FOR_QUEUE: Final = b"x-headgate-on-full"
_IDEMPOTENCY: Final = b"idempotency-key"
_WEBHOOK: Final = b"x-headgate-webhook"
_RENEW_S: Final = 5.0
_LEASE_S: Final = 15.0  # after which the job of a worker that was killed may be taken up
_LOOK_S: Final = 0.5
_ABANDONED_S: Final = 5.0
_AWAY_S: Final = 2.0
_AWAY: Final = Denial(
    503,
    "queue_unavailable",
    "the queue cannot be asked now; send the same request again",
    retry_after_s=_AWAY_S,
)

_log = logging.getLogger(__name__)


class SpillParts(NamedTuple):
    """What spilling is made of. `hint` is told the lane of a new job, `cancelled` the id of one that is no longer wanted;
    `receivers` names who hears of a tenant's job, given the URL of its request."""

    store: QueueStore
    submitter: Submitter
    held: HeldStore
    receivers: Callable[[str, Door, str], Awaitable[str]]
    watch: Watch
    runtime: Callable[[], Runtime]
    settings: Callable[[], QueueConfig]
    hint: Callable[[str], None]
    cancelled: Callable[[str], None]


class Spill:
    """One per worker. `counts` is what became of requests that found no room."""

    def __init__(self, parts: SpillParts) -> None:
        self.counts = {"accepted": 0, "held": 0, "taken_up": 0, "answered": 0, "sent_away": 0, "left": 0}
        self._parts = parts
        self._may_be_held = True  # something; until it is known that there is nothing
        self._is_closing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Once, when some model may hold requests."""
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look_after(), name="queue-held")

    def close(self) -> None:
        """Whoever is held is told to come back: by then another worker takes requests."""
        self._is_closing.set()

    async def stop(self) -> None:
        self.close()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def park(self, exchange: Exchange, request: Request, message: Message) -> bool | Denial:
        """Makes a job of it, and answers. False: it does not want to be one."""
        model, caller = exchange.model, exchange.caller
        assert model is not None
        asked = asks_for_queue(exchange, request)
        is_held = model.on_full == "hold" or not asked
        if caller is None or message.document is None or not exchange.dialect.is_billed:
            return False
        if not asked and "queue" not in (exchange.on_full, model.on_full) and model.on_full != "hold":
            return False
        try:
            webhook = await self._receivers(caller, request) if asked else ""
        except ValueError as error:
            return Denial(400, "invalid_webhook", f"`x-headgate-webhook`: {error}")
        except (StorageError, StoreAwayError) as error:
            _log.error("a request cannot be queued: %s", error)
            return _AWAY
        # It reserves again when it runs: what it has now would count twice.
        for settle in self._parts.runtime().hooks.settle:
            settle(exchange, time.perf_counter())
        hold = self._parts.settings().hold
        wish = Wish(
            caller=caller,
            path=exchange.dialect.path,
            body=message.body,
            headers=list(request.headers.items()),
            door="job" if asked else "held",
            is_stream=exchange.is_stream,
            keep_s=None if asked else max(60.0, 2 * hold.attach_s),
            # A 202 that got lost: the repetition is told of the same job. Held ones are found by their scope.
            idempotency_key=request.headers.get(_IDEMPOTENCY, b"") if asked else b"",
            webhook=webhook,
        )
        job = await self._parts.submitter.submit(wish)
        if isinstance(job, Denial):
            return job
        self._parts.hint(job.lane)
        exchange.ended = "parked"
        if not is_held:
            await self._accept(job, exchange, request)
            return True
        self.counts["held"] += 1
        scope = scope_of(caller, request.path, message.body, request.headers.get(_IDEMPOTENCY, b""))
        await self._serve(Held(job.id, caller.tenant, scope), exchange, request, hold)
        return True

    async def _receivers(self, caller: Caller, request: Request) -> str:
        url = request.headers.get(_WEBHOOK, b"").decode("latin-1")
        return await self._parts.receivers(caller.tenant, "job", url)

    async def take_up(self, exchange: Exchange, request: Request, message: Message) -> bool:
        """Whether it is the repetition of a request whose job is still there; then it is answered."""
        caller = exchange.caller
        if not self._may_be_held or caller is None or not may_use(caller, exchange.model_name):
            return False
        scope = scope_of(caller, request.path, message.body, request.headers.get(_IDEMPOTENCY, b""))
        parts = self._parts
        try:
            held = await parts.held.take_up(scope, _LEASE_S)
            if held is None:
                return False
            job = await parts.store.get(held.tenant, held.job_id)
            if job is None or job.is_purged or job.state in {"cancelling", "cancelled", "expired", "dead"}:
                await parts.held.forget(held.job_id)
                return False
        except StoreAwayError as error:
            _log.error("a held request cannot be looked for: %s", error)
            return False
        self.counts["taken_up"] += 1
        exchange.ended = "parked"
        await self._serve(held, exchange, request, parts.settings().hold)
        return True

    async def _accept(self, job: Job, exchange: Exchange, request: Request) -> None:
        self.counts["accepted"] += 1
        standing = None
        with contextlib.suppress(StoreAwayError):  # the job is stored all the same
            standing = await self._parts.store.standing(job.tenant, job.id)
        answer = accepted(job, standing, exchange.dialect.family, exchange.request_id)
        exchange.status = answer[0]
        request.respond(*answer)

    async def _serve(self, held: Held, exchange: Exchange, request: Request, hold: HoldConfig) -> None:
        """Until it is answered, has waited long enough, or its client is gone."""
        began_at = time.monotonic()
        audience = _Audience(self._parts.held, held)
        is_answered = False
        try:
            await audience.renew()
            if exchange.is_stream:
                is_answered = await _HeldStream(self._parts.watch, held, exchange, request, hold).relay(
                    audience, self._is_closing
                )
            job = None
            if not is_answered:
                job = await self._ended(held, audience, began_at + hold.hold_s)
            if job is not None:
                is_answered = await self._answer(job, exchange, request)
        except StoreAwayError as error:
            _log.error("a held request cannot be followed: %s", error)
            if request.is_started:
                request.abort()
            else:
                exchange.status = 503
                request.respond(*denial_answer(_AWAY, exchange.dialect.family, exchange.request_id))
        finally:
            exchange.waited_s += time.monotonic() - began_at
            if is_answered and not request.is_gone:
                self.counts["answered"] += 1
                self._later(self._parts.held.forget(held.job_id))
            else:
                self.counts["left" if request.is_gone else "sent_away"] += 1
                self._may_be_held = True
                self._later(self._parts.held.leave(held.job_id))

    async def _ended(self, held: Held, audience: "_Audience", until_at: float) -> Job | None:
        """The job as it stands when it has ended, or when there is no more time."""
        while True:
            now = time.monotonic()
            job = await self._parts.watch.final(
                held.tenant,
                held.job_id,
                min(until_at, now + _RENEW_S) if not self._is_closing.is_set() else now,
            )
            if job is None or job.is_final or time.monotonic() >= until_at or self._is_closing.is_set():
                return job
            await audience.renew()

    async def _answer(self, job: Job, exchange: Exchange, request: Request) -> bool:
        """Whether it was the answer that the request is for."""
        family, request_id = exchange.dialect.family, exchange.request_id
        if not job.is_final:
            standing = await self._parts.store.standing(job.tenant, job.id)
            form = accepted if asks_for_queue(exchange, request) else still_held
            answer = form(job, standing, family, request_id)
            is_answer = form is accepted
        else:
            result = await self._parts.store.result(job.tenant, job.id)
            answer = (
                ended_badly(job, family, request_id)
                if result is None
                else (result.status, own_headers(result, job, exchange), result.body)
            )
            is_answer = True
        exchange.status = answer[0]
        exchange.ready_at = time.perf_counter()
        request.respond(*answer)
        exchange.relayed_at = time.perf_counter()
        return is_answer

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Not to be cut short by the client's going."""
        task = asyncio.get_running_loop().create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_after(self) -> None:
        """Whether there is anything to take up, and the end of what nobody has come back for."""
        abandoned_at = 0.0
        while True:
            try:
                self._may_be_held = await self._parts.held.is_any()
                if self._may_be_held and time.monotonic() - abandoned_at > _ABANDONED_S:
                    abandoned_at = time.monotonic()
                    await self._give_up_abandoned()
            except StoreAwayError as error:
                _log.error("held requests cannot be looked after: %s", error)
                await asyncio.sleep(_AWAY_S)
            await asyncio.sleep(_LOOK_S)

    async def _give_up_abandoned(self) -> None:
        for held in await self._parts.held.abandoned(self._parts.settings().hold.attach_s):
            job = await self._parts.store.get(held.tenant, held.job_id)
            if job is not None and job.door == "held" and not job.is_final:
                await self._parts.store.cancel(held.tenant, held.job_id)
                self._parts.cancelled(held.job_id)


class _Audience:
    """One connection that waits for a job, in the store."""

    def __init__(self, store: HeldStore, held: Held) -> None:
        self._store = store
        self._held = held
        self._renewed_at = 0.0

    async def renew(self) -> None:
        now = time.monotonic()
        if now - self._renewed_at >= _RENEW_S or not self._renewed_at:
            self._renewed_at = now
            await self._store.hold(self._held, _LEASE_S)


class _HeldStream:
    """A stream as its client would have had it, from its journal."""

    def __init__(
        self, watch: Watch, held: Held, exchange: Exchange, request: Request, hold: HoldConfig
    ) -> None:
        self._watch = watch
        self._held = held
        self._exchange = exchange
        self._request = request
        self._hold = hold
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._said_at = time.monotonic()

    async def relay(self, audience: _Audience, is_closing: asyncio.Event) -> bool:
        """Whether it was answered: False where nothing was said yet, and something else is to be."""
        until_at = time.monotonic() + self._hold.hold_s
        request, held = self._request, self._held
        async with contextlib.aclosing(
            self._watch.events(held.tenant, held.job_id, -1, float("inf"))
        ) as events:
            async for event in events:
                await audience.renew()
                if event is None:
                    if not request.is_started and (time.monotonic() >= until_at or is_closing.is_set()):
                        return False
                    self._keep_alive()
                elif (head := read_head_event(event.data)) is None:
                    await self._may_write.wait()
                    self._write(event.data)
                elif request.is_started:
                    break  # another run: what was said cannot be taken back
                else:
                    self._begin(*head)
            else:
                return await self._finish()
        self._break_off()
        return True

    def _begin(self, status: int, headers: Pairs) -> None:
        exchange, request = self._exchange, self._request
        exchange.status = status
        request.start(status, [*headers, *_own(self._held.job_id, exchange)])
        request.on_backpressure(self._may_write.clear, self._may_write.set)

    def _write(self, data: bytes) -> None:
        if not self._exchange.relayed_at:
            self._exchange.ready_at = self._exchange.relayed_at = time.perf_counter()
        self._said_at = time.monotonic()
        self._request.write(data)

    def _keep_alive(self) -> None:
        if self._request.is_started and time.monotonic() - self._said_at >= self._hold.keepalive_s:
            self._said_at = time.monotonic()
            self._request.write(b": waiting\n\n")

    async def _finish(self) -> bool:
        if not self._request.is_started:
            return False
        job = await self._watch.final(self._held.tenant, self._held.job_id, time.monotonic())
        if job is not None and job.state == "succeeded":
            self._request.finish()
        else:
            self._break_off()
        return True

    def _break_off(self) -> None:
        exchange = self._exchange
        message = "the answer is not whole: it broke off"
        self._request.write(
            stream_event(exchange.dialect.name, "upstream_incomplete", message, exchange.request_id)
        )
        self._request.abort()


def asks_for_queue(exchange: Exchange, request: Request) -> bool:
    """The client's own word: only then a 202 is no surprise."""
    word = request.headers.get(ASKS_FOR_QUEUE)
    if word is not None:
        return word.strip().lower() == b"queue"
    return is_flex(exchange)


def is_flex(exchange: Exchange) -> bool:
    document = exchange.document
    return document is not None and bytes(document.values.get("service_tier", b"")) == b'"flex"'


def own_headers(result: Result, job: Job, exchange: Exchange) -> list[tuple[bytes, bytes]]:
    """Those of the answer as it was kept, and what is of this request."""
    return [*read_kept_headers(result.headers), *_own(job.id, exchange)]


def _own(job_id: str, exchange: Exchange) -> list[tuple[bytes, bytes]]:
    return [
        *answer_headers(exchange.dialect.family, exchange.request_id),
        (b"x-headgate-job", job_id.encode()),
    ]


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except StoreAwayError as error:
        _log.error("held requests: %s", error)

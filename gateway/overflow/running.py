"""One run of a job, from its claim to its end: a request without a client, through the stages every request goes through.

Owns what the end of a run means: which failures count as attempts and which are only a lack of room, how long to wait
before the next, what was waste and what is billed. The run itself is the pipeline's. Invariants: nothing of a run is
billed, counted or given back before the store has taken its end; a run whose lease is lost ends at once and costs its
caller nothing; all runs of a job are one row under the job's id.

A run is an attempt if it failed and the upstream had it: a connection that failed or broke, a time-out, 408, 5xx, a
stream that did not end. 429, an engine that says it is full and a limit of ours are no attempts; what is wrong with the
request itself ends the job.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

import msgspec

from backends.errors import LOAD_STATUSES
from gateway.errors import denial_answer
from gateway.http_rules import Refusal
from gateway.inbound import Request
from gateway.intake import PROBLEMS, Message
from gateway.ledger_row import LedgerRow
from gateway.overflow.admission import BY_PATH, decode_headers, fill
from gateway.overflow.job import Claimed, Failure, Job, Lease, Outcome, Result
from gateway.overflow.stand_in import Transcript, stand_in
from gateway.overflow.store import (
    LeaseLostError,
    OutOfOrderError,
    QueueStore,
    ResultTooLargeError,
    StoreAwayError,
)
from gateway.runtime import Runtime
from gateway.settle import Settler
from policies.exchange import Exchange
from policies.verdict import Denial
from policies.waste import Waste

Handle = Callable[[Request, Exchange, str, Message | None], Awaitable[None]]
# Why a run is stopped from outside.
Stop = Literal["cancelled", "lost", "drained"]

# With full jitter from one second up to a bound that doubles; what asks for more gets up to the last of these.
LONGEST_RETRY_S: Final = 60.0
_LONGEST_ASKED_S: Final = 600.0
_NO_ROOM_S: Final = 1.0
_JOURNAL_EVERY_S: Final = 0.05
_AWAY_S: Final = 1.0
_LOAD_CODES: Final = frozenset({"pool_full", "room_full", "wait_timeout", "no_endpoint", "no_queue"})
_COUNTED_STATUSES: Final = frozenset({408, 425})
_ERROR_CHARACTERS: Final = 300

_log = logging.getLogger(__name__)


class Carried(msgspec.Struct, array_like=True):
    """What earlier runs of a job leave for its row."""

    attempts: int = 0
    waste: list[Waste] = []


class Ended(NamedTuple):
    """How a run ended, for who decides about the next ones. `headers` are the upstream's.

    `kind`: it answered; it refused for load; anything else.
    """

    kind: Literal["answered", "refused", "other"]
    pool: str
    retry_after_s: float | None
    headers: Sequence[tuple[bytes, bytes]]
    job: Job | None  # as it stands now; None: nobody here knows


class _Error(msgspec.Struct):
    message: str = ""


class _Body(msgspec.Struct):
    error: _Error | str | None = None
    usage: msgspec.Raw = msgspec.Raw()


_read_body = msgspec.json.Decoder(_Body).decode
_encode_row = msgspec.msgpack.Encoder().encode
_read_carried = msgspec.msgpack.Decoder(Carried).decode
read_row = msgspec.msgpack.Decoder(LedgerRow).decode


class Run:
    """One claimed job. `stop` may be called while `run` is awaited."""

    def __init__(self, claimed: Claimed, limit_bytes: int) -> None:
        self.job = claimed.job
        self.lease: Lease = claimed.lease
        self.claimed = claimed
        self.claimed_at = time.monotonic()
        self.stopped: Stop | None = None
        self.exchange: Exchange | None = None
        self.transcript = Transcript(limit_bytes, is_journaled=claimed.job.is_stream)
        self.journaled = 0  # events so far, as far as we know
        self.handled: asyncio.Task[None] | None = None

    def stop(self, reason: Stop) -> None:
        """The upstream's connection is closed at once. The first reason counts."""
        if self.stopped is None:
            self.stopped = reason
            if self.handled is not None:
                self.handled.cancel()

    @property
    def is_sent(self) -> bool:
        """Whether the engine has it: before that, nobody counts it but us."""
        return self.exchange is not None and self.exchange.dispatched_at > 0.0


class Runner:
    """Runs jobs. One per worker. `on_change` is told the id of a job that has something new to read."""

    def __init__(
        self,
        store: QueueStore,
        handle: Handle,
        settler: Settler,
        runtime: Callable[[], Runtime],
        on_change: Callable[[str], None],
    ) -> None:
        self._store = store
        self._handle = handle
        self._settler = settler
        self._runtime = runtime
        self._on_change = on_change

    async def run(self, run: Run, *, waits: bool) -> Ended:
        """To its end, which the store has when this returns; never raises but when it is cancelled.

        `waits`: it may wait for room like a request of the lowest class.
        """
        runtime = self._runtime()
        job = run.job
        exchange = run.exchange = Exchange(
            f"{job.id}.{job.runs}", BY_PATH[job.path], time.perf_counter(), time.time()
        )
        refusal = self._prepare(run, exchange, runtime)
        if isinstance(refusal, Denial):
            answer = denial_answer(refusal, exchange.dialect.family, exchange.request_id)
            result = Result(status=answer[0], headers=b"[]", body=answer[2])
            ended = await self._end(
                run, Outcome(state="failed", result=result, error=refusal.message, units=0)
            )
            return Ended("other", "", None, (), ended)
        exchange.on_full = "wait" if waits else "reject"
        await self._carry(run, exchange, refusal)
        try:
            ended = await self._settle(run, exchange)
        finally:
            self._settler.conclude(exchange, runtime)
        return self._told(run, exchange, ended)

    def _prepare(self, run: Run, exchange: Exchange, runtime: Runtime) -> Message | Denial:
        """Identify and read, as far as that is still to be done."""
        found = runtime.keyring.find_by_id(run.job.key_id)
        if isinstance(found, str):
            return Denial(403 if found == "blocked" else 401, f"key_{found}", PROBLEMS[found])
        exchange.caller = found
        exchange.is_async = run.job.door != "held"
        exchange.is_batch = run.job.job_class == "batch"
        headers = decode_headers(run.claimed.headers)
        try:
            message = fill(exchange, headers, run.claimed.body, runtime)
        except Refusal as refusal:
            return Denial(refusal.status, refusal.code, refusal.message, refusal.param)
        exchange.priority, exchange.ceiling = len(runtime.ceilings) - 1, runtime.ceilings[-1]
        # A rule's priority is for those who wait at the door; this one has waited already.
        headers[b"x-headgate-priority"] = b"bulk"
        exchange.headers = headers
        if run.claimed.carried:
            carried = _read_carried(run.claimed.carried)
            exchange.attempts, exchange.waste = carried.attempts, carried.waste or None
        return message

    async def _carry(self, run: Run, exchange: Exchange, message: Message) -> None:
        """Through the pipeline, and until its usage is known."""
        priced: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        exchange.on_priced = lambda: None if priced.done() else priced.set_result(None)
        request = stand_in(run.job.path, dict(exchange.headers or {}), run.transcript)
        handled = run.handled = asyncio.ensure_future(self._handle(request, exchange, "", message))
        if run.stopped is not None:
            handled.cancel()
        try:
            while not handled.done():
                await asyncio.wait({handled}, timeout=_JOURNAL_EVERY_S if run.job.is_stream else None)
                # What a broken stream said last is not worth reading: another run follows.
                if run.job.is_stream and exchange.ended != "incomplete" and run.stopped != "lost":
                    await self._append(run, run.transcript.take_events(is_last=handled.done()))
            if not exchange.ended_at:
                exchange.ended = "drained"  # stopped before its first step
                return
            await priced
        finally:
            handled.cancel()

    async def _settle(self, run: Run, exchange: Exchange) -> Job | None:
        """Says what the end of the run means for its job, and has the store take it."""
        stopped = run.stopped
        if stopped == "lost":
            self._waste(exchange, "lease_lost")
            return None
        if stopped == "drained" and exchange.ended != "completed":
            self._waste(exchange, "drained")
            await self._store_op(run, lambda: self._store.release([run.lease]))
            return None
        if stopped == "cancelled" and exchange.ended != "completed":
            return await self._end(run, self._outcome(run, exchange, "cancelled"))
        failure = failure_of(exchange, run.transcript, run.job)
        if failure is None:
            state: Literal["succeeded", "failed"] = "succeeded" if exchange.status < 400 else "failed"
            return await self._end(run, self._outcome(run, exchange, state))
        if exchange.ended == "incomplete":  # what was delivered of it counts for nothing
            self._waste(exchange, exchange.error_kind or exchange.ended)
        exchange.usage, exchange.cost_nanousd, exchange.saved_nanousd = None, 0, 0
        return await self._fail(run, exchange, failure)

    def _waste(self, exchange: Exchange, reason: str) -> None:
        """What the run used is nobody's to pay but ours."""
        cost_nanousd, candidate = exchange.cost_nanousd, exchange.candidate
        if candidate is not None and exchange.dispatched_at:
            took_us = int((exchange.ended_at - exchange.sent_at) * 1e6)
            self._settler.note_waste(exchange, Waste(candidate.endpoint.name, reason, took_us, cost_nanousd))
        exchange.usage, exchange.cost_nanousd, exchange.saved_nanousd = None, 0, 0

    def _outcome(
        self, run: Run, exchange: Exchange, state: Literal["succeeded", "failed", "cancelled"]
    ) -> Outcome:
        transcript = run.transcript
        result = None
        if state != "cancelled":
            result = Result(status=transcript.status, headers=transcript.kept_headers(), body=transcript.body)
        told = _told_in(transcript)
        usage = exchange.usage
        return Outcome(
            state=state,
            result=result,
            error=_error_text(exchange, told) if state == "failed" else "",
            units=usage.prompt_tokens + usage.output_tokens if usage is not None else 0,
            cost_nanousd=exchange.cost_nanousd,
            usage=bytes(told.usage) if told is not None and state == "succeeded" else b"",
            ledger_row=self._row(run, exchange) if exchange.dispatched_at else b"",
        )

    async def _end(self, run: Run, outcome: Outcome) -> Job | None:
        if outcome.result is not None and run.transcript.is_too_large:
            outcome = _too_large(outcome)
        try:
            return await self._store_op(run, lambda: self._store.finish(run.lease, outcome))
        except ResultTooLargeError:
            outcome = _too_large(outcome)
            return await self._store_op(run, lambda: self._store.finish(run.lease, outcome))

    async def _fail(self, run: Run, exchange: Exchange, failure: Failure) -> Job | None:
        carried = Carried(exchange.attempts, exchange.waste or [])
        transcript = run.transcript
        result = None
        if transcript.status and not transcript.is_stream and not transcript.is_too_large:
            result = Result(status=transcript.status, headers=transcript.kept_headers(), body=transcript.body)
        failure = msgspec.structs.replace(
            failure,
            carried=msgspec.msgpack.encode(carried),
            result=result,
            cost_nanousd=0,
            ledger_row=self._row(run, exchange) if exchange.dispatched_at else b"",
        )
        return await self._store_op(run, lambda: self._store.fail(run.lease, failure))

    def _row(self, run: Run, exchange: Exchange) -> bytes:
        job, run_id = run.job, exchange.request_id
        exchange.request_id = job.id
        try:
            row = self._settler.row_of_job(exchange)
        finally:
            exchange.request_id = run_id  # which the log has of this run
        waited_s = (job.started_time or job.submitted_time) - job.submitted_time
        return _encode_row(msgspec.structs.replace(row, waited_us=max(0, int(waited_s * 1e6))))

    async def _store_op(self, run: Run, operation: Callable[[], Awaitable[Any]]) -> Job | None:
        """Again and again while the store is away: the lease says until when it makes sense."""
        while True:
            try:
                found = await operation()
            except LeaseLostError:
                exchange = run.exchange
                if exchange is not None:
                    self._waste(exchange, "lease_lost")
                _log.warning("a run ended after its job was another's", extra={"request_id": run.job.id})
                return None
            except StoreAwayError as error:
                _log.error("the end of a run waits for the queue's store: %s", error)
                await asyncio.sleep(_AWAY_S)
                continue
            self._on_change(run.job.id)
            return found if isinstance(found, Job) else None

    async def _append(self, run: Run, events: list[bytes]) -> None:
        """To the journal of its stream, as they come, a few at a time."""
        if not events:
            return
        is_in_doubt = False  # whether the store took them before it went away
        while events:
            try:
                await self._store.append_events(run.lease, run.journaled, events)
            except OutOfOrderError as error:
                taken = error.expected - run.journaled
                if is_in_doubt and 0 < taken <= len(events) and (run.journaled or run.job.runs <= 1):
                    events = events[taken:]
                run.journaled = error.expected  # where it was not in doubt, an earlier run has written some
            except LeaseLostError:
                run.stop("lost")
                return
            except StoreAwayError as error:
                is_in_doubt = True
                _log.error("events of a stream wait for the queue's store: %s", error)
                await asyncio.sleep(_AWAY_S)
            else:
                run.journaled += len(events)
                break
        self._on_change(run.job.id)

    def _told(self, run: Run, exchange: Exchange, job: Job | None) -> Ended:
        candidate = exchange.candidate
        pool = candidate.target.pool.name if candidate is not None else ""
        is_refused = exchange.status in LOAD_STATUSES and exchange.ended == "completed"
        kind: Literal["answered", "refused", "other"] = "other"
        if is_refused:
            kind = "refused"
        elif exchange.ended == "completed" and exchange.status < 400:
            kind = "answered"
        after = _asked_s(run.transcript) if is_refused else None
        return Ended(kind, pool, after, exchange.upstream_headers, job)


def failure_of(
    exchange: Exchange, transcript: Transcript, job: Job, draw: float | None = None
) -> Failure | None:
    """Why and when a job must be run again; None: this was its end. `draw` is random, from 0 to 1."""
    draw = random.random() if draw is None else draw  # noqa: S311 - only jitter, no secret
    status, ended = transcript.status or exchange.status, exchange.ended
    told = _told_in(transcript) if not transcript.is_stream else None
    error = _error_text(exchange, told)
    if ended == "completed" and status in LOAD_STATUSES:
        asked_s = _asked_s(transcript)
        retry_in_s = (
            asked_s if asked_s is not None else _NO_ROOM_S + draw * _backoff_s(job.runs - job.attempts)
        )
        return Failure(error=error, retry_in_s=retry_in_s, is_counted=False)
    if ended == "denied":
        if exchange.error_kind in _LOAD_CODES:
            return Failure(error=error, retry_in_s=_NO_ROOM_S * (0.5 + draw), is_counted=False)
        if status in {429, 503}:  # a limit of ours: its time is known
            asked_s = _asked_s(transcript) or LONGEST_RETRY_S
            return Failure(error=error, retry_in_s=asked_s * (1.0 + 0.1 * draw), is_counted=False)
        return None
    is_counted = ended in {"upstream_failed", "incomplete", "failed", "client_gone", "drained"} or (
        ended == "completed" and (status >= 500 or status in _COUNTED_STATUSES)
    )
    if not is_counted:
        return None
    asked_s = _asked_s(transcript)
    jittered_s = 1.0 + draw * (_backoff_s(job.attempts + 1) - 1.0)
    return Failure(error=error, retry_in_s=max(jittered_s, asked_s or 0.0))


def _backoff_s(attempt: int) -> float:
    return min(LONGEST_RETRY_S, 2.0 ** min(max(attempt, 1), 10))


def _asked_s(transcript: Transcript) -> float | None:
    """`retry-after` of an answer: `-ms`, or whole seconds. Ours is always both."""
    for name, unit_s in ((b"retry-after-ms", 0.001), (b"retry-after", 1.0)):
        value = transcript.header(name)
        if value is not None and value.strip().isdigit():
            return min(float(value) * unit_s, _LONGEST_ASKED_S)
    return None


def _told_in(transcript: Transcript) -> _Body | None:
    """What a whole JSON answer says of its usage or its failure."""
    try:
        return _read_body(transcript.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _error_text(exchange: Exchange, told: _Body | None) -> str:
    """One line for its caller; nothing of the request is in it."""
    message = ""
    if told is not None and told.error is not None:
        message = told.error if isinstance(told.error, str) else told.error.message
    kind = exchange.error_kind or (f"status {exchange.status}" if exchange.status else exchange.ended)
    line = " ".join((message or kind).split())
    return line[:_ERROR_CHARACTERS]


def _too_large(outcome: Outcome) -> Outcome:
    """The work was done and is paid for; its answer cannot be kept."""
    return msgspec.structs.replace(
        outcome, state="failed", result=None, error="the answer is larger than the queue keeps"
    )

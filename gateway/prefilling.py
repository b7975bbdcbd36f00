"""The first of two calls: a prompt computed by another engine, and what becomes of it.

Owns the call that computes, the collecting call's first look at its answer, and the release of what nobody collects.
Refuses to know who is chosen (`policies.placement.prefill`) and what follows a failure (`gateway.sending`). Nothing here
fails a request: without a handover the engine that answers computes the prompt itself.

Invariants: what was computed is collected at most once (a second reader could find another prompt's cache there), only
while its lease is young, and where it is not collected it is given back, or waits for the end of its lease.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Final

from backends.adapter import Edits, encode, head
from backends.errors import LOAD_STATUSES, UpstreamError
from backends.kv_transfer import brief, has_begun, params_in, to_collect, to_compute
from backends.pool import Endpoint, Pool
from backends.retry_after import retry_after_s
from backends.tap import Tap
from backends.transport import Deadlines, Reply
from gateway.inbound import Request
from gateway.intake import Message
from gateway.relay import is_stream
from gateway.runtime import Runtime
from gateway.settle import Settler
from gateway.telemetry import Telemetry
from policies.exchange import Exchange
from policies.health.endpoint import Attempt
from policies.placement.prefill import Prefill
from policies.retry import KEY_STATUSES

# Of every request, whatever its prompt: what makes a short one's pace comparable with a long one's.
LEAST_WORK_TOKENS: Final = 256
_ANSWER_BYTES: Final = 1 << 20
_FULL_PAUSE_S: Final = 1.0
# Of a lease: what is older may be gone before the other engine has begun to read it.
_YOUNG: Final = 0.5
_RELEASE_S: Final = 10.0


class UncollectedError(Exception):
    """The engine that was to collect a prompt answered with this status: without it, it may answer well."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


class Handover:
    """A prompt that was computed for one request, and waits to be collected. `edits` are those of the brief request."""

    __slots__ = (
        "attempt",
        "computed_at",
        "edits",
        "is_collected",
        "params",
        "pool",
        "prefill",
        "until_at",
        "us",
    )

    def __init__(
        self, prefill: Prefill, pool: Pool, params: bytes, edits: Edits, sent_at: float, lease_s: float
    ) -> None:
        now = time.perf_counter()
        self.prefill = prefill
        self.pool = pool
        self.params = params
        self.edits = edits
        self.us = int((now - sent_at) * 1e6)
        self.until_at = now + _YOUNG * lease_s
        self.attempt: Attempt | None = None
        self.is_collected = False

    def collect(self) -> None:
        """It is being asked for now."""
        self.is_collected = True

    def is_good(self, pool: Pool) -> bool:
        """Whether an endpoint of this pool may collect it."""
        return not self.is_collected and pool is self.pool and time.perf_counter() < self.until_at


class Prefilling:
    """One per worker. `counts` is by pool and by what became of a prompt that might have been computed elsewhere."""

    def __init__(self, settler: Settler) -> None:
        self.counts: dict[tuple[str, str], int] = {}
        self._settler = settler
        self._releases: set[asyncio.Task[None]] = set()

    async def prefill(
        self,
        exchange: Exchange,
        request: Request,
        message: Message,
        runtime: Runtime,
        edits: Edits | None,
    ) -> Handover | None:
        """Has the prompt computed for the exchange's candidate. None: the candidate is to do it."""
        candidate = exchange.candidate
        assert candidate is not None
        target, prefillers = candidate.target, candidate.target.prefillers
        assert prefillers is not None
        assert message.document is not None or exchange.document is None
        now = time.perf_counter()
        chosen = prefillers.choose(exchange, target, runtime.health, now)
        if isinstance(chosen, str) or message.document is None:
            self._count(target.pool, chosen if isinstance(chosen, str) else "unfit")
            return None
        shortened = brief(exchange.dialect, message.document.values, edits)
        encoded = encode(
            chosen.endpoint,
            exchange.dialect,
            target.model_json,
            message.document,
            is_stream=False,
            edits=to_compute(shortened),
        )
        health = runtime.health.of(chosen.endpoint)
        hold = prefillers.take(chosen, now)
        attempt = None
        if health is not None:
            attempt = health.attempt(now, LEAST_WORK_TOKENS + chosen.endpoint.uncached_tokens)
        exchange.sent_at = now
        try:
            reply, answer = await _ask(
                exchange, request, chosen.endpoint, encoded.body, prefillers.settings.timeout_s
            )
        except UpstreamError as error:
            self._failed(exchange, chosen.endpoint, error, attempt)
            return None
        except asyncio.CancelledError:
            self._count(target.pool, "left")  # its connection is closed, which aborts it there
            if attempt is not None:
                attempt.abandoned()
            raise
        finally:
            hold.release()
        if attempt is not None:
            attempt.heard(time.perf_counter())
        params = params_in(answer) if reply.status == 200 else None
        if params is None:
            self._refused(exchange, chosen.endpoint, reply, attempt, runtime)
            return None
        handover = Handover(chosen, target.pool, params, shortened, now, prefillers.settings.lease_s)
        handover.attempt = attempt
        return handover

    async def collect(
        self,
        exchange: Exchange,
        request: Request,
        message: Message,
        handover: Handover,
        call: tuple[bytes, bytes, Deadlines],
    ) -> Reply:
        """The second call, to the exchange's candidate. UncollectedError if that cannot answer with what was computed."""
        assert exchange.candidate is not None
        endpoint = exchange.candidate.endpoint
        try:
            reply = await endpoint.connections.send(*call, handover.collect)
        except UpstreamError:
            if handover.is_collected:
                self._wasted(exchange, handover, "")
            raise
        except asyncio.CancelledError:
            self._left(exchange, request, message, handover)
            raise
        if reply.status >= 400:
            is_refused = reply.status in LOAD_STATUSES or reply.status in KEY_STATUSES
            reason = "" if is_refused or reply.status < 500 else str(reply.status)
            self._wasted(exchange, handover, reason)
            if not is_refused:
                reply.close()
                raise UncollectedError(reply.status)
            return reply
        if is_stream(reply):
            await self._begin(exchange, handover, reply)
        self._count(handover.pool, "served")
        exchange.prefilled_by = handover.prefill.endpoint.name
        exchange.prefill_us = handover.us
        exchange.predicted_cached_tokens = handover.prefill.cached_tokens
        if handover.attempt is not None:
            handover.attempt.succeeded(time.perf_counter())
        return reply

    async def stop(self) -> None:
        """Leaves what is being given back to the end of its lease."""
        for task in self._releases:
            task.cancel()
        if self._releases:
            await asyncio.wait(self._releases)

    async def _begin(self, exchange: Exchange, handover: Handover, reply: Reply) -> None:
        """The head of a stream says nothing yet of whether the prompt came."""
        try:
            beginning = await reply.first(has_begun(exchange.dialect))
        except BaseException:
            reply.close()
            raise
        tap = Tap(exchange.dialect, strips_usage=False)
        tap.feed(beginning)
        if tap.error is not None:
            reply.close()
            self._wasted(exchange, handover, "500")
            raise UncollectedError(500)

    def _left(self, exchange: Exchange, request: Request, message: Message, handover: Handover) -> None:
        """The client went. A collecting call that was under way is aborted there, which gives back; else we see to it."""
        self._count(handover.pool, "left")
        if handover.attempt is not None:
            handover.attempt.abandoned()
        if not handover.is_collected:
            task = asyncio.get_running_loop().create_task(self._release(exchange, request, message, handover))
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def _release(
        self, exchange: Exchange, request: Request, message: Message, handover: Handover
    ) -> None:
        """The protocol has no word for it: what is collected is free, so one token is asked for."""
        candidate = exchange.candidate
        assert candidate is not None
        assert message.document is not None
        body = encode(
            candidate.endpoint,
            exchange.dialect,
            candidate.target.model_json,
            message.document,
            is_stream=False,
            edits=to_collect(handover.params, handover.edits),
        ).body
        handover.collect()
        try:
            await _ask(exchange, request, candidate.endpoint, body, _RELEASE_S)
        except UpstreamError:
            return  # the lease ends by itself

    def _failed(
        self, exchange: Exchange, endpoint: Endpoint, error: UpstreamError, attempt: Attempt | None
    ) -> None:
        assert exchange.candidate is not None
        now = time.perf_counter()
        self._count(exchange.candidate.target.pool, "timeout" if "timeout" in error.kind else "failed")
        self._settler.prefill_failed(exchange, endpoint, error, now)
        if attempt is not None:
            attempt.failed(now, error.kind)

    def _refused(
        self,
        exchange: Exchange,
        endpoint: Endpoint,
        reply: Reply,
        attempt: Attempt | None,
        runtime: Runtime,
    ) -> None:
        """An answer, but none that says where the prompt's cache is."""
        assert exchange.candidate is not None
        now, status = time.perf_counter(), reply.status
        is_full = status in LOAD_STATUSES
        is_broken = status < 300 or (status >= 500 and not is_full)
        self._count(
            exchange.candidate.target.pool, "busy" if is_full else "failed" if is_broken else "refused"
        )
        self._settler.prefill_failed(exchange, endpoint, status, now)
        if attempt is not None and is_broken:
            attempt.failed(now, str(status) if status >= 500 else "unusable")
        elif attempt is not None:
            attempt.abandoned()
        health = runtime.health.of(endpoint)
        if is_full and health is not None:
            health.cool(now, retry_after_s(reply, time.time()) or _FULL_PAUSE_S)

    def _wasted(self, exchange: Exchange, handover: Handover, reason: str) -> None:
        """It was computed for nothing. `reason`: what the other engine said of it; empty: it is not to blame."""
        self._count(handover.pool, "uncollected")
        self._settler.prefill_unused(exchange, handover.prefill.endpoint, handover.us)
        if handover.attempt is not None and reason:
            handover.attempt.failed(time.perf_counter(), reason)
        elif handover.attempt is not None:
            handover.attempt.abandoned()

    def _count(self, pool: Pool, outcome: str) -> None:
        key = (pool.name, outcome)
        self.counts[key] = self.counts.get(key, 0) + 1


def watch_prefills(telemetry: Telemetry, counts: Mapping[tuple[str, str], int]) -> None:
    """For the metrics page."""
    telemetry.watch(
        "headgate_prefills_total",
        "counter",
        "Requests to pools that compute prompts apart, by what became of that.",
        lambda: counts,
        ("pool", "outcome"),
    )


async def _ask(
    exchange: Exchange, request: Request, endpoint: Endpoint, body: bytes, timeout_s: float
) -> tuple[Reply, bytes]:
    """A brief request and its whole answer. UpstreamError if there is none in time."""
    start = head(
        endpoint,
        "POST",
        endpoint.provider.paths[exchange.dialect.name],
        request.headers,
        len(body),
        exchange.request_id,
    )
    limits = Deadlines(min(timeout_s, endpoint.deadlines.connect_s), timeout_s, timeout_s, timeout_s)
    reply = await endpoint.connections.send(start, body, limits)
    return reply, await reply.read(_ANSWER_BYTES)

"""The send stage: attempts at the candidates until one answers, or until none may follow.

Owns encoding and dispatch, and what each outcome says of an endpoint and of the key it was sent with. While nothing
has been relayed an attempt may be followed by another (`policies.retry`); an unstreamed answer is therefore read whole
here, and a stream counts as an answer with its first byte. Refuses to know how candidates were chosen.
"""

import asyncio
import random
import time
from time import perf_counter
from typing import Final, NamedTuple

import msgspec

from backends.adapter import Edits, Encoded, encode, head
from backends.errors import LOAD_STATUSES, UpstreamError
from backends.kv_transfer import to_collect
from backends.orca import HEADER
from backends.pool import Endpoint, Pool
from backends.retry_after import retry_after_s
from backends.transport import Reply
from gateway.inbound import Request
from gateway.intake import Message
from gateway.prefilling import LEAST_WORK_TOKENS, Handover, Prefilling, UncollectedError
from gateway.relay import is_stream, read_whole, take_whole
from gateway.runtime import Runtime
from gateway.settle import Settler
from policies.engine_priority import prioritised, with_priority
from policies.exchange import Exchange
from policies.health.book import HealthBook
from policies.health.endpoint import Attempt
from policies.placement.place import take
from policies.placement.saturation import has_room
from policies.retry import KEY_STATUSES, RETRYABLE_STATUSES, RetryBudget, backoff_s, may_retry
from policies.routing import Candidate
from policies.session import salted

# One generated token takes an engine as long as so many of a prompt.
_TOKEN_WORK: Final = 64
# An endpoint that is full, and does not say until when.
_FULL_PAUSE_S: Final = 1.0
# A key that is not accepted at all is not soon accepted again.
_KEY_PAUSE_S: Final = 60.0
# With less of the request's time left no attempt makes sense.
_LEAST_TIME_S: Final = 0.05


class Sent(NamedTuple):
    """An answer of which nothing has been relayed. `body` is there if the answer has been read already."""

    reply: Reply
    strips_usage: bool
    body: bytes | None = None
    is_stream: bool = False


class _Course(msgspec.Struct):
    """What has been tried for one request. `tries` counts what `policies.retry` counts: other keys do not."""

    candidates: list[Candidate]
    began_at: float
    now: float  # when the attempt under way began
    tries: int = 0
    tried: list[Endpoint] = []
    handover: Handover | None = None  # the prompt, computed by another engine
    is_plain: bool = False  # no other engine computes it any more


class Sending:
    """Sends requests. One per worker. `counts` is what became of failed attempts, since its start."""

    def __init__(self, settler: Settler) -> None:
        self.counts = {"retried": 0, "fell_back": 0, "rotated": 0, "no_budget": 0}
        self.prefilling = Prefilling(settler)
        self._settler = settler
        self._budgets: dict[str, RetryBudget] = {}

    async def send(
        self,
        exchange: Exchange,
        request: Request,
        message: Message,
        candidates: list[Candidate],
        runtime: Runtime,
    ) -> Sent:
        """The first good answer, else the last bad one. UpstreamError if the last attempt brought none."""
        candidate = candidates[0]
        now = perf_counter()
        course = _Course(candidates, now, now)
        self._budget(candidate).count(now)
        while True:
            course.tries += 1
            key = candidate.endpoint.api_key
            sent: Sent | None = None
            failure: UpstreamError | int
            try:
                sent = await self._attempt(exchange, request, message, candidate, runtime, course)
            except UncollectedError as uncollected:
                # Once, and to the same endpoint: nothing says that it is ill.
                self._be_plain(exchange, uncollected.status, course)
                course.now = perf_counter()
                continue
            except UpstreamError as error:
                failure = error
            else:
                failure = sent.reply.status
                if failure < 400:
                    return sent
            following = self._after(exchange, sent, failure, key, runtime.health, course)
            if following is None:
                if sent is None:
                    assert isinstance(failure, UpstreamError)
                    raise failure
                return sent
            if sent is not None:
                sent.reply.close()
            self._settler.attempt_failed(exchange, failure)
            if following is not candidate:
                exchange.place_reason = "retry" if following.target is candidate.target else "fallback"
                await asyncio.sleep(backoff_s(course.tries, random.random()))  # noqa: S311 - only jitter, no secret
            candidate = following
            course.now = perf_counter()

    async def _attempt(
        self,
        exchange: Exchange,
        request: Request,
        message: Message,
        candidate: Candidate,
        runtime: Runtime,
        course: _Course,
    ) -> Sent:
        endpoint, target = candidate.endpoint, candidate.target
        exchange.attempts += 1
        exchange.candidate = candidate
        exchange.sent_at = now = course.now
        exchange.hold = hold = take(exchange, candidate, now)
        edits = exchange.edits if target.pool.is_plain else _edits(exchange, target.pool, runtime)
        handover: Handover | None = None
        deadlines = target.deadlines or endpoint.deadlines
        if course.tried or target.prefillers is not None:
            if target.prefillers is not None:
                handover = await self._prefill(exchange, request, message, runtime, course)
                exchange.sent_at = now = perf_counter()
                if handover is not None:
                    edits = to_collect(handover.params, edits)
            # A request's whole time is for all of its attempts together.
            deadlines = deadlines._replace(total_s=deadlines.total_s - (now - course.began_at))
        health = runtime.health.of(endpoint)
        attempt: Attempt | None = None
        if health is not None:
            attempt = health.attempt(now, LEAST_WORK_TOKENS + endpoint.uncached_tokens)
        exchange.attempt = attempt
        encoded = _encode(exchange, candidate, message, edits)
        start = _head(exchange, request, message, candidate, len(encoded.body))
        if not exchange.dispatched_at:
            self._open(exchange)
        if handover is None:
            reply = await endpoint.connections.send(start, encoded.body, deadlines)
        else:
            call = (start, encoded.body, deadlines)
            reply = await self.prefilling.collect(exchange, request, message, handover, call)
        exchange.status = status = reply.status
        exchange.first_byte_at = now = perf_counter()
        hold.prefilled()
        if endpoint.orca is not None:
            endpoint.orca.heed(endpoint, reply.header(HEADER), now)
        if attempt is not None:
            attempt.heard(now)
        if status >= 400 or is_stream(reply):
            return Sent(reply, encoded.strips_usage, is_stream=status < 400)
        body = take_whole(exchange, reply, runtime.response_bytes)
        if body is None:
            body = await read_whole(exchange, reply, runtime.response_bytes)
        if attempt is not None and exchange.usage is not None:
            attempt.add_work(_TOKEN_WORK * exchange.usage.output_tokens)
        return Sent(reply, encoded.strips_usage, body)

    def _open(self, exchange: Exchange) -> None:
        exchange.dispatched_at = perf_counter()
        self._settler.open(exchange)

    async def _prefill(
        self, exchange: Exchange, request: Request, message: Message, runtime: Runtime, course: _Course
    ) -> Handover | None:
        """The prompt, computed by another engine for the exchange's candidate. None: the candidate will."""
        candidate = exchange.candidate
        assert candidate is not None
        handover = course.handover
        if not course.is_plain and (handover is None or not handover.is_good(candidate.target.pool)):
            if not exchange.dispatched_at:
                self._open(exchange)
            edits = _edits(exchange, candidate.target.pool, runtime)
            handover = await self.prefilling.prefill(exchange, request, message, runtime, edits)
        course.handover = handover
        course.is_plain = handover is None
        if handover is not None and exchange.hold is not None:
            exchange.hold.prefilled()  # nothing of it is left to compute here
        return handover

    def _be_plain(self, exchange: Exchange, status: int, course: _Course) -> None:
        """What was computed elsewhere is of no use: the next attempt is an ordinary one."""
        self._settler.waste(exchange, status, perf_counter())
        self._settler.attempt_failed(exchange, status)
        if exchange.attempt is not None:
            exchange.attempt.abandoned()
        course.handover, course.is_plain = None, True
        course.tries -= 1

    def _after(
        self,
        exchange: Exchange,
        sent: Sent | None,
        failure: UpstreamError | int,
        key: str | None,
        health: HealthBook,
        course: _Course,
    ) -> Candidate | None:
        """Holds a failed attempt against whom it concerns; where the next one goes, None: nowhere."""
        now = perf_counter()
        failed = exchange.candidate
        assert failed is not None
        endpoint = failed.endpoint
        pause_s = _judge(exchange, sent, failure, now)
        if failure in RETRYABLE_STATUSES or failure in KEY_STATUSES or sent is None:
            self._settler.waste(exchange, failure, now)
        if failure in KEY_STATUSES and endpoint.rotate(key, now, pause_s or _KEY_PAUSE_S):
            self.counts["rotated"] += 1
            course.tries -= 1  # bounded all the same: each key is refused once
            return failed
        course.tried.append(endpoint)
        known = health.of(endpoint)
        if pause_s and known is not None:
            known.cool(now, pause_s)
        total_s = (failed.target.deadlines or endpoint.deadlines).total_s
        has_time = now - course.began_at < total_s - _LEAST_TIME_S
        if not has_time or not may_retry(course.tries, failure):
            return None
        return self._following(exchange, course, failure, health, now)

    def _following(
        self,
        exchange: Exchange,
        course: _Course,
        failure: UpstreamError | int,
        health: HealthBook,
        now: float,
    ) -> Candidate | None:
        """The next candidate that was not tried and is believed to be well.

        Within a target it is a retry, and needs something left of the budget. What was refused for load goes only
        where there is room, or the load would be sent around in circles.
        """
        failed = exchange.candidate
        assert failed is not None
        is_for_load = failure in LOAD_STATUSES
        may_stay = True
        for candidate in course.candidates:
            endpoint = candidate.endpoint
            if endpoint in course.tried or endpoint.is_draining or not health.may_retry_at(endpoint, now):
                continue
            if is_for_load and not has_room(endpoint, now, exchange.ceiling):
                continue
            if candidate.target is not failed.target:
                self.counts["fell_back"] += 1
                return candidate
            if may_stay and self._may_spend(candidate, health, now):
                self.counts["retried"] += 1
                return candidate
            self.counts["no_budget"] += may_stay
            may_stay = False
        return None

    def _budget(self, candidate: Candidate) -> RetryBudget:
        name = candidate.target.pool.name
        budget = self._budgets.get(name)
        if budget is None:
            budget = self._budgets[name] = RetryBudget()
        return budget

    def _may_spend(self, candidate: Candidate, health: HealthBook, now: float) -> bool:
        budget, known = self._budget(candidate), health.of(candidate.endpoint)
        if known is not None:  # as it is configured now
            budget.share, budget.floor = known.settings.retry_share, known.settings.retry_floor
        return budget.take(now)


def _judge(exchange: Exchange, sent: Sent | None, failure: UpstreamError | int, now: float) -> float | None:
    """What a failed attempt says of its endpoint; for how long that should be left alone, None: not at all.

    Broken is what answers with a server's error, or not at all. Full, short of quota or right to refuse is not broken.
    """
    attempt = exchange.attempt
    if isinstance(failure, UpstreamError):
        if attempt is not None and failure.kind == "too_large":
            attempt.abandoned()
        elif attempt is not None:
            attempt.failed(now, failure.kind)
        return None
    assert sent is not None
    is_full = failure in LOAD_STATUSES and (failure != 503 or _is_the_apis(sent.reply))
    is_broken = failure >= 500 and not is_full
    if attempt is not None and is_broken:
        attempt.failed(now, str(failure))
    elif attempt is not None:
        attempt.abandoned()
    if is_broken:
        return None
    usual_s = _FULL_PAUSE_S if is_full else _KEY_PAUSE_S if failure == 401 else None
    asked_s = retry_after_s(sent.reply, time.time())
    return usual_s if asked_s is None else asked_s


def _is_the_apis(reply: Reply) -> bool:
    """Whether the API itself says so, rather than a proxy that finds nobody behind it."""
    return (reply.header(b"content-type") or b"").lstrip().lower().startswith(b"application/json")


def _edits(exchange: Exchange, pool: Pool, runtime: Runtime) -> Edits | None:
    """What is changed in the body, whoever asked for it."""
    edits = salted(exchange, runtime.session_secret) if pool.is_salted else exchange.edits
    return prioritised(exchange, edits, pool) if pool.priority else edits


def _encode(exchange: Exchange, candidate: Candidate, message: Message, edits: Edits | None) -> Encoded:
    if message.document is None:
        return Encoded(message.body, strips_usage=False)
    return encode(
        candidate.endpoint,
        exchange.dialect,
        candidate.target.model_json,
        message.document,
        is_stream=exchange.is_stream,
        edits=edits,
    )


def _head(
    exchange: Exchange, request: Request, message: Message, candidate: Candidate, body_bytes: int
) -> bytes:
    endpoint, pool = candidate.endpoint, candidate.target.pool
    start = head(
        endpoint,
        request.method,
        message.path or endpoint.provider.paths[exchange.dialect.name],
        request.headers,
        body_bytes,
        exchange.request_id,
        message.content_type,
    )
    if pool.priority:
        start = with_priority(start, exchange, pool)
    return start if endpoint.orca is None else endpoint.orca.ask(start, exchange.sent_at)

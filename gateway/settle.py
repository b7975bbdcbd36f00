"""The last stage: a request's load given back, its usage priced, its row written. Once for every request.

The load is given back at once, the rest is done after the turn's answers have been sent: no client waits for our
bookkeeping, and nothing else runs in between. What a cut stream delivered is estimated on a thread, and its row
waits for it.
"""

import asyncio
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Final

from backends.dialect import RAW
from backends.errors import UpstreamError
from backends.pool import Endpoint
from backends.tap import Tap
from backends.usage import Usage
from backends.usage_readers import estimate_input
from gateway.ledger import Ledger, LedgerRow, row_of
from gateway.locality import Locality
from gateway.logs import AccessLog
from gateway.relay import StreamRelay
from gateway.runtime import Runtime
from gateway.telemetry import Telemetry
from policies.cost import charge
from policies.exchange import Exchange
from policies.health.endpoint import Attempt
from policies.placement.place import finish
from policies.waste import Waste, unused_prefill, waste_of

_log = logging.getLogger(__name__)

# The upstream gave nothing to pay for, or we never asked it.
_FREE_ENDS: Final = frozenset({"denied", "invalid", "upstream_failed"})


class Settler:
    """Ends requests. One per worker; `idle` in drain waits for estimates under way."""

    def __init__(
        self,
        ledger: Ledger,
        telemetry: Telemetry,
        access_log: AccessLog,
        worker: str,
        on_room: Callable[[str, float], None] | None = None,
        on_answer: Callable[[Exchange], None] | None = None,
    ) -> None:
        self._ledger = ledger
        self._telemetry = telemetry
        self._access_log = access_log
        self._worker = worker
        self._ended: list[tuple[Exchange, Runtime, StreamRelay | None]] = []  # in this turn of the loop
        self._loop: asyncio.AbstractEventLoop | None = None  # of the first request
        self._on_room = on_room  # a pool that can be full has a request less, sent so many seconds ago
        self._on_answer = on_answer  # it has a name that a later request may continue it by
        self.locality = Locality()
        self._estimates: set[asyncio.Future[Usage]] = set()
        self.wasted_nanousd: dict[str, int] = {}  # by endpoint, since the start
        self._estimator = ThreadPoolExecutor(1, thread_name_prefix="estimate")

    def open(self, exchange: Exchange) -> None:
        """Before the first dispatch: from here on the request has a row even if this worker dies.

        A job has its row from the queue, whichever of its runs ends it.
        """
        if exchange.on_priced is None:
            self._ledger.open(exchange)

    def waste(self, exchange: Exchange, failure: UpstreamError | int, now: float) -> None:
        """An attempt has failed, whether another follows or not: an error, or the status of an answer."""
        self.note_waste(exchange, waste_of(exchange, failure, now))

    def note_waste(self, exchange: Exchange, wasted: Waste) -> None:
        """Of an attempt, or of a whole run of a job."""
        if exchange.waste is None:
            exchange.waste = []
        exchange.waste.append(wasted)
        if wasted.nanousd:
            self.wasted_nanousd[wasted.endpoint] = (
                self.wasted_nanousd.get(wasted.endpoint, 0) + wasted.nanousd
            )

    def prefill_failed(
        self, exchange: Exchange, endpoint: Endpoint, failure: UpstreamError | int, now: float
    ) -> None:
        """Another engine was to compute the prompt, and has not: the one that answers will."""
        self.note_waste(exchange, waste_of(exchange, failure, now, endpoint.name))
        reason = str(failure) if isinstance(failure, int) else failure.kind
        self._telemetry.attempt_failed(endpoint.name, reason)

    def prefill_unused(self, exchange: Exchange, endpoint: Endpoint, took_us: int) -> None:
        """It has, and the one that answers could not make use of it."""
        self.note_waste(exchange, unused_prefill(exchange, endpoint.name, took_us))
        self._telemetry.attempt_failed(endpoint.name, "unused")

    def attempt_failed(self, exchange: Exchange, failure: UpstreamError | int) -> None:
        """An attempt is over and another follows."""
        exchange.prefilled_by, exchange.prefill_us = "", 0
        self._give_back(exchange, perf_counter())
        candidate = exchange.candidate
        if candidate is not None:
            reason = str(failure) if isinstance(failure, int) else failure.kind
            self._telemetry.attempt_failed(candidate.endpoint.name, reason)

    def fell_back(self, exchange: Exchange, failure: str) -> None:
        """Its model could not answer, and another is asked now."""
        self._telemetry.fell_back(exchange, failure)

    def price(self, exchange: Exchange) -> None:
        """Usage to nano-dollars. None when the usage or the price is unknown: never a silent zero."""
        candidate = exchange.candidate
        if candidate is None:
            exchange.cost_nanousd = exchange.saved_nanousd = 0  # it was never sent
            return
        target = candidate.target
        exchange.price = price = target.async_price if exchange.is_async else target.price
        usage = exchange.usage
        if usage is not None:
            charged = charge(usage, price, exchange.service_tier, exchange.received_time)
            if charged is not None:
                exchange.cost_nanousd = charged.cost_nanousd
                exchange.saved_nanousd = charged.saved_nanousd
        elif exchange.ended in _FREE_ENDS or exchange.status >= 400 or not exchange.dialect.is_billed:
            exchange.cost_nanousd = exchange.saved_nanousd = 0

    def settle(self, exchange: Exchange, runtime: Runtime, relay: StreamRelay | None) -> None:
        """Everything that must happen however the request ended."""
        now = perf_counter()
        exchange.end(now)
        self._give_back(exchange, now)
        if exchange.attempt is not None:
            _end_attempt(exchange, exchange.attempt)
        if not self._ended:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self._settle_ended)
        self._ended.append((exchange, runtime, relay))

    def _settle_ended(self) -> None:
        ended, self._ended = self._ended, []
        for exchange, runtime, relay in ended:
            try:
                if relay is None and exchange.ended == "completed":
                    self._close(exchange, runtime)
                else:
                    self._settle(exchange, runtime, relay)
            except Exception:  # noqa: BLE001 - a bug costs one row, not those behind it
                _log.exception("a request was not settled", extra={"request_id": exchange.request_id})

    def _settle(self, exchange: Exchange, runtime: Runtime, relay: StreamRelay | None) -> None:
        if relay is not None:
            tap = relay.tap
            exchange.usage, exchange.served_model, exchange.service_tier = (
                tap.usage,
                tap.model,
                tap.service_tier,
            )
            exchange.answer_id = tap.answer_id
            if relay.error is not None:
                exchange.error_kind = relay.error.kind
            elif tap.error is not None:
                exchange.error_kind = "stream_error"
            if (
                exchange.status == 200
                and exchange.dialect.is_billed
                and (tap.usage is None or not tap.is_complete)
            ):
                self._estimate(exchange, runtime, tap)
                return
        elif (
            exchange.ended in {"client_gone", "drained"}
            and exchange.dispatched_at
            and exchange.dialect is not RAW
        ):
            # Nothing was delivered, but the work was asked for and withdrawn by the caller's side.
            exchange.usage = estimate_input(exchange.body_bytes)
            exchange.is_estimated = True
            exchange.status = 499 if exchange.ended == "client_gone" else exchange.status
        self._close(exchange, runtime)

    def _estimate(self, exchange: Exchange, runtime: Runtime, tap: Tap) -> None:
        loop = asyncio.get_running_loop()
        estimate = loop.run_in_executor(self._estimator, tap.estimate, exchange.body_bytes)
        self._estimates.add(estimate)
        estimate.add_done_callback(functools.partial(self._estimated, exchange, runtime))

    def _estimated(self, exchange: Exchange, runtime: Runtime, estimate: asyncio.Future[Usage]) -> None:
        self._estimates.discard(estimate)
        # Whatever went wrong with it: what was reserved is to be given back, and the row to be written.
        usage = estimate_input(exchange.body_bytes) if estimate.exception() else estimate.result()
        if exchange.ended == "incomplete" and not usage.output_tokens:
            exchange.cost_nanousd = exchange.saved_nanousd = (
                0  # the upstream broke off before it said anything
            )
        else:
            exchange.usage, exchange.is_estimated = usage, True
        self._close(exchange, runtime)

    def _give_back(self, exchange: Exchange, now: float) -> None:
        hold, candidate = exchange.hold, exchange.candidate
        if hold is not None and candidate is not None:
            exchange.hold = None
            hold.release()
            if self._on_room is not None and candidate.endpoint.is_limited:
                self._on_room(candidate.target.pool.name, now - exchange.dispatched_at)

    def _close(self, exchange: Exchange, runtime: Runtime) -> None:
        if exchange.on_priced is not None:
            self._hand_back(exchange, exchange.on_priced)
            return
        try:
            if exchange.cost_nanousd is None:
                self.price(exchange)
        finally:  # even a bug in the price must not keep what was reserved
            for settle in runtime.hooks.settle:
                settle(exchange, exchange.ended_at)
        if exchange.ask is not None:
            finish(exchange)
        if exchange.answer_id and self._on_answer is not None:
            self._on_answer(exchange)
        if exchange.caller is not None:  # strangers get no row: a flood of bad keys must not fill the disk
            self._ledger.close(row_of(exchange, self._worker))
        self._observe(exchange)

    def _hand_back(self, run: Exchange, on_priced: Callable[[], None]) -> None:
        """A run of a job is priced; what it means is for the queue to say, by `conclude`."""
        try:
            if run.cost_nanousd is None:
                self.price(run)
            finish(run)
        finally:
            on_priced()

    def row_of_job(self, run: Exchange) -> LedgerRow:
        """Of a job whose last run this is; the exchange has the job's id and moment by now."""
        return row_of(run, self._worker)

    def conclude(self, run: Exchange, runtime: Runtime) -> None:
        """What became of a run is on disk, its row with it: what it had reserved is given back or spent, all are told."""
        for settle in runtime.hooks.settle:
            settle(run, run.ended_at)
        if run.answer_id and self._on_answer is not None:
            self._on_answer(run)
        self._observe(run)

    def _observe(self, exchange: Exchange) -> None:
        self._telemetry.observe(exchange)
        self.locality.observe(exchange)
        if self._access_log.is_on:
            self._access_log.write(exchange)

    async def idle(self) -> None:
        """Until every request that has ended has its row, or its place among those to be written."""
        self._settle_ended()
        while self._estimates:
            await asyncio.wait(self._estimates)

    def stop(self) -> None:
        self._estimator.shutdown(wait=True)


def _end_attempt(exchange: Exchange, attempt: Attempt) -> None:
    """What the last attempt says of its endpoint's health, if that has not been said already."""
    if exchange.ended == "completed":
        attempt.succeeded(exchange.ended_at)
    elif exchange.ended in {"incomplete", "upstream_failed"}:
        attempt.failed(exchange.ended_at, exchange.error_kind or "incomplete")
    else:
        attempt.abandoned()

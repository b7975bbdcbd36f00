"""Place and send for a model that has fallbacks: while it fails in a way that one is for, the next model takes over.

Only while nothing of an answer has been relayed. Which model follows is `policies.rules.fallback`'s to say; this owns
the loop, and finding out what a failure was. A model without fallbacks never comes here.
"""

import time

from backends.errors import UpstreamError
from backends.overflow import says_overflow
from gateway.inbound import Request
from gateway.intake import Message
from gateway.placing import Placing
from gateway.relay import read_whole
from gateway.runtime import Runtime
from gateway.sending import Sending, Sent
from gateway.settle import Settler
from policies.exchange import Exchange
from policies.rules.fallback import MAY_BE_OVERFLOW, FailureClass, class_of, fall_back, next_fallback
from policies.verdict import Denial


class Fallbacks:
    """One per worker."""

    def __init__(self, placing: Placing, sending: Sending, settler: Settler) -> None:
        self._placing = placing
        self._sending = sending
        self._settler = settler

    async def send(
        self, exchange: Exchange, request: Request, message: Message, runtime: Runtime
    ) -> Sent | Denial | None:
        """An answer, or the refusal or failure (UpstreamError) of the last model; None: parked, and answered."""
        while True:
            if any(self._turn(exchange, failure) for failure in _known_failures(exchange, runtime)):
                continue
            placed = self._placing.at_once(exchange, runtime)
            if placed is None:
                falls = (
                    exchange.on_full in {"", "fallback"} and next_fallback(exchange, "overload") is not None
                )
                placed = await self._placing.when_full(
                    exchange, runtime, request, message, may_park=not falls
                )
                if falls and isinstance(placed, Denial) and self._turn(exchange, "overload"):
                    continue
            if placed is None or isinstance(placed, Denial):
                return placed
            try:
                sent = await self._sending.send(exchange, request, message, placed, runtime)
            except UpstreamError as error:
                if not self._turn(exchange, class_of(error)):
                    raise
                self._settler.attempt_failed(exchange, error)
                continue
            if sent.reply.status < 400:
                return sent
            sent, failure = await _judged(exchange, sent, runtime)
            if not self._turn(exchange, failure):
                return sent
            self._settler.attempt_failed(exchange, sent.reply.status)
            sent.reply.close()

    def _turn(self, exchange: Exchange, failure: FailureClass | None) -> bool:
        if failure is None or not fall_back(exchange, failure):
            return False
        self._settler.fell_back(exchange, failure)
        return True


def _known_failures(exchange: Exchange, runtime: Runtime) -> tuple[FailureClass, ...]:
    """How the model would fail if it were asked: every endpoint of it is known to. One that may be tried again is."""
    assert exchange.model is not None
    groups = exchange.model.groups(exchange.dialect, exchange.targets)
    endpoints = [endpoint for group in groups for endpoint in group.endpoints]
    if not endpoints or not runtime.health.is_down(endpoints, time.perf_counter()):
        return ()
    is_out = any(endpoint.health <= 0.0 for endpoint in endpoints)
    return ("error", "timeout") if is_out else ("rate_limit", "overload")


async def _judged(exchange: Exchange, sent: Sent, runtime: Runtime) -> tuple[Sent, FailureClass | None]:
    """What kind of failure an answer is; whether a refusal is one for its length, only its words tell."""
    status = sent.reply.status
    if status not in MAY_BE_OVERFLOW or next_fallback(exchange, "context") is None:
        return sent, class_of(status)
    body = sent.body
    if body is None:
        body = await read_whole(exchange, sent.reply, runtime.response_bytes)
    return sent._replace(body=body), "context" if says_overflow(body) else None

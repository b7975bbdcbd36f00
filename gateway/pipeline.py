"""The life of a request, on one screen: identify, read, admit, place, send, relay, settle.

The stages are named here as everywhere: logs, metrics, docs. Three outcomes have three forms: a policy's
Denial is returned, an UpstreamError is raised, anything else is a bug (500). `settle` runs once for every
request, however it ended.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from backends.dialect import RESPONSES
from backends.errors import UpstreamError
from backends.transport import Reply
from gateway.errors import denial_answer, envelope, error_headers, foreign_error, upstream_answer
from gateway.fallbacks import Fallbacks
from gateway.idempotency import HEADER, Idempotency
from gateway.inbound import Refusal, Request
from gateway.intake import Message, identify, read
from gateway.leases import Leases
from gateway.overflow.background_answer import BackgroundPark, wants_background
from gateway.overflow.spill import Spill
from gateway.pinning import Pinning
from gateway.placing import Placing
from gateway.prompt_tokens import PromptTokens
from gateway.relay import StreamRelay, is_foreign_error, read_whole, relayed_headers
from gateway.runtime import Runtime
from gateway.sending import Sending, Sent
from gateway.settle import Settler
from gateway.shadowing import Shadowing
from policies.exchange import Exchange
from policies.limits.refusals import BUDGET_EXCEEDED
from policies.policy import Admit
from policies.routing import Candidate
from policies.rules.fallback import fall_back, has_fallbacks, has_shadows
from policies.verdict import Denial

# An upstream would run it, and nobody could ever ask for the answer, nor for what it used.
_NO_QUEUE: Final = (
    "`background` needs the queue, which is off here: its operator turns it on with `queue.enabled`"
)

_log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What the stages are made of, in their order."""

    idempotency: Idempotency
    leases: Leases
    pinning: Pinning
    prompt_tokens: PromptTokens
    placing: Placing
    sending: Sending
    shadowing: Shadowing
    settler: Settler
    spill: Spill | None = None  # None: there is no queue
    background: BackgroundPark | None = None


class Pipeline:
    """Carries requests of the inference dialects through their stages. One per worker."""

    def __init__(self, runtime: Callable[[], Runtime], parts: Parts) -> None:
        self._runtime = runtime  # asked once per request: a reload swaps what it returns
        self._idempotency = parts.idempotency
        self._leases = parts.leases
        self._pinning = parts.pinning
        self._prompt_tokens = parts.prompt_tokens
        self._placing = parts.placing
        self._sending = parts.sending
        self._fallbacks = Fallbacks(parts.placing, parts.sending, parts.settler)
        self._shadowing = parts.shadowing
        self._settler = parts.settler
        self._spill = parts.spill
        self._background = parts.background

    async def handle(
        self, request: Request, exchange: Exchange, provider: str = "", message: Message | None = None
    ) -> None:
        """One request to its end. `provider` narrows a passthrough call to the provider named in its path. With a
        `message` it is a run of a job, identified and read already."""
        runtime = self._runtime()
        relay: StreamRelay | None = None
        try:
            received = message or self._receive(request, exchange, runtime, provider)
            if not isinstance(received, Message):
                late = await received
                if not isinstance(late, Message):
                    self._decline(exchange, request, late)
                    return
                received = late
            denial = self._admit(exchange, runtime.hooks.admit)
            if exchange.lacks or (denial is not None and denial.code == BUDGET_EXCEEDED):
                denial = await self._ask_for_more(exchange, runtime, denial)
            if denial is not None:
                self._refuse(exchange, request, denial)
                return
            if exchange.continues:
                await self._pinning.pin(exchange)
            if exchange.model is not None and exchange.model.is_indexed:
                await self._prompt_tokens.read(exchange, runtime.session_secret)
            sent = await self._send(exchange, request, received, runtime)
            if not isinstance(sent, Sent):
                self._decline(exchange, request, sent)
                return
            try:
                if exchange.on_priced is not None:
                    exchange.upstream_headers = tuple(sent.reply.headers.items())
                if has_shadows(exchange):
                    self._shadowing.copy(exchange, request, received, runtime)
                if sent.is_stream:
                    relay = StreamRelay(request, exchange, sent.reply, strips_usage=sent.strips_usage)
                    await relay.run()
                    exchange.ended = "completed" if relay.finish() else "incomplete"
                else:
                    body = sent.body
                    if body is None:
                        body = await read_whole(exchange, sent.reply, runtime.response_bytes)
                    self._answer_whole(exchange, request, sent.reply, body)
            finally:
                sent.reply.close()
        except Refusal as refusal:
            self._fail_invalid(exchange, request, refusal)
        except UpstreamError as error:
            self._fail_upstream(exchange, request, error)
        except asyncio.CancelledError:
            self._cut_short(exchange, request, relay)
            raise
        except Exception:  # noqa: BLE001 - a bug ends one request, not the connection's task
            self._fail(exchange, request)
        finally:
            self._settler.settle(exchange, runtime, relay)
            if HEADER in request.headers:
                self._idempotency.end(exchange, request)

    def _receive(
        self, request: Request, exchange: Exchange, runtime: Runtime, provider: str
    ) -> Message | Awaitable[Message | Denial | None]:
        """Identify and read. An ordinary request is here already: nothing is awaited for it."""
        denial = identify(exchange, request, runtime)
        message = denial or read(exchange, request, runtime, provider)
        model = exchange.model
        if (
            isinstance(message, Message)
            and HEADER not in request.headers
            and exchange.dialect is not RESPONSES
            and (model is None or model.on_full != "hold")
        ):
            return message
        return self._receive_more(request, exchange, runtime, message)

    async def _receive_more(
        self,
        request: Request,
        exchange: Exchange,
        runtime: Runtime,
        message: Message | Denial | Awaitable[Message],
    ) -> Message | Denial | None:
        """The rest of it. None: answered already, as a repetition of what was asked before."""
        if isinstance(message, Denial):
            return message
        if not isinstance(message, Message):
            message = await message
        if HEADER in request.headers:
            denial = await self._idempotency.begin(exchange, request, runtime.idempotency, message.body)
            if denial is not None or exchange.ended == "replayed":
                return denial
        if exchange.dialect is RESPONSES and wants_background(message):
            if self._background is None:
                raise Refusal(400, "no_queue", _NO_QUEUE, "background")
            return await self._background.accept(exchange, request, message)
        model, spill = exchange.model, self._spill
        if (
            spill is not None
            and model is not None
            and model.on_full == "hold"
            and await spill.take_up(exchange, request, message)
        ):
            return None
        return message

    def _admit(self, exchange: Exchange, hooks: Sequence[Admit]) -> Denial | None:
        now = time.perf_counter()
        for admit in hooks:
            denial = admit(exchange, now)
            if denial is not None:
                return denial
        return None

    async def _ask_for_more(
        self, exchange: Exchange, runtime: Runtime, denial: Denial | None
    ) -> Denial | None:
        """What limits have no room for here may be had from their store; past a budget the model may have a fallback."""
        while True:
            if denial is None and exchange.lacks:
                denial = await self._leases.obtain(exchange)
            if denial is None or denial.code != BUDGET_EXCEEDED or not fall_back(exchange, "budget"):
                return denial
            self._settler.fell_back(exchange, "budget")
            for settle in runtime.hooks.settle:
                settle(exchange, time.perf_counter())  # gives back what was reserved for the dearer model
            denial = self._admit(exchange, runtime.hooks.admit_again)

    def _send(
        self, exchange: Exchange, request: Request, message: Message, runtime: Runtime
    ) -> Awaitable[Sent | Denial | None]:
        """Place and send. None: parked, and answered."""
        if has_fallbacks(exchange):
            return self._fallbacks.send(exchange, request, message, runtime)
        placed = self._placing.at_once(exchange, runtime)
        if isinstance(placed, list):
            return self._sending.send(exchange, request, message, placed, runtime)
        return self._send_later(exchange, request, message, runtime, placed)

    async def _send_later(
        self,
        exchange: Exchange,
        request: Request,
        message: Message,
        runtime: Runtime,
        placed: list[Candidate] | Denial | None,
    ) -> Sent | Denial | None:
        if placed is None:
            placed = await self._placing.when_full(exchange, runtime, request, message)
        if placed is None or isinstance(placed, Denial):
            return placed
        return await self._sending.send(exchange, request, message, placed, runtime)

    def _answer_whole(self, exchange: Exchange, request: Request, reply: Reply, body: bytes) -> None:
        self._settler.price(exchange)
        headers = relayed_headers(exchange, reply)
        if reply.status >= 400 and is_foreign_error(exchange, reply, body):
            target = exchange.candidate.endpoint.name if exchange.candidate is not None else ""
            body = foreign_error(reply.status, target, exchange.dialect.family, exchange.request_id)
            headers = [(name, value) for name, value in headers if name != b"content-type"]
            headers.append((b"content-type", b"application/json"))
        if exchange.cost_nanousd is not None:
            dollars, nano = divmod(exchange.cost_nanousd, 1_000_000_000)
            headers.append((b"x-headgate-cost-usd", b"%d.%09d" % (dollars, nano)))
        overhead_s = (
            exchange.dispatched_at
            - exchange.read_at
            - exchange.waited_s
            + time.perf_counter()
            - exchange.ready_at
        )
        headers.append((b"x-headgate-overhead-us", b"%d" % (overhead_s * 1e6)))
        request.respond(reply.status, headers, body)
        exchange.relayed_at = time.perf_counter()
        exchange.ended = "completed"

    def _answer(
        self, exchange: Exchange, request: Request, answer: tuple[int, list[tuple[bytes, bytes]], bytes]
    ) -> None:
        exchange.status = answer[0]
        request.respond(*answer)

    def _refuse(self, exchange: Exchange, request: Request, denial: Denial) -> None:
        exchange.ended = "denied"
        exchange.error_kind = denial.code
        self._answer(exchange, request, denial_answer(denial, exchange.dialect.family, exchange.request_id))

    def _decline(self, exchange: Exchange, request: Request, denial: Denial | None) -> None:
        """None: it is answered already, as what it repeats or as a job of the queue."""
        if denial is not None:
            self._refuse(exchange, request, denial)

    def _fail_invalid(self, exchange: Exchange, request: Request, refusal: Refusal) -> None:
        exchange.ended = "invalid"
        denial = Denial(refusal.status, refusal.code, refusal.message, refusal.param)
        self._answer(exchange, request, denial_answer(denial, exchange.dialect.family, exchange.request_id))

    def _fail_upstream(self, exchange: Exchange, request: Request, error: UpstreamError) -> None:
        exchange.ended = "upstream_failed"
        exchange.error_kind = error.kind
        target = exchange.candidate.endpoint.name if exchange.candidate is not None else ""
        family, request_id = exchange.dialect.family, exchange.request_id
        _log.warning("%s", error.message, extra={"request_id": request_id, "endpoint": target})
        self._answer(exchange, request, upstream_answer(error, target, family, request_id))

    def _cut_short(self, exchange: Exchange, request: Request, relay: StreamRelay | None) -> None:
        """The client went, or our own drain ran out of time while the client was still there."""
        if request.is_gone:
            if relay is not None and (relay.tap.is_complete or relay.tap.error is not None):
                # SDKs hang up at the last event or at an error, before the body's own end.
                exchange.ended = "completed" if relay.tap.is_complete else "incomplete"
                return
            exchange.ended = "client_gone"
            exchange.status = exchange.status or 499
            return
        exchange.ended = "drained"
        message = "the gateway is shutting down; send the request again"
        if relay is not None:
            relay.break_off("gateway_shutting_down", message)
        else:
            denial = Denial(503, "gateway_shutting_down", message, retry_after_s=1.0)
            self._answer(
                exchange, request, denial_answer(denial, exchange.dialect.family, exchange.request_id)
            )

    def _fail(self, exchange: Exchange, request: Request) -> None:
        """A bug of ours: the trace goes to the log, the client gets the request id to ask with."""
        _log.exception("a request failed through a bug", extra={"request_id": exchange.request_id})
        exchange.ended = "failed"
        family, request_id = exchange.dialect.family, exchange.request_id
        if request.is_started:
            request.abort()
            return
        message = f"an error inside the gateway; its operator can find it in the log under {request_id}"
        body = envelope(family, 500, "internal_error", message, request_id)
        self._answer(exchange, request, (500, error_headers(family, request_id, None), body))

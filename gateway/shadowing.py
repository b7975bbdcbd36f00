"""Shadow traffic: copies of requests, sent to another model, their answers read and dropped.

A copy is a request of its own, of the pseudo-caller `shadow`: it is priced, in the ledger and in metrics of its own, and
outside every limit of the real caller. It starts when the real answer has begun, waits for nobody's place, is tried
once, and is not made where there is no room: whatever becomes of it, the real request neither knows nor waits.
"""

import asyncio
import logging
import time
from dataclasses import replace
from typing import Final

from backends.errors import UpstreamError
from gateway.inbound import Request
from gateway.intake import Message
from gateway.relay import StreamRelay, read_whole
from gateway.runtime import Runtime
from gateway.sending import Sending
from gateway.settle import Settler
from gateway.telemetry import Telemetry
from policies.exchange import Caller, Exchange
from policies.placement.place import place
from policies.policy import Hooks
from policies.rules.shadow import Shadow

SHADOW: Final = Caller("shadow", "shadow", tags=("shadow",))
_NO_HOOKS: Final = Hooks([])
_log = logging.getLogger(__name__)


class Shadowing:
    """Makes and ends copies. One per worker."""

    def __init__(self, sending: Sending, settler: Settler, telemetry: Telemetry) -> None:
        self._dropped = {"at_limit": 0, "no_room": 0}
        telemetry.watch(
            "headgate_shadow_requests_dropped_total",
            "counter",
            "Copies of requests that were not made: too many under way, or no room at the model.",
            lambda: self._dropped,
            "reason",
        )
        self._sending = sending
        self._settler = settler
        self._tasks: set[asyncio.Task[None]] = set()

    def copy(self, exchange: Exchange, request: Request, message: Message, runtime: Runtime) -> None:
        """Starts what copies this request is to have. Its own answer has begun, but nothing of it is relayed yet."""
        if exchange.continues:
            return  # what it continues is stored where it was made
        routing = exchange.model.routing if exchange.model is not None else None
        for number, shadow in enumerate(routing.shadows if routing is not None else ()):
            if not shadow.takes(exchange.request_id):
                continue
            if shadow.in_flight >= shadow.max_in_flight:
                self._dropped["at_limit"] += 1
                continue
            shadow.in_flight += 1
            copy = _copy_of(exchange, shadow, number, runtime)
            run = self._run(copy, shadow, request.unheard(), message, runtime)
            task = asyncio.get_running_loop().create_task(run)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Gives up what is under way; all of it is settled then."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(
        self, copy: Exchange, shadow: Shadow, request: Request, message: Message, runtime: Runtime
    ) -> None:
        relay: StreamRelay | None = None
        try:
            choices = place(copy, runtime.health, time.perf_counter())
            if not choices or choices[0].is_full or not choices[0].candidates:
                self._dropped["no_room"] += 1
                return
            copy.place_reason = choices[0].reason
            sent = await self._sending.send(copy, request, message, choices[0].candidates[:1], runtime)
            try:
                if sent.is_stream:
                    relay = StreamRelay(request, copy, sent.reply, strips_usage=sent.strips_usage)
                    await relay.run()
                    copy.ended = "completed" if relay.finish() else "incomplete"
                else:
                    if sent.body is None:
                        await read_whole(copy, sent.reply, runtime.response_bytes)
                    copy.ended = "completed"
            finally:
                sent.reply.close()
        except UpstreamError as error:
            copy.ended, copy.error_kind = "upstream_failed", error.kind
        except asyncio.CancelledError:
            copy.ended = "drained"
            raise
        except Exception:  # noqa: BLE001 - a bug ends one copy, not the worker
            _log.exception("a shadow request failed through a bug", extra={"request_id": copy.request_id})
        finally:
            shadow.in_flight -= 1
            if copy.attempts:
                self._settler.settle(copy, replace(runtime, hooks=_NO_HOOKS), relay)


def _copy_of(exchange: Exchange, shadow: Shadow, number: int, runtime: Runtime) -> Exchange:
    copy = Exchange(
        f"{exchange.request_id}-s{number}", exchange.dialect, time.perf_counter(), time.time(), is_shadow=True
    )
    copy.caller, copy.tags = SHADOW, (*SHADOW.tags, exchange.request_id)
    copy.read_at = copy.received_at
    copy.model, copy.model_name = shadow.model, shadow.model.name
    copy.is_stream, copy.max_tokens = exchange.is_stream, exchange.max_tokens
    copy.body_bytes, copy.document, copy.headers = exchange.body_bytes, exchange.document, exchange.headers
    copy.session_hash, copy.is_affine, copy.edits = exchange.session_hash, exchange.is_affine, exchange.edits
    copy.priority, copy.ceiling = len(runtime.ceilings) - 1, runtime.ceilings[-1]
    return copy

"""The place stage where it may have to wait: what becomes of a request when every endpoint is full.

Its order: a bounded wait for room, the model's next target, the queue, a refusal that says when to come back. The
client's `x-headgate-on-full` (or Workers AI's `rejectIfBusy`), a rule, or the model picks one of these instead. Decides
nothing about endpoints: that is `policies.placement.place`.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Final

from backends.dialect import DIALECTS
from gateway.inbound import Request
from gateway.intake import Message
from gateway.runtime import Runtime
from gateway.waiting_room import WaitingRoom
from policies.exchange import Exchange
from policies.placement.place import Choice, choose, place
from policies.routing import Candidate, ModelOnFull
from policies.verdict import Denial

# Takes a request for later and answers its client; False: it does not want it; a Denial: it would, and cannot. In both
# cases nothing was answered.
Park = Callable[[Exchange, Request, Message], Awaitable[bool | Denial]]


class Placing:
    """Places requests. One per worker."""

    def __init__(
        self, room: WaitingRoom, park: Park | None = None, want: Callable[[str], None] = lambda _: None
    ) -> None:
        """`want` is told of pools that nobody takes requests for: their engines may be asleep."""
        self._room = room
        self._park = park  # None: there is no queue
        self._want = want

    def at_once(self, exchange: Exchange, runtime: Runtime) -> list[Candidate] | Denial | None:
        """The candidates, best first; None if there is no room for the request now."""
        choices = place(exchange, runtime.health, time.perf_counter())
        if not choices:
            return _not_served(exchange)
        first = choices[0]
        if first.is_full or not first.candidates:
            return None
        if self._room.is_awaited(first.group.target.pool.name, exchange.priority):
            return None
        exchange.place_reason = first.reason
        if len(choices) == 1:
            return first.candidates
        return [candidate for choice in choices for candidate in choice.candidates]

    async def when_full(
        self,
        exchange: Exchange,
        runtime: Runtime,
        request: Request,
        message: Message,
        *,
        may_park: bool = True,
    ) -> list[Candidate] | Denial | None:
        """The same after waiting, or elsewhere; None: it was parked, and its client has its answer.

        `may_park` is False where another model would take the request: refused here, it goes there.
        """
        now = time.perf_counter()
        choices = place(exchange, runtime.health, now)
        if choices and not choices[0].candidates:
            self._want(choices[0].group.target.pool.name)
        on_full = self._wish(exchange)
        if on_full == "reject":
            return self._refusal(exchange, choices[0], 429, "pool_full")
        if on_full in {"fallback", "hold"}:
            found = self._elsewhere(exchange, choices)
            if found is not None or not may_park:
                return found or self._refusal(exchange, choices[0], 429, "pool_full")
        if on_full not in {"queue", "hold"}:
            found = await self._wait(exchange, runtime, choices)
            if found is not None:
                return found
        if on_full in {"", "fallback"}:
            found = self._elsewhere(exchange, place(exchange, runtime.health, time.perf_counter()))
            if found is not None:
                return found
        if (
            on_full in {"", "queue", "hold"}
            and may_park
            and self._park is not None
            and (parked := await self._park(exchange, request, message))
        ):
            return parked if isinstance(parked, Denial) else None
        if on_full in {"queue", "hold"}:
            return self._refusal(exchange, choices[0], 429, "no_queue")
        if not any(choice.candidates for choice in choices):
            return self._refusal(exchange, choices[0], 503, "no_endpoint")
        if exchange.waited_s:
            return self._refusal(exchange, choices[0], 503, "wait_timeout")
        return self._refusal(exchange, choices[0], 429, "room_full")

    def _wish(self, exchange: Exchange) -> ModelOnFull:
        """The client's word, else a rule's, else the model's: that one only where there is a queue to take it."""
        model = exchange.model
        if exchange.on_full or model is None:
            return exchange.on_full
        return "" if self._park is None and model.on_full in {"queue", "hold"} else model.on_full

    async def _wait(
        self, exchange: Exchange, runtime: Runtime, choices: list[Choice]
    ) -> list[Candidate] | None:
        group = choices[0].group
        health = runtime.health

        pool = group.target.pool.name

        def choice_now(exchange: Exchange, now: float) -> Choice:
            choice = choose(exchange, group, health, now)
            if not choice.candidates:
                self._want(pool)  # the last one may have gone to sleep just now
            return choice

        choice = await self._room.wait(exchange, pool, choice_now)
        if choice is None:
            return None
        exchange.place_reason = choice.reason
        return choice.candidates

    def _elsewhere(self, exchange: Exchange, choices: list[Choice]) -> list[Candidate] | None:
        """What has room among the targets after the first."""
        found = [c for choice in choices[1:] if not choice.is_full for c in choice.candidates]
        if not found:
            return None
        exchange.place_reason = "fallback"
        return found

    def _refusal(self, exchange: Exchange, choice: Choice, status: int, code: str) -> Denial:
        pool = choice.group.target.pool
        wait_s = self._room.wait_s(pool.name, exchange.priority, pool.endpoints)
        return Denial(status, code, _REFUSALS[code].format(model=exchange.model_name), retry_after_s=wait_s)


_REFUSALS: Final = {
    "pool_full": "every endpoint of `{model}` is full, and the request asked not to wait",
    "room_full": "every endpoint of `{model}` is full, and so is the waiting room",
    "wait_timeout": "every endpoint of `{model}` was full for as long as a request may wait",
    "no_queue": "every endpoint of `{model}` is full, and no queue takes the request",
    "no_endpoint": "no endpoint of `{model}` takes requests now",
}


def _not_served(exchange: Exchange) -> Denial:
    assert exchange.model is not None  # admit refuses names nobody serves
    if any(not target.pool.endpoints for target in exchange.targets or exchange.model.targets):
        # None is found now: what they would speak, nobody knows.
        return Denial(
            503, "no_endpoint", _REFUSALS["no_endpoint"].format(model=exchange.model_name), retry_after_s=1.0
        )
    spoken = ", ".join(f"`{DIALECTS[name].path}`" for name in exchange.model.dialects())
    return Denial(
        400,
        "dialect_not_supported",
        f"the model `{exchange.model_name}` is not served on `{exchange.dialect.path}`; it is served on: "
        f"{spoken or 'no dialect this gateway knows'}",
        param="model",
    )

"""Webhooks on their way to receivers: taken from an outbox, sent, tried again less and less often, or given up.

One mechanism for everything Headgate tells; what is told, and to whom, an outbox knows. Each message is delivered at least
once, always under its own id: who takes one has it for a while, and what is not ended or put off by then is taken again.
A receiver that is slow or gone holds up no other: it has few places at a time, and what comes beyond is put off.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from gateway.stores.limit_store import StoreAwayError
from gateway.stores.sqlite import StorageError
from gateway.webhook_sender import TIMEOUT_S, Outcome, Sender
from gateway.webhooks import Receiver, host_of

# After the first attempt, as Standard Webhooks 1.0.0 suggests; each with up to a tenth more, so that many do not come
# back at once.
RETRIES_S: Final = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
LEASE_S: Final = 4 * TIMEOUT_S
_LONGEST_RETRY_AFTER_S: Final = 86_400.0
_POLL_S: Final = 1.0
_AT_ONCE: Final = 64
_AT_ONE_RECEIVER: Final = 8
_LONGEST_PUT_OFF_S: Final = 600.0
_MAX_REMEMBERED: Final = 10_000

_log = logging.getLogger(__name__)


class Message(Protocol):
    """One message for one receiver, as an outbox knows it; `attempts` that failed so far."""

    @property
    def message_id(self) -> str: ...

    @property
    def receiver(self) -> str: ...

    @property
    def attempts(self) -> int: ...


M = TypeVar("M", bound=Message)


class Outbox(Protocol[M]):
    """Where messages wait. StorageError or StoreAwayError when it cannot be asked."""

    async def take(self, most: int, now_time: float) -> Sequence[M]:
        """Those whose time has come, the oldest first. They are the taker's for LEASE_S at least."""
        ...

    async def opened(self, message: M) -> tuple[Receiver, bytes] | None:
        """Where it goes, and what it says. None: nobody wants it any more."""
        ...

    async def end(self, message: M, error: str) -> None:
        """Delivered; or given up, because of `error`."""
        ...

    async def retry(self, message: M, next_time: float, error: str) -> None:
        """It failed and will be tried again."""
        ...

    async def put_off(self, message: M, next_time: float) -> None:
        """It was not tried."""
        ...

    async def refused(self, message: M) -> None:
        """The receiver says that it is gone for good."""
        ...


@dataclass(slots=True)
class _Pace:
    """What one receiver can take. Whoever finds its places taken comes back when, at its pace, one is free."""

    under_way: int = 0
    lasts_s: float = 0.1  # an attempt, lately
    next_time: float = 0.0

    def turn(self, now_time: float) -> float:
        """When the next one that finds no place is to come back."""
        self.next_time = max(self.next_time, now_time) + max(self.lasts_s, 0.1) / _AT_ONE_RECEIVER
        return min(max(self.next_time, now_time + 1.0), now_time + _LONGEST_PUT_OFF_S)


class WebhookDelivery(Generic[M]):
    """Empties one outbox. `noun` is what the log calls a message."""

    def __init__(self, outbox: Outbox[M], noun: str, *, clock: Callable[[], float] = time.time) -> None:
        self.delivered = 0
        self.failed = 0
        self._outbox = outbox
        self._noun = noun
        self._clock = clock
        self._paces: dict[str, _Pace] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled."""
        sender = Sender()
        try:
            while True:
                taken = 0
                try:
                    taken = await self.begin_due(sender)
                except (StorageError, StoreAwayError) as error:
                    _log.error("%ss wait: %s", self._noun, error)
                if taken == 0:
                    await asyncio.sleep(_POLL_S)
        finally:
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)
            await sender.close()

    async def deliver_due(self, sender: Sender) -> int:
        """All whose time has come, and waits for what becomes of them. Returns how many there were."""
        count = 0
        while taken := await self.begin_due(sender):
            count += taken
            await asyncio.gather(*self._under_way)
        return count

    async def begin_due(self, sender: Sender) -> int:
        """Sends what is due, as much as there are places for, without waiting for it; how many those were."""
        while len(self._under_way) >= _AT_ONCE:
            await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
        messages = await self._outbox.take(_AT_ONCE - len(self._under_way), self._clock())
        if len(self._paces) > _MAX_REMEMBERED:
            self._paces = {name: pace for name, pace in self._paces.items() if pace.under_way}
        for message in messages:
            pace = self._paces.setdefault(message.receiver, _Pace())
            if pace.under_way >= _AT_ONE_RECEIVER:
                await self._outbox.put_off(message, pace.turn(self._clock()))
                continue
            pace.under_way += 1
            task = asyncio.create_task(self._deliver(sender, message, pace))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        return len(messages)

    async def _deliver(self, sender: Sender, message: M, pace: _Pace) -> None:
        began_at = time.perf_counter()
        try:
            await self._attempt(sender, message)
        except (StorageError, StoreAwayError) as error:
            _log.error("what became of a %s is not known to the storage: %s", self._noun, error)
        except Exception:  # noqa: BLE001 - a bug holds up one message, not all of them
            _log.exception("a webhook failed through a bug")
        finally:
            pace.under_way -= 1
            pace.lasts_s += (time.perf_counter() - began_at - pace.lasts_s) / 4

    async def _attempt(self, sender: Sender, message: M) -> None:
        opened = await self._outbox.opened(message)
        if opened is None:
            await self._outbox.end(message, "no longer configured")
            return
        receiver, payload = opened
        sent = (message.message_id, int(self._clock()), payload)
        outcome = await sender.send(receiver.url, receiver.secrets, sent, receiver.allowed)
        if outcome.is_delivered:
            self.delivered += 1
            await self._outbox.end(message, "")
            return
        self.failed += 1
        told = outcome.error or f"status {outcome.status}"
        is_last = outcome.is_unwanted or message.attempts >= len(RETRIES_S)
        _log.warning(
            "a %s was not delivered%s",
            self._noun,
            " and is given up" if is_last else "; it will be tried again",
            extra={"webhook": message.message_id, "receiver": host_of(receiver.url), "reason": told},
        )
        if outcome.is_unwanted:
            await self._outbox.refused(message)
        if is_last:
            await self._outbox.end(message, told)
        else:
            await self._outbox.retry(message, self._clock() + _delay_s(message.attempts, outcome), told)


def _delay_s(attempts: int, outcome: Outcome) -> float:
    delay_s = RETRIES_S[attempts] * (1 + random.random() / 10)  # noqa: S311 - spreads load, hides nothing
    return max(delay_s, min(outcome.retry_after_s or 0.0, _LONGEST_RETRY_AFTER_S))

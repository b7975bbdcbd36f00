"""The queue's webhooks as one service has them: delivered by its parent, tried out and told again by its operators.

Owns the loop that delivers, and the words operators see. Refuses to know HTTP.
"""

import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import orjson

from gateway.overflow.endpoints import Endpoint, EndpointConfig, Endpoints, QueueWebhooksConfig
from gateway.overflow.job import OutboxRow
from gateway.overflow.outbox import QueueOutbox
from gateway.overflow.store import QueueStore
from gateway.webhook_delivery import WebhookDelivery
from gateway.webhook_sender import Outcome, Sender
from gateway.webhooks import Receiver, host_of

TEST_EVENT = "webhook.test"


class UnknownEndpointError(LookupError):
    """No endpoint has this id."""


class UnknownMessageError(LookupError):
    """No message has this id, or it is forgotten."""


class QueueWebhooks:
    """One per service. `owner` is who leases messages."""

    def __init__(
        self,
        store: QueueStore,
        endpoints: Endpoints,
        settings: Callable[[], QueueWebhooksConfig],
        owner: str,
    ) -> None:
        self.delivery = WebhookDelivery(QueueOutbox(store, endpoints, owner), "webhook")
        self._store = store
        self._endpoints = endpoints
        self._settings = settings

    async def run(self) -> None:
        """Delivers, until cancelled."""
        await self.delivery.run()

    async def listed(self, tenant: str = "") -> list[dict[str, Any]]:
        """Those of the configuration first; no secrets."""
        declared = [each for each in self._settings().endpoints if tenant in ("", each.tenant)]
        found: list[Endpoint | EndpointConfig] = [*declared, *await self._endpoints.listed(tenant)]
        return [described(each) for each in found]

    async def create(self, tenant: str, url: str, events: list[str]) -> dict[str, Any]:
        """With its secret. ValueError with a sentence."""
        return self._with_secret(await self._endpoints.create(tenant, url, events))

    async def shown(self, id_or_tenant: str) -> dict[str, Any]:
        """With its secret. A tenant's name: what signs the webhooks that its requests name."""
        return self._with_secret(await self._found(id_or_tenant))

    async def rotate(self, id_or_tenant: str, grace_s: float) -> dict[str, Any]:
        return self._with_secret(await self._endpoints.rotate(await self._found(id_or_tenant), grace_s))

    async def enable(self, endpoint_id: str) -> dict[str, Any]:
        return described(await self._endpoints.enable(await self._found(endpoint_id)))

    async def remove(self, endpoint_id: str) -> dict[str, Any]:
        endpoint = await self._found(endpoint_id)
        await self._endpoints.remove(endpoint)
        return described(endpoint) | {"state": "removed"}

    async def test(self, endpoint_id: str) -> dict[str, Any]:
        """Sends one now, by itself: what the receiver answers to it. It is in no outbox."""
        receiver = await self._receiver(endpoint_id)
        now_time = time.time()
        message_id = f"msg_{secrets.token_hex(16)}"
        event = {
            "id": "evt_" + message_id.removeprefix("msg_"),
            "object": "event",
            "type": TEST_EVENT,
            "created_at": int(now_time),
            "data": {"id": endpoint_id},
        }
        sender = Sender()
        try:
            outcome: Outcome = await sender.send(
                receiver.url,
                receiver.secrets,
                (message_id, int(now_time), orjson.dumps(event)),
                receiver.allowed,
            )
        finally:
            await sender.close()
        return {
            "id": message_id,
            "is_delivered": outcome.is_delivered,
            "status": outcome.status,
            "error": outcome.error,
        }

    async def messages(self, subject: str, most: int) -> list[dict[str, Any]]:
        """Of one job or parent, or all; newest first."""
        return [told(row) for row in await self._store.list_outbox(subject, most)]

    async def replay(self, message_id: str) -> dict[str, Any]:
        if not await self._store.outbox_replay(message_id):
            raise UnknownMessageError(message_id)
        return {"id": message_id, "state": "waiting"}

    async def close(self) -> None:
        await self._endpoints.close()

    def _with_secret(self, endpoint: Endpoint) -> dict[str, Any]:
        return described(endpoint) | {"secret": self._endpoints.secret_text(endpoint)}

    async def _found(self, id_or_tenant: str) -> Endpoint:
        endpoint = await self._endpoints.find(id_or_tenant)
        if endpoint is None:
            raise UnknownEndpointError(id_or_tenant)
        return endpoint

    async def _receiver(self, endpoint_id: str) -> Receiver:
        """Also of one that is disabled: to see whether it is well again."""
        for declared in self._settings().endpoints:
            if declared.id == endpoint_id and declared.is_on:
                return declared.receiver()
        stored = await self._endpoints.find(endpoint_id)
        if stored is None or not stored.url:
            raise UnknownEndpointError(endpoint_id)
        return Receiver(stored.url, self._endpoints.secrets_of(stored), self._settings().allowed)


def described(endpoint: Endpoint | EndpointConfig) -> dict[str, Any]:
    """For operators. A path may be a secret of its own, and they are the ones who know it."""
    shown: dict[str, Any] = {
        "id": endpoint.id,
        "tenant": endpoint.tenant,
        "url": endpoint.url,
        "events": list(endpoint.events),
    }
    if isinstance(endpoint, EndpointConfig):
        return shown | {"source": "config", "state": "on" if endpoint.is_on else "off"}
    is_on = endpoint.disabled_time is None
    return shown | {
        "source": "database",
        "state": "on" if is_on else f"disabled: {endpoint.disabled_because}",
        "created": _iso(endpoint.created_time),
    }


def told(row: OutboxRow) -> dict[str, Any]:
    """A message of the outbox, for operators."""
    if row.delivered_time is not None:
        state = "delivered"
    else:
        state = "given up" if row.next_time is None else "waiting"
    to = row.webhook if row.webhook.startswith("we_") else host_of(row.webhook)
    return {
        "id": row.id,
        "subject": row.subject,
        "tenant": row.tenant,
        "told": row.state,
        "to": to,
        "state": state,
        "attempts": row.attempts + (state == "delivered"),
        "created": _iso(row.created_time),
        "next": None if state != "waiting" or row.next_time is None else _iso(row.next_time),
        "error": row.error,
    }


def _iso(at_time: float) -> str:
    return datetime.fromtimestamp(at_time, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

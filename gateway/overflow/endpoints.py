"""Who hears of a tenant's jobs: receivers declared, made by operators, or named by a request, and what they hear of.

Owns their names, as jobs and outbox rows carry them: the id of an endpoint, or the URL that a request brought along. A
signing secret is stored nowhere: it is derived from the pepper, the endpoint and a generation, which a rotation raises;
the one before signs too for a while. A tenant has one more of that kind, for the URLs of its requests.
"""

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Final, Protocol

import msgspec
from pydantic import AfterValidator, Field

from gateway.overflow.job import Door
from gateway.webhook_config import NetworkText, WebhookConfig, read_network
from gateway.webhooks import Networks, Receiver, check_url, read_secret
from local_engine.config import Section

# What a door tells of, by the state of what has ended.
EVENTS: Final[Mapping[Door, Mapping[str, str]]] = {
    "job": {state: f"job.{state}" for state in ("succeeded", "failed", "dead", "cancelled", "expired")},
    "held": {},  # its caller waits for it
    "batch": {state: f"batch.{state}" for state in ("completed", "failed", "expired", "cancelled")},
    "response": {
        "succeeded": "response.completed",
        "incomplete": "response.incomplete",  # the answer says that it stopped early
        "failed": "response.failed",
        "dead": "response.failed",
        "expired": "response.failed",
        "cancelled": "response.cancelled",
    },
    "workers_ai": {
        "queued": "cf.workersAi.model.batch.queued",
        "succeeded": "cf.workersAi.model.batch.succeeded",
        "completed": "cf.workersAi.model.batch.succeeded",
        **dict.fromkeys(("failed", "dead", "expired", "cancelled"), "cf.workersAi.model.batch.failed"),
    },
}
ALL_EVENTS: Final = tuple(dict.fromkeys(event for events in EVENTS.values() for event in events.values()))
MOST_PER_TENANT: Final = 20
_REMEMBERED_S: Final = 2.0
_PREFIX: Final = "we_"


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A receiver that an operator made for a tenant. `url` "": stands for those that the tenant's requests name.

    `events` are those it wants, `*` allowed at the end. Times are wall clock, seconds."""

    id: str
    tenant: str
    url: str
    events: tuple[str, ...] = ("*",)
    created_time: float
    generation: int = 1  # of its secret
    previous_until_time: float = 0.0  # until then the generation before signs as well
    disabled_time: float | None = None
    disabled_because: str = ""

    def wants(self, event: str) -> bool:
        return any(_matches(pattern, event) for pattern in self.events)


class EndpointStore(Protocol):
    """Where endpoints are kept. StorageError or StoreAwayError when it cannot be asked."""

    async def all(self) -> list[Endpoint]: ...

    async def put(self, endpoint: Endpoint) -> None:
        """Makes it, or replaces the one of the same id."""
        ...

    async def remove(self, endpoint_id: str) -> bool: ...

    async def close(self) -> None: ...


def _event_pattern(text: str) -> str:
    if not any(_matches(text, event) for event in ALL_EVENTS):
        raise ValueError(
            f"there is no event {text}; there are {', '.join(ALL_EVENTS)}, and * for the rest of a name"
        )
    return text


EventPattern = Annotated[str, AfterValidator(_event_pattern)]


class EndpointConfig(WebhookConfig):
    """A receiver of a tenant's events. Others are made with `headgate webhooks create`."""

    tenant: str = Field(min_length=1, max_length=256)
    """Whose jobs: an organisation, a team, or the id of a key without either."""
    events: tuple[EventPattern, ...] = ("*",)
    """Which: `batch.completed`, `response.*`, ...; `*`: all."""

    @property
    def id(self) -> str:
        digest = hashlib.blake2b(f"{self.tenant}\0{self.url}".encode(), digest_size=16)
        return _PREFIX + digest.hexdigest()

    def wants(self, event: str) -> bool:
        return any(_matches(pattern, event) for pattern in self.events)


class QueueWebhooksConfig(Section):
    """Webhooks of the queue: told to receivers when batches, responses and jobs have ended."""

    networks: tuple[NetworkText, ...] = ()
    """Networks, as `10.0.5.0/24`, that callers' webhooks may go to beside the internet; there also without TLS and at any
    port."""
    endpoints: tuple[EndpointConfig, ...] = ()
    """Receivers, by tenant."""

    @property
    def allowed(self) -> Networks:
        return tuple(read_network(text) for text in self.networks)


class Endpoints:
    """Names and finds receivers. Any number per process; what is stored is asked for every two seconds at most."""

    def __init__(
        self,
        settings: Callable[[], QueueWebhooksConfig],
        store: EndpointStore,
        pepper: bytes,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._store = store
        self._pepper = pepper
        self._clock = clock
        self._stored: dict[str, Endpoint] = {}
        self._asked_time = 0.0

    async def names(self, tenant: str, door: Door, url: str = "") -> str:
        """Who is to hear of something that comes through this door now: what goes to `NewJob.webhook`.

        `url` is the request's own wish. ValueError with a sentence when a webhook cannot go there."""
        found = [url] if url else []
        if url:
            check_url(url, self._settings().allowed)
        events = EVENTS[door].values()
        await self._refresh()
        ours: list[Endpoint | EndpointConfig] = [
            each for each in self._settings().endpoints if each.is_on and each.tenant == tenant
        ]
        ours += [
            each
            for each in self._stored.values()
            if each.tenant == tenant and each.url and each.disabled_time is None
        ]
        found += [endpoint.id for endpoint in ours if any(endpoint.wants(event) for event in events)]
        return " ".join(dict.fromkeys(found))

    async def receiver(self, tenant: str, name: str, event: str) -> Receiver | None:
        """None: it does not exist any more, is disabled, or does not want this event."""
        settings = self._settings()
        for declared in settings.endpoints:
            if declared.id == name and declared.tenant == tenant:
                return declared.receiver() if declared.is_on and declared.wants(event) else None
        await self._refresh()
        if not is_endpoint(name):
            return Receiver(name, self.secrets_of(self._of_requests(tenant)), settings.allowed)
        stored = self._stored.get(name)
        if (
            stored is None
            or stored.tenant != tenant
            or stored.disabled_time is not None
            or not stored.wants(event)
        ):
            return None
        return Receiver(stored.url, self.secrets_of(stored), settings.allowed)

    async def listed(self, tenant: str = "") -> list[Endpoint]:
        """Those that are stored, of one tenant or all."""
        await self._refresh(is_now=True)
        found = [each for each in self._stored.values() if tenant in ("", each.tenant)]
        return sorted(found, key=lambda each: (each.tenant, each.created_time))

    async def create(self, tenant: str, url: str, events: Iterable[str]) -> Endpoint:
        """ValueError when it cannot be."""
        check_url(url, self._settings().allowed)
        if sum(each.tenant == tenant for each in await self.listed()) >= MOST_PER_TENANT:
            raise ValueError(f"a tenant has {MOST_PER_TENANT} endpoints at most: remove one")
        patterns = tuple(_event_pattern(each) for each in events) or ("*",)
        made = Endpoint(
            id=_PREFIX + secrets.token_hex(16),
            tenant=tenant,
            url=url,
            events=patterns,
            created_time=self._clock(),
        )
        await self._put(made)
        return made

    async def find(self, id_or_tenant: str) -> Endpoint | None:
        """By its id; by a tenant's name what stands for the URLs of its requests."""
        await self._refresh(is_now=True)
        if id_or_tenant.startswith(_PREFIX):
            return self._stored.get(id_or_tenant)
        return self._of_requests(id_or_tenant)

    async def rotate(self, endpoint: Endpoint, grace_s: float) -> Endpoint:
        """A new secret; the one before signs beside it for so long."""
        until_time = self._clock() + grace_s
        changed = msgspec.structs.replace(
            endpoint, generation=endpoint.generation + 1, previous_until_time=until_time
        )
        await self._put(changed)
        return changed

    async def disable(self, tenant: str, name: str, because: str) -> None:
        """A stored one is told nothing more. Of no effect for others."""
        await self._refresh(is_now=True)
        stored = self._stored.get(name)
        if stored is not None and stored.tenant == tenant:
            await self._put(
                msgspec.structs.replace(stored, disabled_time=self._clock(), disabled_because=because)
            )

    async def enable(self, endpoint: Endpoint) -> Endpoint:
        changed = msgspec.structs.replace(endpoint, disabled_time=None, disabled_because="")
        await self._put(changed)
        return changed

    async def remove(self, endpoint: Endpoint) -> bool:
        self._stored.pop(endpoint.id, None)
        return await self._store.remove(endpoint.id)

    def secrets_of(self, endpoint: Endpoint) -> tuple[bytes, ...]:
        """The newest first."""
        generations = [endpoint.generation]
        if endpoint.generation > 1 and self._clock() < endpoint.previous_until_time:
            generations.append(endpoint.generation - 1)
        return tuple(read_secret(self.secret_text(endpoint, each)) for each in generations)

    def secret_text(self, endpoint: Endpoint, generation: int | None = None) -> str:
        """`whsec_...`, to be shown to its receiver."""
        who = f"endpoint\0{endpoint.id}" if endpoint.url else f"requests\0{endpoint.tenant}"
        text = f"headgate webhook\0{who}\0{generation or endpoint.generation}"
        return "whsec_" + base64.b64encode(hmac.digest(self._pepper, text.encode(), hashlib.sha256)).decode()

    async def close(self) -> None:
        await self._store.close()

    def _of_requests(self, tenant: str) -> Endpoint:
        for each in self._stored.values():
            if each.tenant == tenant and not each.url:
                return each
        digest = hashlib.blake2b(tenant.encode(), digest_size=16).hexdigest()
        return Endpoint(id=f"{_PREFIX}requests_{digest}", tenant=tenant, url="", created_time=0.0)

    async def _put(self, endpoint: Endpoint) -> None:
        await self._store.put(endpoint)
        self._stored[endpoint.id] = endpoint

    async def _refresh(self, *, is_now: bool = False) -> None:
        now_time = self._clock()
        if is_now or not 0 <= now_time - self._asked_time < _REMEMBERED_S:
            self._stored = {each.id: each for each in await self._store.all()}
            self._asked_time = now_time


def is_endpoint(name: str) -> bool:
    """Whether a receiver's name, as jobs carry it, is that of an endpoint; else it is the URL that a request brought along."""
    return name.startswith(_PREFIX)


def _matches(pattern: str, event: str) -> bool:
    return pattern == event or (pattern.endswith("*") and event.startswith(pattern[:-1]))

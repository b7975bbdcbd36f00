"""What a request sees of the configuration: one immutable snapshot, swapped whole by a reload.

A request keeps the snapshot it started with. Built by `gateway.app`; refuses to know how.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.end_user import EndUsers
from gateway.idempotency import IdempotencyConfig
from gateway.keys import Keyring
from policies.health.book import HealthBook
from policies.policy import Hooks
from policies.routing import Catalog, Model


@dataclass(frozen=True, slots=True)
class Runtime:
    """`passthrough` holds, by provider name, the model that stands for everything of that provider."""

    catalog: Catalog
    hooks: Hooks
    health: HealthBook
    keyring: Keyring
    passthrough: Mapping[str, Model]
    session_headers: tuple[bytes, ...]
    session_names: frozenset[bytes]  # the same, to ask whether any is there
    session_secret: bytes
    ceilings: tuple[float, ...]  # by priority: the saturation at which an endpoint is full
    body_bytes: int
    response_bytes: int
    idempotency: IdempotencyConfig
    end_users: EndUsers
    takes_flex: bool = False  # there is a queue for `service_tier: "flex"`

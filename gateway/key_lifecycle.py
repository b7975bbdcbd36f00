"""Stored keys as operators handle them, by the command line and the management plane alike: found, shown, replaced.

A key itself is told by what made it, and by nothing else. What the operator has to change is a ValueError with a
sentence. Times are wall clock seconds, passed in.
"""

from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple

from msgspec.structs import replace

from gateway.keys import expiry_of, rotate_key
from gateway.stores import key_table
from gateway.stores.key_table import KeyRecord
from gateway.stores.sqlite import Connection

DEFAULT_EXPIRY: Final = "90d"


class UnknownKeyError(LookupError):
    """There is no key of that id or name."""


def state_of(record: KeyRecord, now_time: float) -> Literal["active", "blocked", "expired", "revoked"]:
    if record.revoked_time is not None:
        return "revoked"
    if record.expires_time is not None and record.expires_time <= now_time:
        return "expired"
    return "active" if record.blocked_time is None else "blocked"


def described(record: KeyRecord, now_time: float) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "kind": record.kind,
        "team": record.team,
        "models": record.models,
        "tags": record.tags,
        "created": _iso(record.created_time),
        "expires": None if record.expires_time is None else _iso(record.expires_time),
        "state": state_of(record, now_time),
    }


def listed(connection: Connection, now_time: float, *, is_all: bool) -> list[KeyRecord]:
    """By kind and name; without `is_all` only those in force or blocked."""
    records = sorted(key_table.changed_since(connection, 0), key=lambda record: (record.kind, record.name))
    return [record for record in records if is_all or state_of(record, now_time) in ("active", "blocked")]


def find_one(connection: Connection, id_or_name: str) -> KeyRecord:
    """Of keys with the same name the one that is not revoked; ValueError when that is not one."""
    found = key_table.find(connection, id_or_name)
    candidates = [record for record in found if record.revoked_time is None] or found
    if not candidates:
        raise UnknownKeyError(id_or_name)
    if len(candidates) > 1:
        ids = ", ".join(record.id for record in candidates)
        raise ValueError(f"Several keys are named so: give the id, one of {ids}.")
    return candidates[0]


def replace_key(
    connection: Connection, pepper: bytes, id_or_name: str, grace: str, expires: str | None, now_time: int
) -> tuple[str, KeyRecord]:
    """A new key for the holder; `expires` None: as long as any new key, for ever if the old one was for ever."""
    record = find_one(connection, id_or_name)
    if record.revoked_time is not None:
        raise ValueError(f"The key {record.id} is revoked: make a new one.")
    old_until_time = expiry_of(grace, now_time)
    if old_until_time is None:
        raise ValueError("The old key must end some time: give a grace of 24h or 7d.")
    if expires is None:
        expires = "never" if record.expires_time is None else DEFAULT_EXPIRY
    key = rotate_key(connection, pepper, record, expiry_of(expires, now_time), old_until_time)
    return key, find_one(connection, record.id)


class KeyChanges(NamedTuple):
    """What of a key is to be another; None: as it is. `models` `*`: every one."""

    team: str | None = None
    models: tuple[str, ...] | None = None
    tags: tuple[str, ...] | None = None
    expires: str | None = None
    is_blocked: bool | None = None


def change_key(connection: Connection, id_or_name: str, changes: KeyChanges, now_time: int) -> KeyRecord:
    """The key itself stays; every worker follows within seconds."""
    record = find_one(connection, id_or_name)
    if record.revoked_time is not None:
        raise ValueError(f"The key {record.id} is revoked: make a new one.")
    wanted: dict[str, Any] = {}
    if changes.team is not None:
        wanted["team"] = changes.team
    if changes.models is not None:
        wanted["models"] = None if changes.models == ("*",) else changes.models
    if changes.tags is not None:
        wanted["tags"] = changes.tags
    if changes.expires is not None:
        wanted["expires_time"] = expiry_of(changes.expires, now_time)
    if changes.is_blocked is not None:
        wanted["blocked_time"] = (record.blocked_time or now_time) if changes.is_blocked else None
    key_table.change(connection, replace(record, **wanted))
    return find_one(connection, record.id)


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

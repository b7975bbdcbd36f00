"""The keys' endpoints, without HTTP: bodies in, plain records out.

A key itself is in the answer that made it, and in no other. What the client has to change is a ValueError with a
sentence.
"""

import time
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway import key_lifecycle
from gateway.key_lifecycle import (
    DEFAULT_EXPIRY,
    KeyChanges,
    change_key,
    described,
    find_one,
    replace_key,
)
from gateway.keys import NewKey, create_key, expiry_of
from gateway.stores import key_table
from gateway.stores.sqlite import Connection


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, strict=True)


class KeyBody(Body):
    """`POST /api/keys`. `expires`: 90d, 12h, a day, or `never`."""

    name: str = Field(min_length=1, max_length=128)
    kind: Literal["caller", "operator"] = "caller"
    team: str = Field("", max_length=128)
    models: list[str] | None = None
    tags: list[str] = Field(default_factory=list, max_length=16)
    expires: str = DEFAULT_EXPIRY


class ChangeBody(Body):
    """`PATCH /api/keys/{key}`: what is given changes. `models` `["*"]`: every one."""

    team: str | None = Field(None, max_length=128)
    models: list[str] | None = Field(None, min_length=1)
    tags: list[str] | None = Field(None, max_length=16)
    expires: str | None = None
    blocked: bool | None = None


class RotateBody(Body):
    """`POST /api/keys/{key}/rotate`. `grace`: how long the old key stays good."""

    grace: str = "24h"
    expires: str | None = None


_B = TypeVar("_B", bound=BaseModel)


def parse(model: type[_B], body: bytes) -> _B:
    """ValueError with the first problem and its place."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None


def listed(connection: Connection, *, is_all: bool) -> list[dict[str, Any]]:
    now_time = time.time()
    return [
        described(record, now_time) for record in key_lifecycle.listed(connection, now_time, is_all=is_all)
    ]


def shown(connection: Connection, id_or_name: str) -> dict[str, Any]:
    return described(find_one(connection, id_or_name), time.time())


def create(connection: Connection, pepper: bytes, wanted: KeyBody) -> dict[str, Any]:
    now_time = int(time.time())
    new = NewKey(
        wanted.name,
        wanted.kind,
        wanted.team,
        None if wanted.models is None else tuple(wanted.models),
        tuple(wanted.tags),
        expiry_of(wanted.expires, now_time),
    )
    key, record = create_key(connection, pepper, new, now_time)
    return {"key": key} | described(record, now_time)


def rotate(connection: Connection, pepper: bytes, id_or_name: str, wanted: RotateBody) -> dict[str, Any]:
    now_time = int(time.time())
    key, record = replace_key(connection, pepper, id_or_name, wanted.grace, wanted.expires, now_time)
    return {"key": key} | described(record, now_time)


def change(connection: Connection, id_or_name: str, wanted: ChangeBody) -> dict[str, Any]:
    changes = KeyChanges(
        wanted.team,
        None if wanted.models is None else tuple(wanted.models),
        None if wanted.tags is None else tuple(wanted.tags),
        wanted.expires,
        wanted.blocked,
    )
    now_time = time.time()
    return described(change_key(connection, id_or_name, changes, int(now_time)), now_time)


def revoke(connection: Connection, id_or_name: str) -> dict[str, Any]:
    record = find_one(connection, id_or_name)
    key_table.revoke(connection, record.id, int(time.time()))
    return shown(connection, record.id)

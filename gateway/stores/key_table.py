"""The table of API keys: made, rotated, revoked, read.

Stores keyed hashes only; refuses to know keys themselves. Invariants: every change raises the table's revision
by one, so a reader may ask for what changed since; rows are never deleted, a revoked key stays known as such.
"""

from typing import Any, Final, Literal

import apsw
import msgspec

from gateway.stores.sqlite import Connection

KeyKind = Literal["caller", "operator"]


class NameTakenError(Exception):
    """An unrevoked key of the same kind has that name."""


class KeyRecord(msgspec.Struct, frozen=True):
    """One key as stored. Times are wall clock seconds; None: never. `models` None: every model."""

    id: str
    kind: KeyKind
    hash: bytes
    pepper_id: str
    name: str
    team: str = ""
    models: tuple[str, ...] | None = None
    tags: tuple[str, ...] = ()
    created_time: int = 0
    expires_time: int | None = None
    revoked_time: int | None = None
    previous_hash: bytes | None = None  # the key before the last rotation, good until `previous_expires_time`
    previous_expires_time: int | None = None
    revision: int = 0
    blocked_time: int | None = None  # refused since, until it is unblocked


_COLUMNS: Final = KeyRecord.__struct_fields__
_SELECT: Final = f"SELECT {', '.join(_COLUMNS)} FROM api_key"  # noqa: S608 - own names
_NEXT_REVISION: Final = "(SELECT coalesce(max(revision), 0) + 1 FROM api_key)"


def insert(connection: Connection, record: KeyRecord) -> None:
    """Adds a key; its `revision` is chosen here. NameTakenError when its name is in use."""
    fields = msgspec.structs.asdict(record)
    fields["models"] = None if record.models is None else msgspec.json.encode(record.models).decode()
    fields["tags"] = msgspec.json.encode(record.tags).decode()
    del fields["revision"]
    try:
        connection.execute(
            f"INSERT INTO api_key ({', '.join(fields)}, revision) "  # noqa: S608 - own names
            f"VALUES ({', '.join('?' * len(fields))}, {_NEXT_REVISION})",
            tuple(fields.values()),
        )
    except apsw.ConstraintError as error:
        raise NameTakenError(record.name) from error


def revoke(connection: Connection, key_id: str, now_time: int) -> None:
    """Ends a key at once, its predecessor too. A key that is revoked already keeps its time."""
    connection.execute(
        f"UPDATE api_key SET revoked_time = ?, revision = {_NEXT_REVISION} "  # noqa: S608 - own names
        "WHERE id = ? AND revoked_time IS NULL",
        (now_time, key_id),
    )


def change(connection: Connection, record: KeyRecord) -> None:
    """Gives the key of `record.id` the record's team, models, tags, expiry and block."""
    models = None if record.models is None else msgspec.json.encode(record.models).decode()
    connection.execute(
        "UPDATE api_key SET team = ?, models = ?, tags = ?, expires_time = ?, blocked_time = ?, "  # noqa: S608 - own names
        f"revision = {_NEXT_REVISION} WHERE id = ? AND revoked_time IS NULL",
        (
            record.team,
            models,
            msgspec.json.encode(record.tags).decode(),
            record.expires_time,
            record.blocked_time,
            record.id,
        ),
    )


def rotate(connection: Connection, record: KeyRecord, previous_expires_time: int) -> None:
    """Gives the key of `record.id` the record's hash, pepper and expiry; the hash before stays good for a while."""
    connection.execute(
        "UPDATE api_key SET previous_hash = hash, previous_expires_time = ?, hash = ?, pepper_id = ?, "  # noqa: S608 - own names
        f"expires_time = ?, revision = {_NEXT_REVISION} WHERE id = ? AND revoked_time IS NULL",
        (previous_expires_time, record.hash, record.pepper_id, record.expires_time, record.id),
    )


def find(connection: Connection, id_or_name: str) -> list[KeyRecord]:
    """The key with this id, else those with this name."""
    by_id = _records(connection, f"{_SELECT} WHERE id = ?", (id_or_name,))
    return by_id or _records(connection, f"{_SELECT} WHERE name = ? ORDER BY revision", (id_or_name,))


def changed_since(connection: Connection, revision: int) -> list[KeyRecord]:
    """What was made or changed after `revision`, oldest change first; 0: all."""
    return _records(connection, f"{_SELECT} WHERE revision > ? ORDER BY revision", (revision,))


def latest_revision(connection: Connection) -> int:
    """0 while there are no keys."""
    revision = connection.execute("SELECT coalesce(max(revision), 0) FROM api_key").get
    assert isinstance(revision, int)
    return revision


def _records(connection: Connection, query: str, bindings: tuple[Any, ...]) -> list[KeyRecord]:
    records = []
    for row in connection.execute(query, bindings):
        fields: dict[str, Any] = dict(zip(_COLUMNS, row, strict=True))
        models = fields["models"]
        fields["models"] = None if models is None else msgspec.json.decode(models, type=tuple[str, ...])
        fields["tags"] = msgspec.json.decode(fields["tags"], type=tuple[str, ...])
        records.append(KeyRecord(**fields))
    return records

"""The tables of teams and of limits set beside the configuration.

Stores what operators said and nothing derived from it. Invariant: every change raises the revision by one, in its own
transaction. Times are wall clock seconds.
"""

from typing import Final

import msgspec

from gateway.stores.sqlite import Connection

_BUMP: Final = "UPDATE tenants_revision SET revision = revision + 1"


class TeamRecord(msgspec.Struct, frozen=True):
    """One team as stored. None: not said here, so what the configuration says holds. `models` `*`: every one."""

    name: str
    organisation: str | None = None
    models: tuple[str, ...] | None = None
    is_blocked: bool | None = None
    created_time: int = 0


class StoredLimit(msgspec.Struct, frozen=True):
    """A limit as an operator wrote it: the JSON of a `LimitConfig`. `scope` has keys by their ids."""

    scope: str
    name: str
    spec: str
    created_time: int = 0


class RaisedLimit(msgspec.Struct, frozen=True):
    """Another amount for a limit of this scope and name, until a time."""

    scope: str
    name: str
    amount: int
    until_time: int


def revision(connection: Connection) -> int:
    """Rises with every change; lower than before: another database was put in its place."""
    found = connection.execute("SELECT revision FROM tenants_revision").get
    assert isinstance(found, int)
    return found


def teams(connection: Connection) -> list[TeamRecord]:
    """By name."""
    rows = connection.execute(
        "SELECT name, organisation, models, is_blocked, created_time FROM team ORDER BY name"
    )
    return [
        TeamRecord(
            name,
            organisation,
            None if models is None else msgspec.json.decode(models, type=tuple[str, ...]),
            None if is_blocked is None else bool(is_blocked),
            created_time,
        )
        for name, organisation, models, is_blocked, created_time in rows
    ]


def put_team(connection: Connection, record: TeamRecord) -> None:
    """Adds the team, or replaces what is stored of it; its time of creation stays."""
    models = None if record.models is None else msgspec.json.encode(record.models).decode()
    with connection:
        connection.execute(
            "INSERT INTO team (name, organisation, models, is_blocked, created_time) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET organisation = excluded.organisation, models = excluded.models, "
            "is_blocked = excluded.is_blocked",
            (record.name, record.organisation, models, record.is_blocked, record.created_time),
        )
        connection.execute(_BUMP)


def delete_team(connection: Connection, name: str) -> bool:
    """False when nothing is stored of it."""
    with connection:
        is_there = bool(connection.execute("DELETE FROM team WHERE name = ? RETURNING 1", (name,)).get)
        connection.execute(_BUMP)
    return is_there


def limits(connection: Connection) -> list[StoredLimit]:
    """By scope and name."""
    rows = connection.execute("SELECT scope, name, spec, created_time FROM stored_limit ORDER BY scope, name")
    return [StoredLimit(*row) for row in rows]


def put_limit(connection: Connection, limit: StoredLimit) -> None:
    """Adds the limit, or replaces the one of this scope and name."""
    with connection:
        connection.execute(
            "INSERT INTO stored_limit (scope, name, spec, created_time) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (scope, name) DO UPDATE SET spec = excluded.spec",
            msgspec.structs.astuple(limit),
        )
        connection.execute(_BUMP)


def delete_limit(connection: Connection, scope: str, name: str) -> bool:
    """False when it is not stored. What was raised of it goes, too."""
    with connection:
        is_there = bool(
            connection.execute(
                "DELETE FROM stored_limit WHERE scope = ? AND name = ? RETURNING 1", (scope, name)
            ).get
        )
        connection.execute("DELETE FROM raised_limit WHERE scope = ? AND name = ?", (scope, name))
        connection.execute(_BUMP)
    return is_there


def raised(connection: Connection, now_time: float) -> list[RaisedLimit]:
    """Those that are not over."""
    rows = connection.execute(
        "SELECT scope, name, amount, until_time FROM raised_limit WHERE until_time > ? ORDER BY scope, name",
        (now_time,),
    )
    return [RaisedLimit(*row) for row in rows]


def put_raised(connection: Connection, raised_limit: RaisedLimit) -> None:
    """In place of what was raised before."""
    with connection:
        connection.execute(
            "INSERT OR REPLACE INTO raised_limit (scope, name, amount, until_time) VALUES (?, ?, ?, ?)",
            msgspec.structs.astuple(raised_limit),
        )
        connection.execute(_BUMP)


def delete_raised(connection: Connection, scope: str, name: str) -> bool:
    """False when nothing was raised."""
    with connection:
        is_there = bool(
            connection.execute(
                "DELETE FROM raised_limit WHERE scope = ? AND name = ? RETURNING 1", (scope, name)
            ).get
        )
        connection.execute(_BUMP)
    return is_there

"""Teams and limits in force: what the configuration declares under what operators set in the database.

Owns the one rule for which wins. A limit is told by its scope and name: one in the database replaces the declared one,
and is replaced by nothing until it is unset. Of a team, each setting the database has wins over the declared one. A
raised limit is another amount until a time, whichever limit it is of; for one member of a `*` limit it makes a limit of
its own. Followed by a thread: every worker knows of a change within seconds. Refuses to know how limits are counted.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple

from msgspec.structs import replace
from pydantic import ValidationError

from gateway.limits_config import LimitConfig, TeamConfig, scope_of
from gateway.stores import tenant_table
from gateway.stores.sqlite import DATABASE_NAME, Connection, explained, open_database
from gateway.stores.tenant_table import RaisedLimit, StoredLimit, TeamRecord
from policies.limits.limit import EVERY, Limit, Scope

_POLL_S: Final = 1.0

_log = logging.getLogger(__name__)

LimitId = tuple[Scope, str]


class Team(NamedTuple):
    """What holds for all keys of a team. `models` None: every one."""

    name: str
    organisation: str = ""
    models: frozenset[str] | None = None
    is_blocked: bool = False


class Declared(NamedTuple):
    """What the configuration says."""

    teams: Mapping[str, TeamConfig] = {}
    limits: tuple[Limit, ...] = ()


class Stored(NamedTuple):
    """What the database says."""

    teams: list[TeamRecord]
    limits: list[StoredLimit]
    raised: list[RaisedLimit]

    @classmethod
    def of(cls, connection: Connection, now_time: float) -> "Stored":
        return cls(
            tenant_table.teams(connection),
            tenant_table.limits(connection),
            tenant_table.raised(connection, now_time),
        )


class Tenants(NamedTuple):
    """What is in force."""

    teams: Mapping[str, Team]
    limits: tuple[Limit, ...]


class SourcedLimit(NamedTuple):
    """A limit in force and where it is from; `until_time` while its amount is another than `usual_amount`."""

    limit: Limit
    source: Literal["config", "database"]
    usual_amount: int
    until_time: int | None = None


def merged(declared: Declared, stored: Stored) -> Tenants:
    """The rule for which wins."""
    return Tenants(
        merged_teams(declared.teams, stored.teams),
        tuple(sourced.limit for sourced in merged_limits(declared.limits, stored)),
    )


def merged_teams(declared: Mapping[str, TeamConfig], stored: Iterable[TeamRecord]) -> dict[str, Team]:
    teams = {
        name: Team(
            name, team.organisation, None if team.models is None else frozenset(team.models), team.blocked
        )
        for name, team in declared.items()
    }
    for record in stored:
        team = teams.get(record.name) or Team(record.name)
        if record.organisation is not None:
            team = team._replace(organisation=record.organisation)
        if record.models is not None:
            team = team._replace(models=None if record.models == (EVERY,) else frozenset(record.models))
        if record.is_blocked is not None:
            team = team._replace(is_blocked=record.is_blocked)
        teams[record.name] = team
    return teams


def merged_limits(declared: Iterable[Limit], stored: Stored) -> list[SourcedLimit]:
    """Every limit in force."""
    found: dict[LimitId, SourcedLimit] = {
        (limit.scope, limit.name): SourcedLimit(limit, "config", limit.amount) for limit in declared
    }
    for record in stored.limits:
        limit = read_limit(record)
        if limit is not None:
            found[limit.scope, limit.name] = SourcedLimit(limit, "database", limit.amount)
    for raise_ in stored.raised:
        scope = scope_of(raise_.scope)
        usual = found.get((scope, raise_.name)) or found.get((Scope(scope.level), raise_.name))
        if usual is not None:
            limit = replace(usual.limit, scope=scope, amount=raise_.amount)
            found[scope, raise_.name] = usual._replace(limit=limit, until_time=raise_.until_time)
    return list(found.values())


def read_limit(record: StoredLimit) -> Limit | None:
    """None, and a line in the log, when this version cannot read it."""
    try:
        return LimitConfig.model_validate_json(record.spec).limit()
    except ValidationError as error:
        _log.error(
            "the limit %s of %s in the database cannot be read: %s",
            record.name,
            record.scope,
            error.errors()[0]["msg"],
        )
        return None


class TenantsWatch:
    """Follows the database. `on_change` is called with what is in force: at once, and after every change.

    It runs on the watching thread, but at the start and in `declare` on the caller's.
    """

    def __init__(
        self,
        storage: Path,
        declared: Declared,
        on_change: Callable[[Tenants], None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = storage / DATABASE_NAME
        self._declared = declared
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._stored = Stored([], [], [])
        self._revision = -1
        self._is_failing = False
        self._connection: Connection | None = None
        self._stop = threading.Event()
        self.refresh()
        self._thread = threading.Thread(target=self._follow, name="tenants", daemon=True)
        self._thread.start()

    def declare(self, declared: Declared) -> None:
        """The configuration was reloaded."""
        with self._lock:
            self._declared = declared
            self._on_change(merged(declared, self._stored))

    def refresh(self) -> None:
        """Takes up what changed. StorageError when the database cannot be read."""
        with explained(self._path), self._lock:
            if self._connection is None:
                self._connection = open_database(self._path)
            now_time = self._clock()
            revision = tenant_table.revision(self._connection)
            is_over = any(raise_.until_time <= now_time for raise_ in self._stored.raised)
            if revision == self._revision and not is_over:
                return
            self._stored = Stored.of(self._connection, now_time)
            self._revision = revision
            self._on_change(merged(self._declared, self._stored))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._connection is not None:
            self._connection.close()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                self.refresh()
                self._is_failing = False
            except Exception as error:  # noqa: BLE001 - a thread that died would miss every later change
                if not self._is_failing:
                    _log.error("teams and limits: what is known so far stays in force: %s", error)
                self._is_failing = True
                if self._connection is not None:
                    self._connection.close()
                    self._connection = None


def narrowed(own: frozenset[str] | None, teams: frozenset[str] | None) -> frozenset[str] | None:
    """The models that both lists allow; None: every one. A name may end in `*`."""
    if own is None or teams is None:
        return teams if own is None else own
    return frozenset(
        narrow
        for one, other in ((one, other) for one in own for other in teams)
        for narrow, wide in ((one, other), (other, one))
        if narrow == wide or (wide.endswith("*") and narrow.startswith(wide[:-1]))
    )

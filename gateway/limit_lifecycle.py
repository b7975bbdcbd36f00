"""Teams and limits as operators handle them, by the command line and the management plane alike: set, shown, unset.

What is set goes to the database and wins over the configuration (`gateway.tenants` has the rule). What the operator has
to change is a ValueError with a sentence. Times are wall clock seconds, passed in.
"""

from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Final, NamedTuple

import msgspec

from gateway.key_lifecycle import UnknownKeyError, find_one
from gateway.keys import expiry_of
from gateway.limits_config import MAX_AMOUNT, LimitConfig, scope_of, scope_text
from gateway.stores import tenant_table
from gateway.stores.sqlite import Connection
from gateway.stores.tenant_table import RaisedLimit, StoredLimit, TeamRecord
from gateway.tenants import Declared, SourcedLimit, Stored, Team, merged_limits, merged_teams
from policies.limits.limit import EVERY, Limit, Scope

_NANO: Final = 1_000_000_000


class UnknownTeamError(LookupError):
    """Neither the configuration nor the database knows a team of that name."""


class UnknownLimitError(LookupError):
    """There is no limit of that scope and name."""


class TeamChanges(NamedTuple):
    """What of a team is to be said; None: as it is. `models` `*`: every one."""

    organisation: str | None = None
    models: tuple[str, ...] | None = None
    is_blocked: bool | None = None


def teams_in_force(connection: Connection, declared: Declared) -> dict[str, Team]:
    """By name."""
    teams = merged_teams(declared.teams, tenant_table.teams(connection))
    return dict(sorted(teams.items()))


def find_team(connection: Connection, declared: Declared, name: str) -> Team:
    team = teams_in_force(connection, declared).get(name)
    if team is None:
        raise UnknownTeamError(name)
    return team


def create_team(
    connection: Connection, declared: Declared, name: str, changes: TeamChanges, now_time: int
) -> Team:
    """ValueError when there is one of that name."""
    if not name or not name.isprintable() or len(name) > 128:
        raise ValueError("A team needs a name, printable and up to 128 characters.")
    if name in teams_in_force(connection, declared):
        raise ValueError(f"There is a team {name!r} already: change that one.")
    tenant_table.put_team(connection, TeamRecord(name, *changes, created_time=now_time))
    return find_team(connection, declared, name)


def change_team(
    connection: Connection, declared: Declared, name: str, changes: TeamChanges, now_time: int
) -> Team:
    """What is said here wins over the configuration from now on."""
    find_team(connection, declared, name)
    stored = {record.name: record for record in tenant_table.teams(connection)}
    record = stored.get(name) or TeamRecord(name, created_time=now_time)
    said = {field: value for field, value in changes._asdict().items() if value is not None}
    tenant_table.put_team(connection, msgspec.structs.replace(record, **said))
    return find_team(connection, declared, name)


def forget_team(connection: Connection, name: str) -> None:
    """What the database says of it; what the configuration says holds again."""
    if not tenant_table.delete_team(connection, name):
        raise UnknownTeamError(name)


def described_team(team: Team) -> dict[str, Any]:
    return {
        "name": team.name,
        "organisation": team.organisation,
        "models": None if team.models is None else sorted(team.models),
        "blocked": team.is_blocked,
    }


def limits_in_force(connection: Connection, declared: Declared, now_time: float) -> list[SourcedLimit]:
    """By scope and name."""
    found = merged_limits(declared.limits, Stored.of(connection, now_time))
    return sorted(found, key=lambda one: (scope_text(one.limit.scope), one.limit.name))


def set_limit(
    connection: Connection, wanted: LimitConfig, declared_keys: Collection[str], now_time: int
) -> Limit:
    """Stores the limit, in place of one of its scope and name."""
    scope = resolved_scope(connection, wanted.scope, declared_keys)
    written = wanted.model_copy(update={"scope": scope_text(scope)})
    limit = written.limit()
    spec = LimitConfig.model_validate(written.model_dump(exclude_unset=True)).model_dump_json(
        exclude_unset=True
    )
    tenant_table.put_limit(connection, StoredLimit(scope_text(scope), limit.name, spec, now_time))
    return limit


def unset_limit(connection: Connection, scope: str, name: str, declared_keys: Collection[str]) -> None:
    """One of the configuration's holds again, if it has one of the scope and name."""
    found = scope_text(resolved_scope(connection, scope, declared_keys))
    if not tenant_table.delete_limit(connection, found, name):
        raise UnknownLimitError(f"{found} {name}")


class Raise(NamedTuple):
    """Another amount for a while: `amount` in dollars for money; `until` 24h, 7d, a day or a time."""

    scope: str
    name: str
    amount: str
    until: str


def raise_limit(
    connection: Connection,
    declared: Declared,
    wanted: Raise,
    declared_keys: Collection[str],
    now_time: int,
) -> SourcedLimit:
    """For one member of a `*` limit, too. Not less than nothing; it may also be lowered."""
    scope = resolved_scope(connection, wanted.scope, declared_keys)
    known = {
        (one.limit.scope, one.limit.name): one.limit
        for one in limits_in_force(connection, declared, now_time)
    }
    limit = known.get((scope, wanted.name)) or known.get((Scope(scope.level), wanted.name))
    if limit is None:
        raise UnknownLimitError(f"{scope_text(scope)} {wanted.name}")
    until_time = expiry_of(wanted.until, now_time)
    if until_time is None:
        raise ValueError("A limit is raised until a time: for ever, set it.")
    amount = _amount_of(wanted.amount, limit)
    tenant_table.put_raised(connection, RaisedLimit(scope_text(scope), limit.name, amount, until_time))
    return next(
        one
        for one in limits_in_force(connection, declared, now_time)
        if (one.limit.scope, one.limit.name) == (scope, limit.name)
    )


def end_raise(connection: Connection, scope: str, name: str, declared_keys: Collection[str]) -> None:
    """Before its time."""
    found = scope_text(resolved_scope(connection, scope, declared_keys))
    if not tenant_table.delete_raised(connection, found, name):
        raise UnknownLimitError(f"{found} {name}")


def resolved_scope(connection: Connection, text: str, declared_keys: Collection[str]) -> Scope:
    """A key is meant by its name or id. `declared_keys`: names in the configuration."""
    scope = scope_of(text)
    name = scope.name
    if scope.level != "key" or name == EVERY or name.startswith("config:"):
        return scope
    try:
        return Scope("key", find_one(connection, name).id)
    except UnknownKeyError:
        if name in declared_keys:
            return Scope("key", f"config:{name}")
        raise


def described_limit(sourced: SourcedLimit) -> dict[str, Any]:
    """As it is written; dollars as decimal text."""
    limit = sourced.limit
    return {
        "scope": scope_text(limit.scope),
        "name": limit.name,
        "measure": "usd" if limit.measure == "money" else limit.measure,
        "amount": written(limit, limit.amount),
        "per": per_text(limit),
        "zone": limit.window.zone,
        "models": None if limit.models is None else list(limit.models),
        "soft": limit.warns_only,
        "exact": limit.is_exact,
        "when_away": limit.when_away,
        "source": sourced.source,
        "usual_amount": written(limit, sourced.usual_amount),
        "raised_until": None if sourced.until_time is None else _iso(sourced.until_time),
    }


def amount_text(limit: Limit, units: int) -> str:
    """`$12.50`, `2,000,000 tokens`."""
    if limit.measure == "money":
        dollars = f"{Decimal(units).scaleb(-9):f}".rstrip("0")
        whole, _, rest = dollars.partition(".")
        return f"{'-' if units < 0 else ''}${abs(int(whole)):,}.{rest.ljust(2, '0')}"
    noun = {"concurrent_requests": "requests at once", "concurrent_streams": "streams at once"}
    return f"{units:,} {noun.get(limit.measure) or limit.measure.replace('_', ' ')}"


def per_text(limit: Limit) -> str | None:
    """`60s`, `month`, `ever`; None: at any moment."""
    window = limit.window
    if window.length_s:
        return f"{window.length_s}s"
    return {"now": None, "total": "ever"}.get(window.span, window.span)


def written(limit: Limit, units: int) -> int | str:
    """As an amount is written: dollars as decimal text."""
    return f"{Decimal(units).scaleb(-9).normalize():f}" if limit.measure == "money" else units


def _amount_of(text: str, limit: Limit) -> int:
    try:
        amount = Decimal(text) * (_NANO if limit.measure == "money" else 1)
        units = int(amount)
    except (InvalidOperation, ValueError, OverflowError):
        raise ValueError(f"{text!r} is no amount.") from None
    if amount != units or not 0 <= units <= MAX_AMOUNT:
        raise ValueError(
            f"{text!r} is no amount of {'dollars' if limit.measure == 'money' else limit.measure}."
        )
    return units


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def of_scope(limits: Iterable[SourcedLimit], scope: Scope) -> list[SourcedLimit]:
    """Those that hold for one member: its own, and those of everybody that it has none of the name for."""
    own = {one.limit.name: one for one in limits if one.limit.scope == Scope(scope.level)}
    own.update({one.limit.name: one for one in limits if one.limit.scope == scope})
    return list(own.values())

"""The endpoints of teams and limits, without HTTP: bodies in, plain records out.

What the client has to change is a ValueError with a sentence.
"""

import time
from collections.abc import Collection
from typing import Any

from pydantic import Field

from gateway import limit_lifecycle
from gateway.limit_lifecycle import Raise, TeamChanges, described_limit, described_team
from gateway.limits_config import LimitConfig
from gateway.management.keys import Body
from gateway.stores.sqlite import Connection
from gateway.tenants import Declared


class TeamBody(Body):
    """`PATCH /api/teams/{team}`: what is given is said from now on. `models` `["*"]`: every one."""

    organisation: str | None = Field(None, max_length=128)
    models: list[str] | None = Field(None, min_length=1)
    blocked: bool | None = None

    def changes(self) -> TeamChanges:
        return TeamChanges(
            self.organisation, None if self.models is None else tuple(self.models), self.blocked
        )


class NewTeamBody(TeamBody):
    """`POST /api/teams`."""

    name: str = Field(min_length=1, max_length=128)


class LimitName(Body):
    """Which limit: `DELETE /api/limits` and `/api/limits/raised`."""

    scope: str
    name: str


class RaiseBody(LimitName):
    """`PUT /api/limits/raised`. `amount` in dollars for money; `until`: 24h, 7d, a day or a time."""

    amount: int | str
    until: str


def list_teams(connection: Connection, declared: Declared) -> list[dict[str, Any]]:
    return [described_team(team) for team in limit_lifecycle.teams_in_force(connection, declared).values()]


def create_team(connection: Connection, declared: Declared, wanted: NewTeamBody) -> dict[str, Any]:
    team = limit_lifecycle.create_team(connection, declared, wanted.name, wanted.changes(), int(time.time()))
    return described_team(team)


def show_team(connection: Connection, declared: Declared, name: str) -> dict[str, Any]:
    return described_team(limit_lifecycle.find_team(connection, declared, name))


def change_team(connection: Connection, declared: Declared, name: str, wanted: TeamBody) -> dict[str, Any]:
    team = limit_lifecycle.change_team(connection, declared, name, wanted.changes(), int(time.time()))
    return described_team(team)


def forget_team(connection: Connection, name: str) -> dict[str, Any]:
    limit_lifecycle.forget_team(connection, name)
    return {"name": name, "forgotten": True}


def list_limits(connection: Connection, declared: Declared) -> list[dict[str, Any]]:
    return [
        described_limit(one) for one in limit_lifecycle.limits_in_force(connection, declared, time.time())
    ]


def set_limit(
    connection: Connection, declared: Declared, keys: Collection[str], wanted: LimitConfig
) -> dict[str, Any]:
    limit = limit_lifecycle.set_limit(connection, wanted, keys, int(time.time()))
    found = limit_lifecycle.limits_in_force(connection, declared, time.time())
    return next(
        described_limit(one)
        for one in found
        if (one.limit.scope, one.limit.name) == (limit.scope, limit.name)
    )


def unset_limit(connection: Connection, keys: Collection[str], which: LimitName) -> dict[str, Any]:
    limit_lifecycle.unset_limit(connection, which.scope, which.name, keys)
    return {"scope": which.scope, "name": which.name, "unset": True}


def raise_limit(
    connection: Connection, declared: Declared, keys: Collection[str], wanted: RaiseBody
) -> dict[str, Any]:
    asked = Raise(wanted.scope, wanted.name, str(wanted.amount), wanted.until)
    return described_limit(limit_lifecycle.raise_limit(connection, declared, asked, keys, int(time.time())))


def end_raise(connection: Connection, keys: Collection[str], which: LimitName) -> dict[str, Any]:
    limit_lifecycle.end_raise(connection, which.scope, which.name, keys)
    return {"scope": which.scope, "name": which.name, "raised_until": None}

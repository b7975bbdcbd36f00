"""`headgate teams`: teams made, listed, changed, blocked.

What is said of a team here wins over the configuration, setting by setting, until it is forgotten.
"""

import json
import time
from typing import Annotated, Final

import typer

from gateway.commands.limits import JsonOption, cells, explained, find_place
from gateway.commands.storage import ConfigOption, DataOption, opened
from gateway.commands.tables import Column, print_table
from gateway.limit_lifecycle import (
    TeamChanges,
    change_team,
    create_team,
    described_limit,
    described_team,
    find_team,
    forget_team,
    limits_in_force,
    of_scope,
    teams_in_force,
)
from gateway.tenants import Team
from policies.limits.limit import Scope

app = typer.Typer(help="Teams: what holds for all of their keys.", no_args_is_help=True)

_COLUMNS: Final = (
    Column("name", folds=True),
    Column("organisation", folds=True),
    Column("models", folds=True, rank=1),
    Column("state"),
)

TeamArgument = Annotated[str, typer.Argument(metavar="TEAM", help="Its name.")]
OrganisationOption = Annotated[str | None, typer.Option(help="The organisation it belongs to.")]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(help="A model its keys may use, `*` at the end allowed, `*` alone for all; repeat."),
]


@app.command()
def create(
    name: TeamArgument,
    organisation: OrganisationOption = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Make a team."""
    place = find_place(config, data)
    changes = TeamChanges(organisation, tuple(model) if model else None)
    with opened(place.storage, may_write=True) as connection, explained():
        _say(create_team(connection, place.declared, name, changes, int(time.time())))


@app.command("list")
def list_teams(as_json: JsonOption = False, config: ConfigOption = None, data: DataOption = None) -> None:
    """All teams, from the configuration and the database."""
    place = find_place(config, data)
    with opened(place.storage, may_write=False) as connection:
        teams = teams_in_force(connection, place.declared).values()
    if as_json:
        print(json.dumps([described_team(team) for team in teams]))
        return
    print_table(_COLUMNS, map(_cells, teams))


@app.command()
def show(
    name: TeamArgument, as_json: JsonOption = False, config: ConfigOption = None, data: DataOption = None
) -> None:
    """One team and its limits."""
    place = find_place(config, data)
    with opened(place.storage, may_write=False) as connection, explained():
        team = find_team(connection, place.declared, name)
        limits = limits_in_force(connection, place.declared, time.time())
    own = of_scope(limits, Scope("team", name))
    if team.organisation:
        own += of_scope(limits, Scope("org", team.organisation))
    if as_json:
        print(json.dumps(described_team(team) | {"limits": [described_limit(one) for one in own]}))
        return
    _say(team)
    for one in own:
        scope, limit, amount, per, *_ = cells(one)
        print(f"limit         {scope} {limit}: {amount}{' per ' + per if per else ''}")


@app.command()
def change(
    name: TeamArgument,
    organisation: OrganisationOption = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Change what is said of a team; every worker follows within five seconds."""
    _change(name, TeamChanges(organisation, tuple(model) if model else None), config, data)


@app.command()
def block(name: TeamArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Refuse all of its keys, until it is unblocked."""
    _change(name, TeamChanges(is_blocked=True), config, data)


@app.command()
def unblock(name: TeamArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Let its keys in again, but for those that are blocked themselves."""
    _change(name, TeamChanges(is_blocked=False), config, data)


@app.command()
def forget(name: TeamArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Take back all that was said of it here; what the configuration says holds again."""
    place = find_place(config, data)
    with opened(place.storage, may_write=True) as connection, explained():
        forget_team(connection, name)
        left = teams_in_force(connection, place.declared).get(name)
    if left is None:
        print(f"There is no team {name} any more; its keys are those of a team that nothing is said of.")
    else:
        _say(left)


def _change(name: str, changes: TeamChanges, config: ConfigOption, data: DataOption) -> None:
    place = find_place(config, data)
    with opened(place.storage, may_write=True) as connection, explained():
        _say(change_team(connection, place.declared, name, changes, int(time.time())))


def _cells(team: Team) -> list[str]:
    models = "*" if team.models is None else ", ".join(sorted(team.models))
    return [team.name, team.organisation, models, "blocked" if team.is_blocked else "active"]


def _say(team: Team) -> None:
    for column, cell in zip(_COLUMNS, _cells(team), strict=True):
        print(f"{column.title:<12}  {cell}")

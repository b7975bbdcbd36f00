"""`headgate limits`: limits shown, set, unset, raised for a while.

Works beside a running gateway (every worker follows within seconds) or on a stopped one. What is set here is in the
database, and wins over a limit of the same scope and name in the configuration.
"""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from gateway.commands.storage import ConfigOption, DataOption, Storage, fail, find_storage, opened
from gateway.commands.tables import Column, print_table
from gateway.config import DEFAULT_PATH, ConfigError, StorageConfig, load
from gateway.key_lifecycle import UnknownKeyError
from gateway.limit_lifecycle import (
    Raise,
    UnknownLimitError,
    UnknownTeamError,
    amount_text,
    described_limit,
    end_raise,
    limits_in_force,
    of_scope,
    per_text,
    raise_limit,
    resolved_scope,
    set_limit,
    unset_limit,
    written,
)
from gateway.limits_config import LimitConfig, scope_text
from gateway.reconcile import counting_store
from gateway.stores.limit_sqlite import DATABASE_NAME as LIMITS_NAME
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.sqlite import Connection, StorageError
from gateway.tenants import Declared, SourcedLimit
from policies.limits.limit import EVERY, Limit
from policies.limits.messages import Reading

app = typer.Typer(
    help="What organisations, teams, keys, end users, models and tags may use.", no_args_is_help=True
)

JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
ScopeArgument = Annotated[
    str,
    typer.Argument(
        metavar="SCOPE", help="org: team: key: user: model: or tag: and a name; * for each of them."
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="As `headgate limits list` shows it.")]

_COLUMNS: Final = (
    Column("scope", folds=True),
    Column("name", folds=True),
    Column("limit"),
    Column("per"),
    Column("zone", rank=4),
    Column("models", folds=True, rank=3),
    Column("how", rank=1),
    Column("from", rank=2),
)


_STANDING_COLUMNS: Final = (
    Column("name", folds=True),
    Column("limit"),
    Column("per", rank=1),
    Column("spent"),
    Column("reserved", rank=2),
    Column("used"),
)


class Place(NamedTuple):
    """Where the database is, and what the configuration declares beside it."""

    storage: Storage
    declared: Declared
    key_names: frozenset[str]
    settings: StorageConfig


def find_place(config: Path | None, data: Path | None) -> Place:
    """With a directory named alone there is no configuration, so what is declared is not known."""
    storage = find_storage(config, data)
    if data is not None and config is None:
        return Place(storage, Declared(), frozenset(), StorageConfig(directory=storage.directory))
    try:
        loaded = load(config or DEFAULT_PATH, os.environ)
    except ConfigError as error:
        note = f"What the configuration declares is left out, because it cannot be read:\n{error}"
        Console(stderr=True).print(escape(note), style="yellow", highlight=False, soft_wrap=True)
        return Place(storage, Declared(), frozenset(), StorageConfig(directory=storage.directory))
    names = frozenset(entry.name for entry in loaded.keys)
    return Place(storage, loaded.declared(), names, loaded.storage)


@contextmanager
def explained() -> Iterator[None]:
    """What the operator has to change, as a sentence."""
    try:
        yield
    except UnknownKeyError as error:
        fail(f"There is no key {error}: see `headgate keys list`.")
    except UnknownTeamError as error:
        fail(f"There is no team {error}: see `headgate teams list`.")
    except UnknownLimitError as error:
        fail(f"There is no limit {error}: see `headgate limits list`.")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        option = "--" + str(first["loc"][0]).replace("_", "-") + ": " if first["loc"] else ""
        fail(option + first["msg"].removeprefix("Value error, "))
    except ValueError as error:
        fail(str(error))


@app.command("list")
def list_limits(
    scope: Annotated[
        str | None, typer.Argument(help="Only what holds for this one, as team:research.")
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """All limits, from the configuration and the database."""
    place = find_place(config, data)
    with opened(place.storage, may_write=False) as connection, explained():
        found = limits_in_force(connection, place.declared, time.time())
        if scope is not None:
            found = of_scope(found, resolved_scope(connection, scope, place.key_names))
    if as_json:
        print(json.dumps([described_limit(one) for one in found]))
        return
    print_table(_COLUMNS, map(cells, found))


@app.command()
def show(
    scope: ScopeArgument, as_json: JsonOption = False, config: ConfigOption = None, data: DataOption = None
) -> None:
    """What holds for one, and where it stands."""
    place = find_place(config, data)
    with opened(place.storage, may_write=False) as connection, explained():
        found = resolved_scope(connection, scope, place.key_names)
        held = of_scope(limits_in_force(connection, place.declared, time.time()), found)
    if found.name == EVERY:
        fail("Name one: the figures of everybody are nobody's. `headgate limits list` shows the limits.")
    try:
        stands = asyncio.run(_standings(place, [one.limit for one in held], found.name))
    except (StoreAwayError, StorageError) as error:
        fail(f"The counters of limits cannot be read: {error}")
    if as_json:
        print(
            json.dumps(
                [
                    described_limit(one)
                    | {
                        "spent": written(one.limit, reading.spent),
                        "reserved": written(one.limit, reading.held),
                    }
                    for one, reading in zip(held, stands, strict=True)
                ]
            )
        )
        return
    rows = [
        [
            one.limit.name,
            amount_text(one.limit, one.limit.amount),
            per_text(one.limit) or "",
            amount_text(one.limit, reading.spent),
            amount_text(one.limit, reading.held),
            f"{100 * reading.spent / one.limit.amount:.1f} %" if one.limit.amount else "",
        ]
        for one, reading in zip(held, stands, strict=True)
    ]
    print_table(_STANDING_COLUMNS, rows)


async def _standings(place: Place, limits: list[Limit], member: str) -> list[Reading]:
    """Nothing is spent while there is no store yet."""
    if place.settings.redis is None and not (place.settings.directory / LIMITS_NAME).exists():
        return [Reading(0, 0, 0)] * len(limits)
    store = counting_store(place.settings)
    try:
        _, readings = await store.read([limit.counter(member, time.time_ns() // 1000) for limit in limits])
    finally:
        await store.close()
    return readings


@app.command("set")
def set_one(
    scope: ScopeArgument,
    usd: Annotated[str | None, typer.Option(help="Dollars in a time.")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests in a time.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens in a time.")] = None,
    input_tokens: Annotated[int | None, typer.Option(help="Tokens of prompts in a time.")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="Tokens of answers in a time.")] = None,
    concurrent_requests: Annotated[int | None, typer.Option(help="Requests at any moment.")] = None,
    concurrent_streams: Annotated[int | None, typer.Option(help="Streams at any moment.")] = None,
    per: Annotated[str | None, typer.Option(help="60s, 5h, 30d; day, week, month; ever.")] = None,
    zone: Annotated[str | None, typer.Option(help="Whose calendar, as Europe/Berlin.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name; by default of measure and time.")] = None,
    burst: Annotated[int | None, typer.Option(help="How many requests may come at once.")] = None,
    cached_weight: Annotated[float | None, typer.Option(help="What a cached token counts, 0 to 1.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Count only its use, `*` at the end allowed; repeat.")
    ] = None,
    soft: Annotated[bool, typer.Option("--soft", help="Warn, do not refuse.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Ask the store for every request.")] = False,
    when_away: Annotated[
        str | None, typer.Option(help="While the store is away: local, open or closed.")
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Set a limit; every worker holds it within five seconds."""
    given: dict[str, Any] = {
        "usd": None if usd is None else Decimal(usd) if _is_decimal(usd) else usd,
        "requests": requests,
        "tokens": tokens,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "concurrent_requests": concurrent_requests,
        "concurrent_streams": concurrent_streams,
        "per": per,
        "zone": zone,
        "name": name,
        "burst": burst,
        "cached_weight": cached_weight,
        "models": model or None,
        "soft": soft or None,
        "exact": exact or None,
        "when_away": when_away,
    }
    place = find_place(config, data)
    with opened(place.storage, may_write=True) as connection, explained():
        wanted = LimitConfig(
            scope=scope, **{option: value for option, value in given.items() if value is not None}
        )
        limit = set_limit(connection, wanted, place.key_names, int(time.time()))
        _say_how_it_is(connection, place, (scope_text(limit.scope), limit.name))


@app.command()
def unset(
    scope: ScopeArgument, name: NameArgument, config: ConfigOption = None, data: DataOption = None
) -> None:
    """Take back what was set here; what the configuration says holds again."""
    place = find_place(config, data)
    with opened(place.storage, may_write=True) as connection, explained():
        unset_limit(connection, scope, name, place.key_names)
        _say_how_it_is(connection, place, (scope, name))


@app.command("raise")
def raise_one(
    scope: ScopeArgument,
    name: NameArgument,
    to: Annotated[str, typer.Option(help="The amount meanwhile, in dollars for money.")] = "",
    until: Annotated[str, typer.Option(help="24h, 7d, 2027-01-31 or a time.")] = "24h",
    end: Annotated[bool, typer.Option("--end", help="Now: what is usual holds again.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Another amount for a while, also for one of many that a `*` limit is for."""
    place = find_place(config, data)
    with opened(place.storage, may_write=True) as connection, explained():
        if end:
            end_raise(connection, scope, name, place.key_names)
            _say_how_it_is(connection, place, (scope, name))
            return
        if not to:
            raise typer.BadParameter("say how much", param_hint="--to")
        asked = Raise(scope, name, to, until)
        _say(raise_limit(connection, place.declared, asked, place.key_names, int(time.time())))


def cells(one: SourcedLimit) -> list[str]:
    limit = one.limit
    how = [word for word, is_so in (("warns", limit.warns_only), ("exact", limit.is_exact)) if is_so]
    if limit.cached_weight_percent != 100:
        how.append(f"cached x{limit.cached_weight_percent / 100:g}")
    if limit.burst:
        how.append(f"burst {limit.burst}")
    source: str = one.source
    if one.until_time is not None:
        source += (
            f", until {described_limit(one)['raised_until']} (usually {amount_text(limit, one.usual_amount)})"
        )
    return [
        scope_text(limit.scope),
        limit.name,
        amount_text(limit, limit.amount),
        per_text(limit) or "",
        limit.window.zone if limit.window.span in ("day", "week", "month") else "",
        "*" if limit.models is None else ", ".join(limit.models),
        ", ".join(how),
        source,
    ]


def _is_decimal(text: str) -> bool:
    return text.replace(".", "", 1).isdigit() and text.isascii()


def _say_how_it_is(connection: Connection, place: Place, which: tuple[str, str]) -> None:
    scope = scope_text(resolved_scope(connection, which[0], place.key_names))
    for one in limits_in_force(connection, place.declared, time.time()):
        if (scope_text(one.limit.scope), one.limit.name) == (scope, which[1]):
            _say(one)
            return
    print(f"{scope} has no limit {which[1]} any more.")


def _say(one: SourcedLimit) -> None:
    scope, name, amount, per, *_, how, source = cells(one)
    span = f" per {per}" if per and per != "ever" else " for ever" if per else ""
    print(f"{scope} {name}: {amount}{span}{', ' + how if how else ''} (from the {source})")

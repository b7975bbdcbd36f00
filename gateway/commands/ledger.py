"""`headgate ledger`: the counters of budgets against the ledger, and brought back to it.

Works beside a running gateway or a stopped one. `verify` changes nothing; `rebuild` makes what counters have as spent what
the ledger's rows say, where they differ.
"""

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from gateway.commands.storage import Storage, fail, opened
from gateway.commands.tables import Column, print_table
from gateway.config import DEFAULT_PATH, Config, ConfigError, load
from gateway.limit_lifecycle import amount_text
from gateway.reconcile import (
    Difference,
    LedgerSpend,
    compare,
    correct,
    counting_store,
    ledger_spend,
    names_of,
    refill,
    settled,
)
from gateway.stores.limit_store import LimitStore, StoreAwayError
from gateway.stores.sqlite import StorageError
from gateway.tenants import Stored, merged

app = typer.Typer(help="The ledger, and the counters that derive from it.", no_args_is_help=True)

PathOption = Annotated[
    Path, typer.Option("--config", "-c", envvar="HEADGATE_CONFIG", help="The configuration file.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs; money in nano-dollars.")]

_COLUMNS: Final = (
    Column("counter", folds=True),
    Column("ledger", is_number=True),
    Column("counted", is_number=True),
    Column("difference", is_number=True),
)


@app.command()
def verify(config: PathOption = DEFAULT_PATH, as_json: JsonOption = False) -> None:
    """Compare what counters of days, weeks, months and for ever have as spent with the ledger; 1 if they differ."""
    loaded = _load(config)
    compared, differences = _run(loaded, rebuilds=False)
    _report(compared, differences, as_json=as_json)
    if differences:
        raise typer.Exit(1)


@app.command()
def rebuild(config: PathOption = DEFAULT_PATH, as_json: JsonOption = False) -> None:
    """Make the counters what the ledger says. What is in flight meanwhile is left alone."""
    loaded = _load(config)
    compared, differences = _run(loaded, rebuilds=True)
    _report(compared, differences, as_json=as_json)


def _load(path: Path) -> Config:
    try:
        return load(path, os.environ)
    except ConfigError as error:
        fail(str(error))


def _run(config: Config, *, rebuilds: bool) -> tuple[int, list[Difference]]:
    try:
        return asyncio.run(_compared(config, rebuilds=rebuilds))
    except (StoreAwayError, StorageError) as error:
        fail(f"The counters cannot be read: {error}")


async def _compared(config: Config, *, rebuilds: bool) -> tuple[int, list[Difference]]:
    """How many counters were compared, and those that differ."""
    store = counting_store(config.storage)
    compared = 0

    async def look() -> list[Difference]:
        nonlocal compared
        found = await compare(store, _spend(config))
        compared = len(found)
        return found

    try:
        differences = await settled(look)
        if rebuilds:
            await _rebuild(store, config, differences)
    finally:
        await store.close()
    return compared, differences


async def _rebuild(store: LimitStore, config: Config, differences: list[Difference]) -> None:
    await correct(store, differences)
    for one in await refill(store, _spend(config)):
        typer.echo(f"{one.counter.key}: the window was filled from the ledger", err=True)


def _spend(config: Config) -> list[LedgerSpend]:
    with opened(Storage(config.storage.directory), may_write=False) as connection:
        now_time = time.time()
        limits = merged(config.declared(), Stored.of(connection, now_time)).limits
        return ledger_spend(connection, limits, int(now_time * 1e6), names_of(config.aliases()))


def _report(compared: int, differences: list[Difference], *, as_json: bool) -> None:
    if as_json:
        told: dict[str, Any] = {
            "compared": compared,
            "differences": [
                {
                    "counter": one.counter.key,
                    "measure": one.limit.measure,
                    "ledger": one.ledger,
                    "counted": one.spent,
                }
                for one in differences
            ],
        }
        print(json.dumps(told))
        return
    if differences:
        print_table(_COLUMNS, map(_cells, differences))
    print(f"{compared} counters compared, {len(differences)} differ from the ledger.")


def _cells(one: Difference) -> list[str]:
    figures = (one.ledger, one.spent, -one.missing)
    return [one.counter.key, *(amount_text(one.limit, units) for units in figures)]

"""`headgate keys`: callers' and operators' keys made, listed, rotated and revoked.

Works beside a running gateway (every worker follows within seconds) or on a stopped one. A key is printed once,
by the command that made it.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape

from gateway.commands.storage import ConfigOption, DataOption, fail, find_storage, opened, pepper_of
from gateway.commands.tables import Column, print_table
from gateway.key_lifecycle import (
    DEFAULT_EXPIRY,
    KeyChanges,
    UnknownKeyError,
    change_key,
    described,
    find_one,
    listed,
    replace_key,
)
from gateway.keys import NewKey, create_key, expiry_of
from gateway.stores import key_table
from gateway.stores.key_table import KeyRecord

app = typer.Typer(help="Keys of callers and operators.", no_args_is_help=True)

_COLUMNS: Final = (
    Column("id"),
    Column("name", folds=True),
    Column("kind"),
    Column("team", folds=True, rank=2),
    Column("models", folds=True, rank=1),
    Column("tags", folds=True, rank=4),
    Column("created", rank=5),
    Column("expires"),
    Column("state", rank=3),
)

JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="Its id or its name.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Who it is for; reports show it.")],
    team: Annotated[str, typer.Option(help="For reports and limits.")] = "",
    model: Annotated[
        list[str] | None, typer.Option(help="A model it may use, `*` at the end allowed; repeat.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Written to each request's row; repeat.")] = None,
    expires: Annotated[str, typer.Option(help="90d, 12h, 2027-01-31 or never.")] = DEFAULT_EXPIRY,
    operator: Annotated[
        bool, typer.Option("--operator", help="For the management plane, not for models.")
    ] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Make a key and print it, once."""
    now_time = int(time.time())
    new = NewKey(
        name=name,
        kind="operator" if operator else "caller",
        team=team,
        models=tuple(model) if model else None,
        tags=tuple(tag or ()),
        expires_time=_expiry(expires, now_time),
    )
    storage = find_storage(config, data)
    with opened(storage, may_write=True) as connection, _explained():
        made, record = create_key(connection, pepper_of(storage), new, now_time)
    _print_new(made, record, as_json=as_json)


@app.command("list")
def list_keys(
    everything: Annotated[bool, typer.Option("--all", help="Expired and revoked ones too.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """All keys by name, without the keys themselves."""
    with opened(find_storage(config, data), may_write=False) as connection:
        records = listed(connection, time.time(), is_all=everything)
    if as_json:
        print(json.dumps([described(record, time.time()) for record in records]))
        return
    print_table(_COLUMNS, map(_cells, records))


@app.command()
def show(
    key: KeyArgument, as_json: JsonOption = False, config: ConfigOption = None, data: DataOption = None
) -> None:
    """One key, without the key itself."""
    with opened(find_storage(config, data), may_write=False) as connection, _explained():
        record = find_one(connection, key)
    if as_json:
        print(json.dumps(described(record, time.time())))
        return
    _print_one(record)


@app.command()
def rotate(
    key: KeyArgument,
    grace: Annotated[str, typer.Option(help="How long the old key stays good: 24h, 7d or 0h.")] = "24h",
    expires: Annotated[
        str | None, typer.Option(help="Of the new key; by default as long as a new one.")
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Replace a key by a new one of the same id, name and limits."""
    storage = find_storage(config, data)
    with opened(storage, may_write=True) as connection, _explained():
        new_key, record = replace_key(connection, pepper_of(storage), key, grace, expires, int(time.time()))
    _print_new(new_key, record, as_json=as_json)


@app.command()
def revoke(key: KeyArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """End a key for good; every worker refuses it within five seconds."""
    with opened(find_storage(config, data), may_write=True) as connection, _explained():
        record = find_one(connection, key)
        key_table.revoke(connection, record.id, int(time.time()))
    print(f"Revoked {record.id} ({record.name}).")


@app.command()
def change(
    key: KeyArgument,
    team: Annotated[str | None, typer.Option(help="Another team; '' for none.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model it may use, `*` alone for all; repeat.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Written to each request's row; repeat.")] = None,
    expires: Annotated[str | None, typer.Option(help="90d, 12h, 2027-01-31 or never.")] = None,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Change what a key is for; the key itself stays."""
    changes = KeyChanges(team, tuple(model) if model else None, tuple(tag) if tag else None, expires)
    _change(key, changes, config, data)


@app.command()
def block(key: KeyArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Refuse a key until it is unblocked; every worker does within five seconds."""
    _change(key, KeyChanges(is_blocked=True), config, data)


@app.command()
def unblock(key: KeyArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Let a blocked key in again."""
    _change(key, KeyChanges(is_blocked=False), config, data)


def _change(key: str, changes: KeyChanges, config: ConfigOption, data: DataOption) -> None:
    with opened(find_storage(config, data), may_write=True) as connection, _explained():
        _print_one(change_key(connection, key, changes, int(time.time())))


def _print_one(record: KeyRecord) -> None:
    for column, cell in zip(_COLUMNS, _cells(record), strict=True):
        print(f"{column.title:<8}  {cell}")


def _expiry(text: str, now_time: int) -> int | None:
    try:
        return expiry_of(text, now_time)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except UnknownKeyError as error:
        fail(f"There is no key {error}: see `headgate keys list`.")
    except ValueError as error:
        fail(str(error))


def _cells(record: KeyRecord) -> list[str]:
    every = ["*"] if record.kind == "caller" else []
    shown = described(record, time.time())
    shown["models"] = every if record.models is None else record.models
    shown["expires"] = shown["expires"] or "never"
    return [", ".join(v) if isinstance(v, (list, tuple)) else str(v or "") for v in shown.values()]


def _print_new(key: str, record: KeyRecord, *, as_json: bool) -> None:
    shown = described(record, time.time())
    if as_json:
        print(json.dumps({"key": key} | shown))
        return
    print(key)
    expires = f"expires {shown['expires']}" if shown["expires"] else "never expires"
    note = f"{record.kind} key {record.id} for {escape(record.name)}, {expires}. It is not shown again."
    Console(stderr=True).print(note, highlight=False, soft_wrap=True)

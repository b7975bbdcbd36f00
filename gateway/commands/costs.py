"""`headgate costs`: what was spent, as a table, JSON or CSV, and the ledger's rows as a file.

Reads the database beside a running gateway or a stopped one. Refuses to write to it.
"""

import csv
import importlib
import json
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import Annotated, BinaryIO, Final, Literal

import typer
from rich.console import Console
from rich.progress import track

from gateway.commands.storage import ConfigOption, DataOption, fail, find_storage, opened
from gateway.commands.tables import Column, print_table
from gateway.jsonl import line_of
from gateway.ledger_row import COLUMNS, LedgerRow, record_of
from gateway.spend import GroupBy, Period, Spend, dollars, export, moment_us, spend_by, total_spend

app = typer.Typer(help="What was spent, and on what.", invoke_without_command=True)

_SHOWN_GROUPS: Final = 50
_COLUMNS: Final = (
    Column("requests", is_number=True),
    Column("errors", is_number=True, rank=3),
    Column("prompt", is_number=True, rank=1),
    Column("cached", is_number=True),
    Column("output", is_number=True, rank=2),
    Column("cost", is_number=True),
    Column("saved", is_number=True),
)

SinceOption = Annotated[str | None, typer.Option(help="From then on: 24h, 7d, 2026-11-01, ... (UTC)")]
UntilOption = Annotated[str | None, typer.Option(help="Up to then, not included.")]


@app.callback()
def costs(
    context: typer.Context,
    by: Annotated[GroupBy, typer.Option(help="What to sum by.")] = "key",
    since: SinceOption = None,
    until: UntilOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; money in nano-dollars.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="For programs; money in nano-dollars.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Requests, tokens, cost and what the providers' caches saved."""
    if context.invoked_subcommand is not None:
        _refuse_options_before_command(context)
        return
    period = _period(since, until)
    with opened(find_storage(config, data), may_write=False) as connection:
        groups = spend_by(connection, by, period)
        total = total_spend(connection, period)
    if as_json:
        print(json.dumps({"by": by, "groups": [g._asdict() for g in groups], "total": total._asdict()}))
    elif as_csv:
        writer = csv.writer(sys.stdout)
        writer.writerow((by, *Spend._fields[1:]))
        writer.writerows(groups)
    else:
        _print_table(by, groups, total)


def _refuse_options_before_command(context: typer.Context) -> None:
    # They would be taken for this command's and silently change nothing.
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(
                f"put options after the command: headgate costs {context.invoked_subcommand} ..."
            )


@app.command("export")
def export_rows(
    form: Annotated[Literal["csv", "jsonl", "parquet"], typer.Option("--format")] = "csv",
    out: Annotated[Path | None, typer.Option(help="File to write; else standard output.")] = None,
    since: SinceOption = None,
    until: UntilOption = None,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """The ledger's rows, one per request, in order of time."""
    period = _period(since, until)
    parquet = _parquet() if form == "parquet" else None
    if parquet is not None and out is None and sys.stdout.isatty():
        fail("Parquet is binary: give a file with --out.")
    with opened(find_storage(config, data), may_write=False) as connection:
        rows: Iterable[LedgerRow] = export(connection, period)
        if out is None:
            _write_stdout(rows, form, parquet)
            return
        total = total_spend(connection, period).requests
        console = Console(stderr=True)
        rows = track(rows, "Exporting", total, console=console, disable=not console.is_terminal)
        draft = out.with_name(out.name + ".part")
        try:
            with draft.open("wb") as file:
                _write(rows, file, form, parquet)
            draft.replace(out)
        except OSError as error:
            draft.unlink(missing_ok=True)
            fail(f"Cannot write {out}: {error.strerror}.")


def _parquet() -> ModuleType:
    # By name at run time: pyarrow is an extra of 130 MB that nothing else needs.
    try:
        return importlib.import_module("gateway.parquet")
    except ImportError:
        fail(
            f"Parquet needs pyarrow: {sys.executable} -m pip install 'headgate[parquet]', "
            "or take --format csv or jsonl."
        )


def _write(rows: Iterable[LedgerRow], file: BinaryIO, form: str, parquet: ModuleType | None) -> None:
    if parquet is not None:
        parquet.write(rows, file)
    elif form == "jsonl":
        file.writelines(line_of(row) for row in rows)
    else:
        _write_csv(rows, file)


def _write_csv(rows: Iterable[LedgerRow], file: BinaryIO) -> None:
    text = TextIOWrapper(file, encoding="utf-8", newline="", write_through=False)
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for row in rows:
        record = record_of(row) | {"tags": row.tags, "is_stream": int(row.is_stream)}
        writer.writerow((record | {"is_estimated": int(row.is_estimated)}).values())
    text.detach()


def _write_stdout(rows: Iterable[LedgerRow], form: str, parquet: ModuleType | None) -> None:
    try:
        _write(rows, sys.stdout.buffer, form, parquet)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # The reader (head, less) has seen enough; nothing more may be written on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _period(since: str | None, until: str | None) -> Period:
    now = datetime.now(UTC)
    try:
        start = moment_us(since, now) if since is not None else Period().since_us
        end = moment_us(until, now) if until is not None else Period().until_us
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return Period(start, end)


def _print_table(by: GroupBy, groups: list[Spend], total: Spend) -> None:
    shown = groups[-_SHOWN_GROUPS:] if by == "day" else groups[:_SHOWN_GROUPS]
    columns = (Column(by, folds=by not in ("day", "session")), *_COLUMNS)
    print_table(columns, map(_cells, shown), _cells(total) if len(groups) > 1 else ())
    console = Console()
    for note in _notes(by, len(groups), total):
        console.print(note, style="dim", highlight=False)


def _cells(spend: Spend) -> tuple[str, ...]:
    share = f"{spend.cached_tokens / spend.prompt_tokens:.1%}" if spend.prompt_tokens else "-"
    return (
        spend.group or "-",
        f"{spend.requests:,}",
        f"{spend.errors:,}",
        f"{spend.prompt_tokens:,}",
        share,
        f"{spend.output_tokens:,}",
        dollars(spend.cost_nanousd),
        dollars(spend.saved_nanousd),
    )


def _notes(by: GroupBy, groups: int, total: Spend) -> list[str]:
    notes = []
    if groups > _SHOWN_GROUPS:
        notes.append(f"{groups - _SHOWN_GROUPS} more not shown; --csv and --json give all.")
    if by == "tag":
        notes.append("A request with several tags counts under each; the total counts it once.")
    if total.unknown_cost:
        notes.append(f"Of unknown cost, and not in the sums: {_requests(total.unknown_cost)}.")
    if total.estimated:
        notes.append(f"Billed by an estimate, as the answer broke off: {_requests(total.estimated)}.")
    if total.interrupted:
        notes.append(f"Interrupted by the end of their worker: {_requests(total.interrupted)}.")
    return notes


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count:,} requests"

"""Ledger rows with defaults, and a look at what the database holds."""

from pathlib import Path

import msgspec

from gateway.ledger_row import COLUMNS, LedgerRow
from gateway.stores.sqlite import DATABASE_NAME, database

_A_ROW = LedgerRow(
    request_id="req_1",
    received_time_us=1_793_000_000_000_000,
    worker="0-1",
    key_id="k1",
    key_name="ci",
    team="platform",
    tags="[]",
    session_hash=0,
    dialect="chat",
    is_stream=True,
    requested_model="demo",
    provider="acme",
    target="acme",
    endpoint="acme/0",
    attempts=1,
    served_model="demo-2026",
    status=200,
    ended="completed",
    input_tokens=100,
    cache_read_tokens=900,
    cache_write_5m_tokens=0,
    cache_write_1h_tokens=0,
    output_tokens=50,
    reasoning_tokens=0,
    input_audio_tokens=0,
    cache_read_audio_tokens=0,
    output_audio_tokens=0,
    is_estimated=False,
    cost_nanousd=1_000,
    saved_nanousd=100,
    price_source="config",
    price_kind="known",
    card_hash="abc",
    ttft_us=1_000,
    duration_us=2_000,
    overhead_us=50,
)


def a_row(request_id: str = "req_1", **fields) -> LedgerRow:
    return msgspec.structs.replace(_A_ROW, request_id=request_id, **fields)


def rows_in(storage: Path) -> dict[str, LedgerRow]:
    """What the ledger holds, by request id."""
    with database(storage / DATABASE_NAME) as connection:
        found = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM ledger").fetchall()
    return {row[0]: msgspec.convert(row, LedgerRow, strict=False) for row in found}

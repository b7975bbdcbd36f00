import json
from pathlib import Path

import msgspec
import pytest

from backends.dialect import MESSAGES
from backends.usage import Usage
from gateway.ledger_row import (
    COLUMNS,
    DISPATCH_COLUMNS,
    LedgerRow,
    dispatch_fields,
    record_of,
    row_of,
    shortened,
)
from policies.exchange import Caller, Exchange
from policies.routing import Candidate
from policies.waste import Waste
from tests.support.builders import a_model
from tests.support.ledger_rows import a_row

USAGE = Usage(11, 12, 13, 14, 15, 6, 7, 8, 9)


def an_ended_exchange(**fields) -> Exchange:
    exchange = Exchange("req_7", MESSAGES, 50.0, 1_793_000_000.25)
    exchange.caller = Caller("key7", "ci", "platform", organisation="acme")
    exchange.tags = ("nightly", 'a "quoted" one')
    exchange.session_hash = 2**64 - 2
    exchange.end_user = "acme/ada"
    exchange.is_stream = True
    exchange.model_name = "big"
    target = a_model("upstream-name").targets[0]
    exchange.candidate = Candidate(target, target.pool.endpoints[0], 0)
    exchange.price = target.price
    exchange.attempts = 2
    exchange.read_at, exchange.dispatched_at = 50.001, 50.002
    exchange.ready_at, exchange.relayed_at = 51.0, 51.0005
    exchange.status, exchange.ended, exchange.error_kind = 200, "incomplete", "reset"
    exchange.served_model, exchange.service_tier = "big-2026", "flex"
    exchange.usage, exchange.is_estimated = USAGE, True
    exchange.cost_nanousd, exchange.saved_nanousd = 42, 41
    exchange.waste = [Waste("pool/0", "reset", 900, 5)]
    exchange.session_state, exchange.place_reason = "moved", "home_out"
    exchange.predicted_cached_tokens, exchange.waited_s, exchange.answer_id = 512, 0.00025, "resp_1"
    exchange.prefilled_by, exchange.prefill_us = "gpu/p", 777
    for name, value in fields.items():
        setattr(exchange, name, value)
    exchange.end(exchange.ended_at or 53.0)
    return exchange


def test_every_column_holds_what_its_name_says() -> None:
    row = msgspec.structs.asdict(row_of(an_ended_exchange(), worker="n/0"))
    assert row == {
        "request_id": "req_7",
        "received_time_us": 1_793_000_000_250_000,
        "worker": "n/0",
        "key_id": "key7",
        "key_name": "ci",
        "team": "platform",
        "tags": '["nightly","a \\"quoted\\" one"]',
        "session_hash": -2,
        "dialect": "messages",
        "is_stream": True,
        "requested_model": "big",
        "provider": "acme",
        "target": "pool",
        "endpoint": "pool/0",
        "attempts": 2,
        "served_model": "big-2026",
        "status": 200,
        "ended": "incomplete",
        "error_kind": "reset",
        "input_tokens": 11,
        "cache_read_tokens": 12,
        "cache_write_5m_tokens": 13,
        "cache_write_1h_tokens": 14,
        "output_tokens": 15,
        "reasoning_tokens": 6,
        "input_audio_tokens": 7,
        "cache_read_audio_tokens": 8,
        "output_audio_tokens": 9,
        "is_estimated": True,
        "service_tier": "flex",
        "cost_nanousd": 42,
        "saved_nanousd": 41,
        "price_source": "config",
        "price_kind": "free",
        "card_hash": "",
        "ttft_us": 1_000_500,
        "duration_us": 3_000_000,
        "overhead_us": 1_250,
        "organisation": "acme",
        "end_user": "acme/ada",
        "failed_attempts": '[["pool/0","reset",900,5]]',
        "wasted_nanousd": 5,
        "session_state": "moved",
        "place_reason": "home_out",
        "predicted_cached_tokens": 512,
        "waited_us": 250,
        "answer_id": "resp_1",
        "node": "",
        "prefill_endpoint": "gpu/p",
        "prefill_us": 777,
    }


def test_what_is_unknown_stays_unknown() -> None:
    row = row_of(
        an_ended_exchange(usage=None, cost_nanousd=None, saved_nanousd=None, relayed_at=0.0), worker="0"
    )
    assert row.output_tokens is row.cost_nanousd is row.saved_nanousd is row.ttft_us is None


def test_a_request_that_was_denied_has_a_row_too() -> None:
    exchange = Exchange("req_7", MESSAGES, 1.0, 2.0)
    exchange.ended, exchange.status, exchange.ended_at = "denied", 429, 1.001
    row = row_of(exchange, worker="0")
    assert (row.key_id, row.target, row.attempts, row.ended, row.overhead_us) == ("", "", 0, "denied", 0)


def test_the_fields_known_at_dispatch_are_the_row_of_an_interrupted_request() -> None:
    exchange = an_ended_exchange()
    fields = dispatch_fields(exchange, "n/0")
    assert len(fields) == DISPATCH_COLUMNS
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=LedgerRow)
    assert msgspec.structs.astuple(decoded)[:DISPATCH_COLUMNS] == fields
    assert msgspec.structs.astuple(row_of(exchange, worker="n/0"))[:DISPATCH_COLUMNS] == fields
    assert (decoded.ended, decoded.status, decoded.is_estimated) == ("interrupted", 0, True)
    assert decoded.cost_nanousd is decoded.input_tokens is decoded.duration_us is None


def test_a_shortened_row_keeps_its_id_and_its_numbers() -> None:
    row = a_row("r" * 64, team="t" * 100, tags='["long"]')
    short = dict(zip(COLUMNS, shortened(msgspec.structs.astuple(row), 20), strict=True))
    assert short["request_id"] == "r" * 64
    assert (short["team"], short["tags"], short["cost_nanousd"]) == ("t" * 20, "[]", row.cost_nanousd)


@pytest.mark.parametrize(("stored", "shown"), [(0, ""), (1, "0000000000000001"), (-2, "fffffffffffffffe")])
def test_exports_show_the_session_as_the_unsigned_hash_in_hex(stored, shown) -> None:
    record = record_of(a_row(session_hash=stored, tags='["a"]'))
    assert record["session_hash"] == shown
    assert record["tags"] == ["a"]
    json.dumps(record)


def test_the_page_about_the_ledger_explains_every_column() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ledger.md").read_text()
    assert [column for column in COLUMNS if f"`{column}`" not in page] == []

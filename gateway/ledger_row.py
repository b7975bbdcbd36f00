"""The ledger's row: what is known of one finished request, in the order of the table's columns.

Knows the Exchange and nothing of files. Invariants: the first `DISPATCH_COLUMNS` fields are known when a
request is sent off, and the defaults of the others are those of a request whose worker died right then; fields
are only ever added at the end, with a default. So an intent is simply a row that stops early.
"""

from typing import Any, Final

import msgspec

from policies.exchange import Exchange
from policies.waste import Waste, total_nanousd

DISPATCH_COLUMNS: Final = 14
_EMPTY: Final = "[]"
_NO_WASTE: Final = (_EMPTY, 0)
_USAGE_UNKNOWN: Final[tuple[Any, ...]] = (None,) * 9
_encode: Final = msgspec.json.Encoder().encode

DispatchFields = tuple[str, int, str, str, str, str, str, int, str, bool, str, str, str, str]


class LedgerRow(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One request. Times in microseconds; token counts are None when usage is unknown, money when it is.

    `saved_nanousd` is what the provider's cache took off the price (negative: writing to it cost more than was
    saved). `ttft_us` is None when nothing was relayed. `session_hash` is the 64-bit hash as a signed number, 0
    without a session. `failed_attempts` is a JSON array of `policies.waste.Waste`, `wasted_nanousd` what they may have cost us.
    `session_state` and `place_reason` say where the request went and why (`policies.placement.placer`), `waited_us` how
    long it waited for room; `predicted_cached_tokens` is to be held against `cache_read_tokens`, None where nothing was
    predicted. `answer_id` is the upstream's name of an answer that a later request may continue. `prefill_endpoint`
    computed the prompt, in `prefill_us`, where that was another than the one that answered.
    """

    request_id: str
    received_time_us: int
    worker: str
    key_id: str
    key_name: str
    team: str
    tags: str  # a JSON array of strings
    session_hash: int
    dialect: str
    is_stream: bool
    requested_model: str
    provider: str
    target: str
    endpoint: str
    attempts: int = 1
    served_model: str = ""
    status: int = 0
    ended: str = "interrupted"
    error_kind: str = ""
    input_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_5m_tokens: int | None = None
    cache_write_1h_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    input_audio_tokens: int | None = None
    cache_read_audio_tokens: int | None = None
    output_audio_tokens: int | None = None
    is_estimated: bool = True
    service_tier: str = ""
    cost_nanousd: int | None = None
    saved_nanousd: int | None = None
    price_source: str = ""
    price_kind: str = ""
    card_hash: str = ""
    ttft_us: int | None = None
    duration_us: int | None = None
    overhead_us: int | None = None
    organisation: str = ""
    end_user: str = ""
    failed_attempts: str = _EMPTY
    wasted_nanousd: int | None = 0
    session_state: str = "none"
    place_reason: str = ""
    predicted_cached_tokens: int | None = None
    waited_us: int = 0
    answer_id: str = ""
    node: str = ""  # empty: this one
    prefill_endpoint: str = ""
    prefill_us: int = 0


COLUMNS: Final[tuple[str, ...]] = LedgerRow.__struct_fields__
_LISTS: Final = {COLUMNS.index("tags"), COLUMNS.index("failed_attempts")}


def dispatch_fields(exchange: Exchange, worker: str) -> DispatchFields:
    """The part of the row that is known when the request is sent off."""
    caller = exchange.caller
    candidate = exchange.candidate
    session = exchange.session_hash
    return (
        exchange.request_id,
        int(exchange.received_time * 1e6),
        worker,
        caller.key_id if caller is not None else "",
        caller.name if caller is not None else "",
        caller.team if caller is not None else "",
        _encode(exchange.tags).decode() if exchange.tags else _EMPTY,
        session if session < 1 << 63 else session - (1 << 64),  # SQLite's integers are signed
        exchange.dialect.name,
        exchange.is_stream,
        exchange.model_name,
        candidate.endpoint.provider.name if candidate is not None else "",
        candidate.target.name if candidate is not None else "",
        candidate.endpoint.name if candidate is not None else "",
    )


def row_of(exchange: Exchange, worker: str) -> LedgerRow:
    """The row of an exchange that has ended and is priced."""
    usage = exchange.usage
    price = exchange.price
    waste = exchange.waste
    return LedgerRow(  # type: ignore[call-arg]  # mypy cannot count the usage's nine
        *(
            exchange.intent
            if exchange.intent and exchange.attempts == 1
            else dispatch_fields(exchange, worker)
        ),
        exchange.attempts,
        exchange.served_model,
        exchange.status,
        exchange.ended,
        exchange.error_kind,
        *(_USAGE_UNKNOWN if usage is None else msgspec.structs.astuple(usage)),
        exchange.is_estimated,
        exchange.service_tier,
        exchange.cost_nanousd,
        exchange.saved_nanousd,
        price.source if price is not None else "",
        price.kind if price is not None else "",
        price.card_hash if price is not None else "",
        int((exchange.relayed_at - exchange.received_at) * 1e6) if exchange.relayed_at else None,
        int((exchange.ended_at - exchange.received_at) * 1e6),
        int(exchange.overhead_s * 1e6),
        exchange.caller.organisation if exchange.caller is not None else "",
        exchange.end_user,
        *(_NO_WASTE if waste is None else (_encode(waste).decode(), total_nanousd(waste))),
        exchange.session_state,
        exchange.place_reason,
        exchange.predicted_cached_tokens,
        int(exchange.waited_s * 1e6),
        exchange.answer_id,
        "",
        exchange.prefilled_by,
        exchange.prefill_us,
    )


def record_of(row: LedgerRow) -> dict[str, Any]:
    """The row by column name, as logs and exports write it: flags as booleans, the session in hex, tags as a list."""
    record = msgspec.structs.asdict(row)
    record["tags"] = msgspec.json.decode(row.tags)
    failed = msgspec.json.decode(row.failed_attempts)
    record["failed_attempts"] = [dict(zip(Waste.__struct_fields__, each, strict=True)) for each in failed]
    record["session_hash"] = f"{row.session_hash % 2**64:016x}" if row.session_hash else ""
    record["is_stream"] = bool(row.is_stream)
    record["is_estimated"] = bool(row.is_estimated)
    return record


def shortened(fields: tuple[Any, ...], longest: int) -> tuple[Any, ...]:
    """The same fields with no tags and no text but the request id longer than `longest` characters."""
    return tuple(
        _EMPTY if i in _LISTS else f[:longest] if i and isinstance(f, str) else f
        for i, f in enumerate(fields)
    )

"""What conditions are told of a request: only what some condition reads, and only when one is about to be asked.

Owns how each variable is found in an Exchange. The body is not decoded: of its members, those that a condition names,
and no member larger than `MAX_FIELD_BYTES`. A declaration that cannot be understood is refused, not guessed at: the
caller would be served by another model than it thinks.
"""

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from policies.exchange import Exchange
from policies.rules.complexity import LEVELS, complexity
from policies.rules.condition import Reads
from policies.verdict import Denial

MAX_FIELD_BYTES: Final = 16_384
BYTES_PER_TOKEN: Final = 4
METADATA_HEADER: Final = b"x-headgate-metadata"
COMPLEXITY_HEADER: Final = b"x-headgate-complexity"
RISK_HEADER: Final = b"x-headgate-risk"

BudgetUsed = Callable[[Exchange], float]
"""The share of its tightest budget that a request's caller has used, 1.0 all of it; 0.0 without a budget."""

_decode_object: Final = msgspec.json.Decoder(dict[str, Any]).decode
_decode: Final = msgspec.json.Decoder().decode
_decode_list: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode
_NO_HEADERS: Final[Mapping[bytes, bytes]] = {}
_NONE: Final = object()


class RefusedDeclarationError(Exception):
    """A header by which the caller declares something is not what it should be."""

    def __init__(self, header: bytes, wanted: str) -> None:
        super().__init__(header)
        self.denial = Denial(400, "invalid_declaration", f"`{header.decode()}` must be {wanted}")


class Facts:
    """The values of the variables that a list of conditions reads."""

    def __init__(self, reads: Reads, budget_used: BudgetUsed | None = None) -> None:
        self._reads = reads
        self._budget_used = budget_used
        self._plan = tuple((name, getattr(self, f"_read_{name}")) for name in sorted(reads.variables))

    def values(self, exchange: Exchange) -> dict[str, Any]:
        """By the names of VARIABLES. RefusedDeclarationError for a header of the caller's that says nonsense."""
        return {name: read(exchange) for name, read in self._plan}

    def _read_model(self, exchange: Exchange) -> str:
        return exchange.model_name

    def _read_dialect(self, exchange: Exchange) -> str:
        return exchange.dialect.name

    def _read_stream(self, exchange: Exchange) -> bool:
        return exchange.is_stream

    def _read_max_tokens(self, exchange: Exchange) -> int:
        return exchange.max_tokens or 0

    def _read_session(self, exchange: Exchange) -> bool:
        return exchange.session_hash != 0

    def _read_key(self, exchange: Exchange) -> str:
        return exchange.caller.name if exchange.caller is not None else ""

    def _read_team(self, exchange: Exchange) -> str:
        return exchange.caller.team if exchange.caller is not None else ""

    def _read_tags(self, exchange: Exchange) -> list[str]:
        return list(exchange.tags)

    def _read_headers(self, exchange: Exchange) -> dict[str, str]:
        given = exchange.headers or _NO_HEADERS
        found = {name: given.get(name.encode()) for name in self._reads.headers}
        return {name: value.decode("latin-1") for name, value in found.items() if value is not None}

    def _read_metadata(self, exchange: Exchange) -> dict[str, Any]:
        """The body's own `metadata`, and over it the header's, which no upstream sees."""
        given = _value(_members(exchange).get("metadata"))
        found: dict[str, Any] = given if isinstance(given, dict) else {}
        declared = (exchange.headers or _NO_HEADERS).get(METADATA_HEADER)
        if declared is not None:
            try:
                found |= _decode_object(declared)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                raise RefusedDeclarationError(METADATA_HEADER, "a JSON object, as text on one line") from None
        return found

    def _read_body(self, exchange: Exchange) -> dict[str, Any]:
        members = _members(exchange)
        found: dict[str, Any] = {name: True for name in self._reads.asked if name in members}
        for name in self._reads.fields:
            if name in members and (value := _value(members[name])) is not _NONE:
                found[name] = value
        return found

    def _read_input_bytes(self, exchange: Exchange) -> int:
        return exchange.body_bytes

    def _read_input_tokens(self, exchange: Exchange) -> int:
        return exchange.body_bytes // BYTES_PER_TOKEN

    def _read_turns(self, exchange: Exchange) -> int:
        members = _members(exchange)
        return _count(members.get("messages") or members.get("input"))

    def _read_tools(self, exchange: Exchange) -> int:
        return _count(_members(exchange).get("tools"))

    def _read_complexity(self, exchange: Exchange) -> str:
        declared = (exchange.headers or _NO_HEADERS).get(COMPLEXITY_HEADER)
        if declared is None:
            return complexity(
                _members(exchange), self._read_input_tokens(exchange), self._read_turns(exchange)
            )
        level = declared.decode("latin-1").strip().lower()
        if level not in LEVELS:
            raise RefusedDeclarationError(COMPLEXITY_HEADER, f"one of {', '.join(LEVELS)}")
        return level

    def _read_risk(self, exchange: Exchange) -> str:
        """As the caller declares it, in small letters; "" if it does not."""
        declared = (exchange.headers or _NO_HEADERS).get(RISK_HEADER)
        if declared is not None:
            return declared.decode("latin-1").strip().lower()
        risk = self._read_metadata(exchange).get("risk")
        return risk.strip().lower() if isinstance(risk, str) else ""

    def _read_budget_used(self, exchange: Exchange) -> float:
        return self._budget_used(exchange) if self._budget_used is not None else 0.0

    def _read_now(self, exchange: Exchange) -> dt.datetime:
        return dt.datetime.fromtimestamp(exchange.received_time, dt.UTC)


def _members(exchange: Exchange) -> Mapping[str, msgspec.Raw]:
    return exchange.document.values if exchange.document is not None else {}


def _value(raw: msgspec.Raw | None) -> Any:
    """_NONE if it is not there, too large, or JSON that Python has no value for (1e400)."""
    if raw is None or len(raw) > MAX_FIELD_BYTES:
        return _NONE
    try:
        return _decode(raw)
    except (ValueError, RecursionError):
        return _NONE


def _count(raw: msgspec.Raw | None) -> int:
    """Of a list, its members; 1 for a text, 0 for nothing."""
    start = memoryview(raw or b"")[:1].tobytes()
    return len(_decode_list(raw or b"")) if start == b"[" else int(start == b'"')

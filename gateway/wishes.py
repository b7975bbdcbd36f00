"""What a client may say about where its request goes and how long it may wait: headers, and a few fields of the body.

Reads them leniently: a field that is not ours is another API's, and goes on as it is. What a header of ours says
wrongly is refused.
"""

from collections.abc import Mapping
from typing import Final, TypeVar, get_args

import msgspec

from gateway.inbound import Refusal
from gateway.ingress import Fields
from gateway.runtime import Runtime
from policies.exchange import Exchange, OnFull
from policies.placement.priority import PRIORITIES
from policies.session import session_hash

_T = TypeVar("_T")
_MAX_SESSION_KEY_BYTES: Final = 256
_ON_FULL: Final[dict[bytes, OnFull]] = {word.encode(): word for word in get_args(OnFull) if word}
_PRIORITIES: Final = {name.encode(): place for place, name in enumerate(PRIORITIES)}
_AFFINITIES: Final = {b"none": False, b"session": True}
_REJECT_IF_BUSY: Final = "rejectIfBusy"
_FLEX: Final = b'"flex"'


class _Conversation(msgspec.Struct):
    id: str


class _Options(msgspec.Struct, rename={"reject_if_busy": _REJECT_IF_BUSY}):
    reject_if_busy: bool | None = None


_read_conversation = msgspec.json.Decoder(str | _Conversation | None).decode
_read_options = msgspec.json.Decoder(_Options).decode


def read_wishes(exchange: Exchange, headers: Mapping[bytes, bytes], fields: Fields, runtime: Runtime) -> None:
    """Session, priority, and what to do when there is no room."""
    caller = exchange.caller
    if caller is None:
        return
    exchange.priority = priority = caller.priority
    if b"x-headgate-priority" in headers:
        # Nobody puts himself before others.
        asked = _word(headers, b"x-headgate-priority", _PRIORITIES)
        exchange.priority = priority = max(asked, priority)
    exchange.ceiling = runtime.ceilings[priority]
    if b"x-headgate-on-full" in headers:
        exchange.on_full = _word(headers, b"x-headgate-on-full", _ON_FULL)
    values = fields.document.values
    if runtime.takes_flex and "service_tier" in values and bytes(values["service_tier"]) == _FLEX:
        exchange.on_full = exchange.on_full or "queue"
        exchange.priority = max(priority, len(runtime.ceilings) - 1)
        exchange.ceiling = runtime.ceilings[exchange.priority]
    if ("options" in values or _REJECT_IF_BUSY in values) and _rejects_if_busy(values):
        exchange.on_full = "reject"
    if b"x-headgate-affinity" in headers and not _word(headers, b"x-headgate-affinity", _AFFINITIES):
        exchange.is_affine = False
        return
    is_named = not runtime.session_names.isdisjoint(headers)
    key = (is_named and _session_key(headers, runtime)) or fields.prompt_cache_key.encode()
    if not key and "conversation" in values:
        key = _conversation(values["conversation"])
    if key:
        exchange.session_hash = session_hash(runtime.session_secret, caller, key)


def _word(headers: Mapping[bytes, bytes], name: bytes, known: Mapping[bytes, _T]) -> _T:
    found = known.get(headers[name].strip().lower())
    if found is None:
        words = b", ".join(known).decode()
        raise Refusal(400, "invalid_header", f"`{name.decode()}` takes one of: {words}")
    return found


def _session_key(headers: Mapping[bytes, bytes], runtime: Runtime) -> bytes:
    """The first of the configured headers that is there. An overlong id is ignored, never cut: two must not meet."""
    for name in runtime.session_headers:
        value = headers.get(name)
        if value and len(value) <= _MAX_SESSION_KEY_BYTES:
            return value
    return b""


def _conversation(raw: msgspec.Raw) -> bytes:
    try:
        found = _read_conversation(raw)
    except msgspec.DecodeError:
        return b""
    return (found.id if isinstance(found, _Conversation) else found or "").encode()


def _rejects_if_busy(values: Mapping[str, msgspec.Raw]) -> bool:
    """Workers AI has it inside `options`, and at the top level of chat completions."""
    if bytes(values.get(_REJECT_IF_BUSY, b"")) == b"true":
        return True
    try:
        return _read_options(values.get("options", b"{}")).reject_if_busy is True
    except msgspec.DecodeError:
        return False

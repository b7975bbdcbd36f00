"""Cloudflare's envelope, and its error codes for what goes wrong here.

Owns the table from our codes to Workers AI's (docs/workers-ai.md has it); what it does not name goes by its status. The
gateway's own code stays readable beside the number, because programs that branch on more than Cloudflare tells need it.
"""

from typing import Any, Final

import msgspec

AUTHENTICATION: Final = 10000
NO_SUCH_MODEL: Final = 5007
BAD_INPUT: Final = 5004
NOT_ALLOWED: Final = 5018
NOT_FOUND: Final = 3042
METHOD: Final = 5019
TOO_LARGE: Final = 3006
TIMEOUT: Final = 3007
ABORTED: Final = 3008
QUOTA: Final = 3036
OUT_OF_CAPACITY: Final = 3040
INTERNAL: Final = 1000  # ours: an upstream failed, or we did

# No room, now: 429 whichever way it was found out.
_CAPACITY_CODES: Final = frozenset(
    {"pool_full", "room_full", "wait_timeout", "no_endpoint", "no_queue", "queue_full", "queue_unavailable"}
)
_BY_CODE: Final = {
    **dict.fromkeys(_CAPACITY_CODES, (429, OUT_OF_CAPACITY)),
    "model_not_found": (400, NO_SUCH_MODEL),
    "dialect_not_supported": (400, BAD_INPUT),
}
_BY_STATUS: Final = {
    400: (400, BAD_INPUT),
    401: (401, AUTHENTICATION),
    402: (429, QUOTA),
    403: (403, NOT_ALLOWED),
    404: (404, NOT_FOUND),
    405: (405, METHOD),
    408: (408, TIMEOUT),
    413: (413, TOO_LARGE),
    415: (400, BAD_INPUT),
    422: (400, BAD_INPUT),
    429: (429, QUOTA),
    499: (408, ABORTED),
    504: (408, TIMEOUT),
}


class _Error(msgspec.Struct):
    message: str = ""
    code: str | int | None = None
    limit: Any = None


class _Body(msgspec.Struct):
    error: _Error | str | None = None


_decode_error = msgspec.json.Decoder(_Body).decode
encode: Final = msgspec.json.Encoder().encode


def succeeded(result: Any) -> bytes:
    """The envelope of a good answer; `result` may be raw JSON."""
    return encode({"result": result, "success": True, "errors": [], "messages": []})


def failed(status: int, body: bytes) -> tuple[int, bytes]:
    """Status and envelope for an error in OpenAI's form."""
    told_status, error = error_of(status, body)
    return told_status, encode({"result": None, "success": False, "errors": [error], "messages": []})


def error_of(status: int, body: bytes) -> tuple[int, dict[str, Any]]:
    """Cloudflare's status and entry of `errors` for an error in OpenAI's form."""
    try:
        found = _decode_error(body).error
    except msgspec.DecodeError:
        found = None
    error = found if isinstance(found, _Error) else _Error(message=found or "the model's upstream failed")
    code = str(error.code or "")
    told_status, number = _BY_CODE.get(code) or _BY_STATUS.get(status) or (status, INTERNAL)
    if number == QUOTA and error.limit is None and code != "budget_exceeded":
        # An upstream's own 429: whose quota it is, only it knows; for the caller it is room that is missing.
        number = OUT_OF_CAPACITY
    entry: dict[str, Any] = {"code": number, "message": error.message}
    if code:
        entry["headgate_code"] = code
    return told_status, entry

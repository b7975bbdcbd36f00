"""How long an upstream asks to be left alone: `retry-after-ms`, `retry-after` in seconds or as a date (RFC 9110 10.2.3)."""

from email.utils import parsedate_to_datetime
from typing import Final

from backends.reply import Reply

# Some name the end of a day's quota: by then much may have changed.
MAX_PAUSE_S: Final = 600.0


def retry_after_s(reply: Reply, now_time: float) -> float | None:
    """Seconds from now, between 0 and `MAX_PAUSE_S`; None if it does not say, or not so that one could tell.

    `now_time` is wall clock.
    """
    in_ms, told = reply.header(b"retry-after-ms"), reply.header(b"retry-after")
    try:
        if in_ms is not None:
            pause_s = float(in_ms) / 1000
        elif told is None:
            return None
        elif told.strip()[:1].isdigit():
            pause_s = float(told)
        else:
            pause_s = parsedate_to_datetime(told.decode("latin-1")).timestamp() - now_time
    except (ValueError, OverflowError):
        return None
    return min(max(pause_s, 0.0), MAX_PAUSE_S) if pause_s == pause_s else None  # noqa: PLR0124 - NaN is not itself

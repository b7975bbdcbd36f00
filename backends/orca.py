"""An engine's load on the head of its answers (ORCA's `endpoint-load-metrics`), asked for now and then.

Owns what is asked, how often, and how the answer is read. It costs the engine as much as a page of metrics (10 ms of
vLLM's API server, measured), so only some requests ask, and none by default. vLLM answers it on chats and completions
that are not streamed. Sources: xds `orca_load_report.proto`, vLLM `entrypoints/serve/utils/orca_metrics.py`.
"""

import contextlib
import math
import re
from typing import Final, Literal

import msgspec

from backends.load import EndpointLoad

Format = Literal["text", "json"]
HEADER: Final = b"endpoint-load-metrics"

# An answer's load is believed for as many intervals as a scraped one is.
_FRESH_ROUNDS: Final = 3
_PAIR: Final = re.compile(rb"named_metrics\.([a-z_]{1,64})=([0-9.eE+-]{1,32})(?:,|\s|$)")
_KV: Final = ("kv_cache_usage_perc", "kv_cache_utilization")
_WAITING: Final = "num_requests_waiting"
_RUNNING: Final = "num_requests_running"
_MOST: Final = 1e9


class _Report(msgspec.Struct):
    named_metrics: dict[str, float] = {}


_report: Final = msgspec.json.Decoder(_Report)


class Orca:
    """Of one endpoint. Times are monotonic seconds."""

    __slots__ = ("_ask_at", "_every_s", "_line")

    def __init__(self, form: Format, every_s: float) -> None:
        self._line = b"endpoint-load-metrics-format: %b\r\n" % form.upper().encode()
        self._every_s = every_s
        self._ask_at = 0.0

    def ask(self, head: bytes, now: float) -> bytes:
        """A request's head, with the question if it is time for one."""
        if now < self._ask_at:
            return head
        self._ask_at = now + self._every_s
        return head[:-2] + self._line + b"\r\n"

    def heed(self, load: EndpointLoad, value: bytes | None, now: float) -> None:
        """What the answer said, if it did."""
        told = read(value) if value is not None else {}
        waiting = told.get(_WAITING)
        if waiting is None:
            return
        if _RUNNING in told:
            load.running, load.in_flight_at_scrape = int(told[_RUNNING]), load.in_flight
        elif now >= load.fresh_until:
            load.running = load.in_flight_at_scrape = 0  # nobody has said it for long
        load.waiting = int(waiting)
        kv_usage = next((told[name] for name in _KV if name in told), None)
        if kv_usage is not None:
            load.kv_usage = min(kv_usage, 1.0)
        load.scraped_at = now
        load.fresh_until = max(load.fresh_until, now + _FRESH_ROUNDS * self._every_s)


def read(value: bytes) -> dict[str, float]:
    """The named metrics of either form; empty if it is neither. One that is told twice is of several engines: the greater counts."""
    form, _, rest = value.strip().partition(b" ")
    told: dict[str, float] = {}
    match form.upper():
        case b"TEXT":
            for name, number in _PAIR.findall(rest):
                with contextlib.suppress(ValueError):
                    told[name.decode()] = max(float(number), told.get(name.decode(), 0.0))
        case b"JSON":
            with contextlib.suppress(msgspec.DecodeError):
                told = _report.decode(rest).named_metrics
    return {name: min(max(number, 0.0), _MOST) for name, number in told.items() if math.isfinite(number)}

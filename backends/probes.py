"""Small requests of our own: is this endpoint alive, can it generate, how loaded is it.

Owns what is asked and how the answer is read. Refuses to know when, and what follows from it. A failure is an outcome
here, never an exception; nothing a probe gets is larger than its limit.
"""

import time
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from backends.adapter import head, head_beside
from backends.engine_load import EngineLoad, EngineTotals, read_load, read_metrics, read_totals
from backends.errors import LOAD_STATUSES, UpstreamError
from backends.pool import Endpoint
from backends.transport import Deadlines

_PAGE_BYTES: Final = 8 << 20
_ANSWER_BYTES: Final = 1 << 20
# The smallest request of each dialect, in the order of preference.
_SMALLEST: Final[dict[str, dict[str, Any]]] = {
    "completions": {"prompt": "1", "max_tokens": 1},
    "chat": {"messages": [{"role": "user", "content": "1"}], "max_tokens": 1},
    "messages": {"messages": [{"role": "user", "content": "1"}], "max_tokens": 1},
    "embeddings": {"input": "1"},
}


class Probe(NamedTuple):
    """`reason` is empty when it went well, else an ErrorKind or a status."""

    reason: str
    took_s: float
    status: int = 0
    body: bytes = b""

    @property
    def is_ok(self) -> bool:
        return not self.reason


async def generate(endpoint: Endpoint, model: str, timeout_s: float) -> Probe:
    """Asks for one token, as a client would. Any answer but a server's error is a good one."""
    paths = endpoint.provider.paths
    dialect = next((name for name in _SMALLEST if name in paths), None)
    if dialect is None:
        return Probe("", 0.0)  # it speaks nothing that could be asked for little
    body = msgspec.json.encode({"model": model, **_SMALLEST[dialect]})
    start = head(endpoint, "POST", paths[dialect], {}, len(body), "headgate-probe")
    probe = await _ask(endpoint, start + body, timeout_s, _ANSWER_BYTES)
    is_full = probe.status in LOAD_STATUSES and probe.body.lstrip()[:1] == b"{"
    return probe._replace(reason="") if is_full or 0 < probe.status < 500 else probe


async def look(endpoint: Endpoint, path: str, timeout_s: float) -> Probe:
    """GET of a page beside the API. Good is 200."""
    return await _ask(endpoint, head_beside(endpoint, "GET", path), timeout_s, _PAGE_BYTES)


class Loads(NamedTuple):
    """What is behind an address by engine (the label of its metrics); empty if the page does not have it."""

    now: Mapping[int, EngineLoad] = {}
    totals: Mapping[int, EngineTotals] = {}


async def load(endpoint: Endpoint, path: str, timeout_s: float) -> tuple[Probe, Loads]:
    """From the metrics page or from `/load`."""
    probe = await look(endpoint, path, timeout_s)
    if not probe.is_ok:
        return probe, Loads()
    if path == "/load":
        told = read_load(probe.body)
        return probe, Loads() if told is None else Loads({0: told})
    return probe, Loads(read_metrics(probe.body), read_totals(probe.body))


async def _ask(endpoint: Endpoint, request: bytes, timeout_s: float, limit_bytes: int) -> Probe:
    began_at = time.perf_counter()
    limits = Deadlines(timeout_s, timeout_s, timeout_s, 2 * timeout_s)
    try:
        reply = await endpoint.connections.send(request, b"", limits)
        answer = await reply.read(limit_bytes)
    except UpstreamError as error:
        return Probe(error.kind, time.perf_counter() - began_at)
    reason = "" if reply.status == 200 else str(reply.status)
    return Probe(reason, time.perf_counter() - began_at, reply.status, answer)

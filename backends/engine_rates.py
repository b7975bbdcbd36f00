"""How fast an engine works, from its own totals at different moments.

Owns the window. Refuses to know where totals come from; the time is an argument. A total that fell is an engine that
began again: what was before it is forgotten.
"""

from collections import deque
from collections.abc import Mapping
from typing import Final, NamedTuple

from backends.engine_load import EngineTotals

_WINDOW_S: Final = 10.0


class EngineRates(NamedTuple):
    """Over the last seconds. `hit_rate` is the share of prompt tokens found in the prefix cache; None: no prompts."""

    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    hit_rate: float | None


class EngineHistory:
    """Of the engines behind one address, by their label."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, Mapping[int, EngineTotals]]] = deque()

    def observe(self, now: float, totals: Mapping[int, EngineTotals]) -> None:
        seen = self._seen
        if seen and any(
            total.prompt_tokens < seen[-1][1].get(engine, EngineTotals()).prompt_tokens
            for engine, total in totals.items()
        ):
            seen.clear()
        seen.append((now, totals))
        while len(seen) > 2 and now - seen[1][0] >= _WINDOW_S:
            seen.popleft()

    def latest(self, engine: int | None) -> EngineTotals:
        return _of(self._seen[-1][1], engine) if self._seen else EngineTotals()

    def rates(self, engine: int | None) -> EngineRates | None:
        """Of one engine, or of all together (None). None: they were not seen twice."""
        if len(self._seen) < 2:
            return None
        (began_at, before), (ended_at, after) = self._seen[0], self._seen[-1]
        elapsed_s = ended_at - began_at
        if elapsed_s <= 0:
            return None
        done = [now - then for now, then in zip(_of(after, engine), _of(before, engine), strict=True)]
        delta = EngineTotals(*done)
        return EngineRates(
            delta.prompt_tokens / elapsed_s,
            delta.generation_tokens / elapsed_s,
            delta.hit_tokens / delta.queried_tokens if delta.queried_tokens > 0 else None,
        )


def _of(totals: Mapping[int, EngineTotals], engine: int | None) -> EngineTotals:
    if engine is not None:
        return totals.get(engine, EngineTotals())
    whole = EngineTotals()
    for total in totals.values():
        whole = whole + total
    return whole

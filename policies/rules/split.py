"""Shares of a model's requests: which of its targets comes first, by weight.

Drawn by weighted rendezvous hashing over the targets' names: the same key always draws the same target, in every
process, and changing one weight moves only the share that it gains or loses. A canary raised from 5 to 10 keeps the 5
that it had.
"""

from collections.abc import Sequence
from math import log
from typing import TYPE_CHECKING, Final, Literal

import xxhash

from policies.placement.prompt import FirstTurns, prompt_of

if TYPE_CHECKING:
    from policies.exchange import Exchange
    from policies.routing import Target

SplitBy = Literal["session", "caller", "request"]
_hash: Final = xxhash.xxh3_64_intdigest
_RANGE: Final = 2.0**64
_first_turns: Final = FirstTurns()


class Split:
    """`by` is what keeps to the target it drew. Targets of weight 0 are spares: last, in their order."""

    __slots__ = ("_spares", "_weighted", "by")

    def __init__(self, targets: Sequence["Target"], weights: Sequence[float], by: SplitBy) -> None:
        pairs = list(zip(targets, weights, strict=True))
        self.by = by
        self._weighted = [(t, f"{t.name}/{t.upstream_model}".encode(), w) for t, w in pairs if w > 0]
        self._spares = tuple(target for target, weight in pairs if weight <= 0)

    def order(self, exchange: "Exchange") -> tuple["Target", ...]:
        """All targets as this request is to try them."""
        return self.draw(_key(exchange, self.by))

    def draw(self, key: int) -> tuple["Target", ...]:
        """All targets, the drawn one first. `key` is 64 bits."""
        scored = [
            (-weight / log((_hash(name, key) + 0.5) / _RANGE), target)
            for target, name, weight in self._weighted
        ]
        scored.sort(key=_score, reverse=True)
        return (*(target for _, target in scored), *self._spares)

    def shares(self) -> dict[str, float]:
        """Of each target by name, out of 1."""
        whole = sum(weight for _, _, weight in self._weighted)
        return {name.decode(): weight / whole for _, name, weight in self._weighted}


def _key(exchange: "Exchange", by: SplitBy) -> int:
    """64 bits that stay the same for whatever is to stay with its target."""
    caller = exchange.caller
    if caller is not None and by == "caller":
        return _hash(caller.key_id.encode())
    if caller is not None and by == "session":
        if exchange.session_hash:
            return exchange.session_hash
        # Most clients name no session; placement recognises it the same way.
        prompt = prompt_of(exchange.document.values) if exchange.document is not None else None
        if prompt is not None:
            return _first_turns.session(prompt, caller.scope)
    return _hash(exchange.request_id.encode())


def _score(scored: tuple[float, "Target"]) -> float:
    return scored[0]

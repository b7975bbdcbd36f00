"""`prefix`: where the longest beginning of the prompt is cached, until waiting there costs too much.

Sticky until saturated (llm-d): endpoints that hold at least 0.8 of the prompt are warm; the request stays among
them unless the best of them would take `spill_s` longer to its first token than the best of the others. Among
those left, the one with the least to compute, this prompt's uncached part included. What is warm nowhere, as far as
this process knows, goes to its session's home as `session` says: there, other processes will look for it, too.
"""

from collections.abc import Sequence
from typing import Final

from backends.load import EndpointLoad
from policies.placement.ask import PREFIX_CAP_BYTES, Ask
from policies.placement.placer import Placer, Ranking, Reason
from policies.placement.prefix_index import ApproximateIndex, PrefixIndex
from policies.placement.rendezvous import first_within_share
from policies.placement.session_policy import SessionPlacer
from policies.placement.spread import rotated, token_loads

# Hits are either nearly everything or only a shared preamble, so the value is not delicate (llm-d).
WARM: Final = 0.8


class PrefixPlacer(Placer):
    """`prefill_tokens_per_s` is what one engine computes; `spill_s` how much later a first token may come for a cache's sake."""

    name = "prefix"
    wants_session = True
    wants_prefixes = True

    def __init__(
        self,
        remembered_sessions: int,
        index: PrefixIndex,
        *,
        prefill_tokens_per_s: float,
        spill_s: float,
        bounded_load: float,
        floor: int,
    ) -> None:
        super().__init__(remembered_sessions)
        self._index = index
        self._spill_tokens = spill_s * prefill_tokens_per_s
        self._bounded_load = bounded_load
        self._floor = floor
        self._turn = 0
        self._cold = SessionPlacer(remembered_sessions, bounded_load, floor)
        self.sessions = self._cold.sessions
        self._pool: Sequence[EndpointLoad] = ()

    def rank(
        self, endpoints: Sequence[EndpointLoad], everyone: Sequence[EndpointLoad], ask: Ask, now: float
    ) -> Ranking:
        if everyone is not self._pool:
            self._pool = everyone
            if isinstance(self._index, ApproximateIndex):
                self._index.keep_only(everyone)
        costs = token_loads(endpoints, now)
        least_warm = WARM * ask.prompt_tokens
        hits = ask.hits = self._hits(ask)
        warm: list[int] = []
        for place, endpoint in enumerate(endpoints) if hits else ():
            hit = hits.get(endpoint.hash_key, 0)
            if hit:
                costs[place] -= hit  # need not be computed; the rest of the prompt costs the same everywhere
                if hit >= least_warm:
                    warm.append(place)
        if not warm and ask.session:
            return self._cold.rank(endpoints, everyone, ask, now)
        places = sorted(rotated(len(costs), self._turn), key=costs.__getitem__)
        ordered = [endpoints[place] for place in places]
        reason: Reason = "warm" if hits.get(ordered[0].hash_key) else "load"
        if warm and places[0] not in warm:
            best_cold, best_warm = places[0], next(place for place in places if place in warm)
            waits = costs[best_warm] + hits[endpoints[best_warm].hash_key]
            if waits - costs[best_cold] - ask.prompt_tokens <= self._spill_tokens:
                stays = endpoints[best_warm]
                ordered.remove(stays)
                ordered.insert(0, stays)
                reason = "warm"
            else:
                reason = "spilled"
        return self._within_share(ordered, reason, now)

    def wants_prefixes_of(self, ask: Ask) -> bool:
        """A session's last stay says where it is warm; its beginnings are told again when it has doubled."""
        stay = self.sessions.find(ask.session) if ask.session else None
        if stay is None:
            return True
        before = int(stay.tokens * self.bytes_per_token)
        return before < PREFIX_CAP_BYTES and before.bit_length() != ask.prompt_bytes.bit_length()

    def cached_tokens(self, endpoint: EndpointLoad, ask: Ask) -> int:
        hits = self._hits(ask) if ask.hits is None else ask.hits
        return hits.get(endpoint.hash_key, 0)

    def dispatched(self, endpoint: EndpointLoad, ask: Ask, now: float) -> None:
        self._cold.dispatched(endpoint, ask, now)
        self._turn += 1
        self._index.add(endpoint, ask)

    def _hits(self, ask: Ask) -> dict[bytes, int]:
        """Tokens by endpoint's hash key: by the index, or more if the session's last stay says so."""
        scale = 1.0 / self.bytes_per_token
        longest = ask.prompt_tokens
        hits = {key: min(int(size * scale), longest) for key, size in self._index.match(ask).items()}
        stay = self.sessions.find(ask.session) if ask.session else None
        if stay is not None:
            hits[stay.hash_key] = max(hits.get(stay.hash_key, 0), min(stay.tokens, longest))
        return hits

    def _within_share(self, ordered: list[EndpointLoad], reason: Reason, now: float) -> Ranking:
        chosen = first_within_share(ordered, self._bounded_load, self._floor, now)
        if chosen is not ordered[0]:
            ordered.remove(chosen)
            ordered.insert(0, chosen)
            reason = "home_over_share" if reason == "warm" else reason
        return Ranking(ordered, reason)

"""`prefix`: where the longest beginning of the prompt is cached, until waiting there costs too much.

Sticky until saturated (llm-d): endpoints that hold at least 0.8 of the prompt are warm; the request stays among
them unless the best of them would take `spill_s` longer to its first token than the best of the others. Among
those left, the one with the least to compute, this prompt's uncached part included. Where the engines' own word on
their caches is to be had (a `BlockIndex`, and the prompt in tokens), it stands in place of our guess. What is warm nowhere, as far as
this process knows, goes to its session's home as `session` says: there, other processes will look for it, too.
"""

from collections.abc import Sequence
from typing import Final

from backends.load import EndpointLoad
from backends.placement_config import PlacementConfig
from policies.placement.ask import PREFIX_CAP_BYTES, Ask
from policies.placement.block_index import BlockIndex
from policies.placement.placer import Placer, Ranking, Reason
from policies.placement.prefix_index import ApproximateIndex
from policies.placement.rendezvous import first_within_share
from policies.placement.session_policy import SessionPlacer
from policies.placement.spread import rotated, token_loads

# Hits are either nearly everything or only a shared preamble, so the value is not delicate (llm-d).
WARM: Final = 0.8


class PrefixPlacer(Placer):
    """`settings.prefill_tokens_per_s` is what one engine computes; `spill_s` how much later a first token may come for a
    cache's sake."""

    name = "prefix"
    wants_session = True
    wants_prefixes = True

    def __init__(self, settings: PlacementConfig, blocks: BlockIndex | None = None) -> None:
        """`blocks`: what the pool's engines hold, by their own word."""
        remembered = settings.remembered_sessions
        super().__init__(remembered)
        self._index = ApproximateIndex(settings.remembered_prefixes)
        self._blocks = blocks
        self._spill_tokens = settings.spill_s * settings.prefill_tokens_per_s
        self._bounded_load = settings.bounded_load
        self._floor = settings.bounded_load_floor
        self._turn = 0
        self._cold = SessionPlacer(remembered, self._bounded_load, self._floor)
        self.sessions = self._cold.sessions
        self._pool: Sequence[EndpointLoad] = ()

    def rank(
        self, endpoints: Sequence[EndpointLoad], everyone: Sequence[EndpointLoad], ask: Ask, now: float
    ) -> Ranking:
        if everyone is not self._pool:
            self._pool = everyone
            self._index.keep_only(everyone)
        costs = token_loads(endpoints, now)
        least_warm = WARM * ask.prompt_tokens
        hits = ask.hits = self._hits(ask)
        if self._blocks is not None and ask.known is not None and not any(hits.values()):
            hits = self._guessed(ask)  # what others were just sent, and no engine has told of yet
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
        blocks, key = self._blocks, endpoint.hash_key
        ask.is_exact = (
            blocks is not None and ask.known is not None and key in blocks.known and key not in blocks.partial
        )
        return hits.get(key, 0)

    def dispatched(self, endpoint: EndpointLoad, ask: Ask, now: float) -> None:
        self._cold.dispatched(endpoint, ask, now)
        self._turn += 1
        self._index.add(endpoint, ask)

    def finished(self, endpoint: EndpointLoad, ask: Ask, prompt_tokens: int, output_tokens: int) -> None:
        super().finished(endpoint, ask, prompt_tokens, output_tokens)
        if ask.known is not None:
            is_same = ask.known.chain.tokens == prompt_tokens
            ask.known.template.counted(is_same=is_same)
            if is_same and self._blocks is not None:
                self._blocks.assume(endpoint.hash_key, ask.known.chain)

    def _hits(self, ask: Ask) -> dict[bytes, int]:
        """Tokens by endpoint's hash key: by the engines' word, and where there is none, by what was sent."""
        blocks = self._blocks
        if blocks is None or ask.known is None:
            return self._guessed(ask)
        exact = blocks.match(ask.known.chain)
        if not blocks.partial and len(exact) >= len(self._pool):
            return exact
        guessed = self._guessed(ask)
        sure = {key: hit for key, hit in exact.items() if hit or key not in blocks.partial}
        return guessed | sure

    def _guessed(self, ask: Ask) -> dict[bytes, int]:
        """By the approximate index, or more if the session's last stay says so."""
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

"""How well requests find their caches: what was predicted, what the upstream then counted, and why sessions moved.

Counts of one worker since its start, for the metrics page; the ledger has the same of every request. Labels are
bounded: endpoints, reasons, states; never a session or a tenant.
"""

from policies.exchange import Exchange


class Locality:
    """`observe` once per request, at the end of settle."""

    def __init__(self) -> None:
        self.sessions: dict[str, int] = {"kept": 0, "moved": 0, "new": 0, "none": 0}
        self.reasons: dict[str, int] = {}
        self.moves: dict[str, int] = {}
        # Requests for which something was predicted: from the engine's own word, or guessed.
        self.predictions: dict[str, int] = {"exact": 0, "guessed": 0}
        # Of answered requests for which something was predicted, by endpoint.
        self.prompt_tokens: dict[str, int] = {}
        self.predicted_tokens: dict[str, int] = {}
        self.cached_tokens: dict[str, int] = {}

    def observe(self, exchange: Exchange) -> None:
        reason, candidate = exchange.place_reason, exchange.candidate
        if candidate is None or not reason:
            return
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        predicted = exchange.predicted_cached_tokens
        if predicted is None:
            return  # there was nothing to choose
        self.sessions[exchange.session_state] += 1
        self.predictions["exact" if exchange.ask is not None and exchange.ask.is_exact else "guessed"] += 1
        if exchange.session_state == "moved":
            self.moves[reason] = self.moves.get(reason, 0) + 1
        usage, endpoint = exchange.usage, candidate.endpoint.name
        if usage is None or exchange.is_estimated:
            return
        self.prompt_tokens[endpoint] = self.prompt_tokens.get(endpoint, 0) + usage.prompt_tokens
        self.predicted_tokens[endpoint] = self.predicted_tokens.get(endpoint, 0) + predicted
        self.cached_tokens[endpoint] = self.cached_tokens.get(endpoint, 0) + usage.cache_read_tokens

"""Whether a prompt is computed by another engine than the one that will answer, and by which.

The engine that answers is chosen first, by session, so what is left to compute is what is not expected in its cache: a
short rest is computed there. Who computes a long one is chosen by what is warm and by load, never by session: the
next turn's prompt is mostly in the cache of the one that answered. Refuses to know how the two calls are made.
"""

from typing import Final, Literal, NamedTuple

from backends.load import EndpointLoad
from backends.pool import Endpoint
from backends.prefill_config import PrefillConfig
from policies.exchange import Exchange
from policies.health.book import HealthBook
from policies.placement.ask import Ask
from policies.placement.hold import Hold
from policies.placement.place import CONVERSATIONAL, ask_of
from policies.placement.placer import Placer
from policies.placement.prompt import prefixes, prompt_of
from policies.placement.saturation import has_room
from policies.routing import Target

# Why nobody else computes it. unfit: not one prompt, or one whose every token's own figures are wanted; short: little
# is left to compute; out, full: nobody well, nobody with room.
Reason = Literal["unfit", "short", "out", "full"]

# Answers that need more of the prompt than its cache. Several answers to one prompt would each collect it.
_WHOLE: Final = frozenset({"prompt_logprobs", "echo", "best_of", "use_beam_search"})


class Prefill(NamedTuple):
    """Who computes the prompt. `cached_tokens` of it are expected in the endpoint's cache."""

    endpoint: Endpoint
    ask: Ask
    cached_tokens: int


class Prefillers:
    """A target's endpoints that compute prompts for those that answer. One per configuration."""

    __slots__ = ("_endpoints", "_placer", "settings")

    def __init__(self, endpoints: tuple[Endpoint, ...], placer: Placer, settings: PrefillConfig) -> None:
        self._endpoints = endpoints
        self._placer = placer
        self.settings = settings

    def choose(self, exchange: Exchange, target: Target, health: HealthBook, now: float) -> Prefill | Reason:
        """After the endpoint that answers was chosen. Changes nothing."""
        document = exchange.document
        if (
            document is None
            or exchange.dialect.name not in CONVERSATIONAL
            or exchange.choices > 1
            or exchange.continues
            or not _WHOLE.isdisjoint(document.values)
            or _is_list_of_prompts(bytes(document.values.get("prompt", b"")))
        ):
            return "unfit"
        here = ask_of(exchange, target)
        if here.prompt_tokens - (exchange.predicted_cached_tokens or 0) < self.settings.least_tokens:
            return "short"
        # Nobody is asked in a panic: without them the request is answered all the same.
        well = [endpoint for endpoint in self._endpoints if _is_well(endpoint, health, now)]
        if not well:
            return "out"
        ask = Ask(prompt_bytes=here.prompt_bytes, prompt_tokens=here.prompt_tokens)
        prompt = prompt_of(document.values)
        if prompt is not None:
            scope = exchange.caller.scope if target.pool.is_salted and exchange.caller is not None else 0
            ask.prefixes, ask.prefix_bytes = prefixes(prompt, scope)
        if target.placer is not None:  # which hears how many tokens prompts have
            self._placer.bytes_per_token = target.placer.bytes_per_token
        everyone = self._endpoints if len(well) == len(self._endpoints) else well
        for endpoint in self._placer.rank(everyone, self._endpoints, ask, now).endpoints:
            if isinstance(endpoint, Endpoint) and has_room(endpoint, now, exchange.ceiling):
                return Prefill(endpoint, ask, self._placer.cached_tokens(endpoint, ask))
        return "full"

    def take(self, prefill: Prefill, now: float) -> Hold:
        """Counts the prompt at its endpoint, before it is sent there."""
        self._placer.dispatched(prefill.endpoint, prefill.ask, now)
        return Hold(prefill.endpoint, prefill.ask.prompt_tokens - prefill.cached_tokens)


def _is_well(endpoint: EndpointLoad, health: HealthBook, now: float) -> bool:
    return not endpoint.is_draining and health.may_retry_at(endpoint, now)


def _is_list_of_prompts(prompt: bytes) -> bool:
    """`prompt` as JSON: of a list of texts, or of lists of tokens, each would be a prompt of its own."""
    return prompt[:1] == b"[" and prompt[1:].lstrip()[:1] in (b'"', b"[")

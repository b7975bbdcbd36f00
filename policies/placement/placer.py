"""The interface of a placement policy: one per target, living as long as the worker.

A placer ranks endpoints of one pool for one upstream model (a LoRA adapter is an upstream model, so caches of
different ones never mix). It is told what was sent and what came of it. Invariant: `rank` changes nothing, so
that explaining a decision does not alter the next; turns pass with `dispatched`.
"""

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from backends.load import EndpointLoad
from policies.placement.ask import Ask
from policies.placement.session_memory import SessionMemory

# kept: where this session was last. moved: elsewhere, for a reason. new: not known to this process. none: no session.
SessionState = Literal["kept", "moved", "new", "none"]
# Why the first of the ranking is the first.
Reason = Literal[
    "home",  # the session's own endpoint by hash
    "warm",  # the longest matching prefix is there
    "load",  # the least loaded: nothing speaks for any other
    "turn",  # round-robin or a weighted draw
    "home_out",  # home is unhealthy, warming up or draining
    "home_over_share",  # home is above its bounded share of the pool's load
    "full",  # what came before it is saturated
    "spilled",  # waiting for the warm one would take too long
    "only",  # there is no choice
    "pinned",  # the request names something that lives there
    "retry",  # another attempt failed
    "fallback",  # the target before it could not take it
]

_BYTES_PER_TOKEN: Final = 4.0  # until there are answers to learn it from
_LEARNING_RATE: Final = 0.05
_LEAST_TOKENS: Final = 16  # a shorter prompt says nothing about bytes per token


class Ranking(msgspec.Struct):
    """Endpoints best first, and why the first is first. Never empty if `rank` was given any."""

    endpoints: Sequence[EndpointLoad]
    reason: Reason


class Placer:
    """A policy by the name it has in the configuration. Subclasses override `rank`, and the rest as they need.

    `bytes_per_token` is learned from what upstreams count.
    """

    name: str = ""
    wants_session = False  # whether a session should be recognised where the client named none
    wants_prefixes = False

    def __init__(self, remembered_sessions: int) -> None:
        self.sessions = SessionMemory(remembered_sessions)
        self.bytes_per_token = _BYTES_PER_TOKEN

    def rank(
        self, endpoints: Sequence[EndpointLoad], everyone: Sequence[EndpointLoad], ask: Ask, now: float
    ) -> Ranking:
        """`endpoints` are those that may be chosen now, `everyone` the whole pool.

        A session's home is looked for among `everyone`: who is out leaves the candidates, not the hash.
        `endpoints is everyone` says that all are whole.
        """
        raise NotImplementedError

    def wants_prefixes_of(self, ask: Ask) -> bool:
        """Whether the beginnings of this prompt would tell anything. Asked before they are hashed."""
        del ask
        return self.wants_prefixes

    def cached_tokens(self, endpoint: EndpointLoad, ask: Ask) -> int:
        """How much of the prompt is expected in the endpoint's cache. An estimate, for load and for the ledger."""
        return self.sessions.cached_tokens(endpoint, ask)

    def state(self, endpoint: EndpointLoad, ask: Ask) -> SessionState:
        """What going to `endpoint` means for the session; to be asked before `dispatched`."""
        if not ask.session:
            return "none"
        stay = self.sessions.find(ask.session)
        if stay is None:
            return "new"
        return "kept" if stay.hash_key == endpoint.hash_key else "moved"

    def dispatched(self, endpoint: EndpointLoad, ask: Ask, now: float) -> None:
        """The request goes to `endpoint` now."""
        del now
        if ask.session:
            stay = self.sessions.find(ask.session)
            if stay is None or stay.hash_key != endpoint.hash_key:
                self.sessions.put(ask.session, endpoint, ask.prompt_tokens)

    def finished(self, endpoint: EndpointLoad, ask: Ask, prompt_tokens: int, output_tokens: int) -> None:
        """It was answered, and the upstream counted so many tokens."""
        if prompt_tokens >= _LEAST_TOKENS and ask.prompt_bytes:
            ratio = min(max(ask.prompt_bytes / prompt_tokens, 1.0), 16.0)
            self.bytes_per_token += _LEARNING_RATE * (ratio - self.bytes_per_token)
        if ask.session:
            self.sessions.put(ask.session, endpoint, prompt_tokens + output_tokens)

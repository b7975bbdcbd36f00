"""The place stage: a request's candidates, target by target, best first; and what is counted of the one it takes.

Works on an Exchange and a catalog only, so that `headgate explain` shows what the gateway would do. Waiting for
room is not done here: `Choice.is_full` says that there is none.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from backends.pool import Endpoint
from policies.exchange import Exchange
from policies.health.book import HealthBook
from policies.placement.ask import Ask
from policies.placement.hold import Hold
from policies.placement.placer import Reason
from policies.placement.prompt import FirstTurns, prefixes, prompt_of
from policies.placement.saturation import has_room
from policies.routing import Candidate, Group, Target

# Where prompts are continued. An embedding reads no cache.
CONVERSATIONAL: Final = frozenset({"chat", "completions", "responses", "messages"})
_BYTES_PER_TOKEN: Final = 4  # where nobody learns it
_first_turns = FirstTurns()


class Choice(msgspec.Struct):
    """One target's candidates, best first; without any, none of its endpoints may be chosen now."""

    group: Group
    candidates: list[Candidate]
    reason: Reason
    is_full: bool


def place(exchange: Exchange, health: HealthBook, now: float) -> list[Choice]:
    """One for each target that speaks the dialect, in order of preference; empty if none does.

    A target that is believed to be down, as a whole, comes after those that are not.
    """
    model = exchange.model
    assert model is not None  # admit refuses names nobody serves
    groups = model.groups(exchange.dialect, exchange.targets)
    if exchange.pinned_to:
        groups = tuple(g for g in groups if any(e.name == exchange.pinned_to for e in g.endpoints)) or groups
    if len(groups) == 1:
        return [choose(exchange, groups[0], health, now)]
    choices = [choose(exchange, group, health, now) for group in groups]
    if choices and (not choices[0].candidates or health.is_down(groups[0].endpoints, now)):
        choices.sort(key=lambda choice: not choice.candidates or health.is_down(choice.group.endpoints, now))
    return choices


def choose(exchange: Exchange, group: Group, health: HealthBook, now: float) -> Choice:
    """Among the endpoints of one target."""
    everyone = group.endpoints
    if exchange.pinned_to:
        for endpoint in everyone:
            if endpoint.name == exchange.pinned_to:  # sick or not: nobody else has what it continues
                is_full = not has_room(endpoint, now, exchange.ceiling)
                return Choice(group, [group.candidates[endpoint]], "pinned", is_full)
    first = everyone[0]
    if len(everyone) == 1 and not first.is_draining:  # well or ill: there is no other
        is_full = not has_room(first, now, exchange.ceiling)
        return Choice(group, [group.candidates[first]], "only", is_full)
    endpoints = health.usable(_staying(everyone), now, exchange.session_hash)
    if not endpoints:
        return Choice(group, [], "only", is_full=False)
    placer = group.target.placer
    if placer is None:
        candidates = [group.candidates[endpoint] for endpoint in endpoints]
        return Choice(group, candidates, "only", is_full=not has_room(endpoints[0], now, exchange.ceiling))
    ranking = placer.rank(endpoints, everyone, ask_of(exchange, group.target), now)
    ordered, reason = ranking.endpoints, ranking.reason
    is_full = False
    if not has_room(ordered[0], now, exchange.ceiling):
        roomy = [endpoint for endpoint in ordered if has_room(endpoint, now, exchange.ceiling)]
        is_full = not roomy
        if roomy:
            ordered = [*roomy, *(endpoint for endpoint in ordered if endpoint not in roomy)]
            reason = "full"
    by_endpoint = group.candidates
    return Choice(group, [by_endpoint[endpoint] for endpoint in ordered], reason, is_full)


def ask_of(exchange: Exchange, target: Target) -> Ask:
    """Made when it is first wanted, once for each target that is considered."""
    if exchange.ask is not None and exchange.ask_target is target:
        return exchange.ask
    exchange.ask_target = target
    placer = target.placer
    assert placer is not None  # where there is nothing to choose, nothing is asked
    ask = exchange.ask = Ask(exchange.session_hash, prompt_bytes=exchange.body_bytes)
    ask.prompt_tokens = int(exchange.body_bytes / placer.bytes_per_token)
    known = exchange.known
    if known is not None and known.pool == target.pool.name:
        ask.known, ask.prompt_tokens = known, known.chain.tokens
    caller, document = exchange.caller, exchange.document
    if not exchange.is_affine or document is None or caller is None:
        return ask
    wants_session = placer.wants_session and not ask.session
    if not (wants_session or placer.wants_prefixes) or exchange.dialect.name not in CONVERSATIONAL:
        return ask
    prompt = prompt_of(document.values)
    if prompt is None:
        return ask
    if wants_session:
        ask.session = exchange.session_hash = _first_turns.session(prompt, caller.scope)
        ask.is_derived = True
    if placer.wants_prefixes_of(ask):
        scope = caller.scope if target.pool.is_salted else 0
        ask.prefixes, ask.prefix_bytes = prefixes(prompt, scope)
    return ask


def take(exchange: Exchange, candidate: Candidate, now: float) -> Hold:
    """Counts the request at the candidate's endpoint, before it is sent. `exchange.place_reason` is set by then."""
    target, endpoint = candidate.target, candidate.endpoint
    placer = target.placer
    if placer is None:
        exchange.session_state = "kept" if exchange.session_hash else "none"
        return Hold(endpoint, exchange.body_bytes // _BYTES_PER_TOKEN)
    ask = ask_of(exchange, target)
    cached_tokens = placer.cached_tokens(endpoint, ask)
    exchange.predicted_cached_tokens = cached_tokens
    exchange.session_state = placer.state(endpoint, ask)
    placer.dispatched(endpoint, ask, now)
    return Hold(endpoint, ask.prompt_tokens - cached_tokens)


def _staying(endpoints: tuple[Endpoint, ...]) -> Sequence[Endpoint]:
    """Those that do not drain; the very same tuple where that is all of them."""
    for endpoint in endpoints:
        if endpoint.is_draining:
            return [endpoint for endpoint in endpoints if not endpoint.is_draining]
    return endpoints


def finish(exchange: Exchange) -> None:
    """The answer's usage is known: what was predicted is corrected by it."""
    candidate, usage, ask = exchange.candidate, exchange.usage, exchange.ask
    if candidate is None or usage is None or ask is None or exchange.is_estimated:
        return
    placer = candidate.target.placer
    if placer is not None and candidate.target is exchange.ask_target:
        placer.finished(candidate.endpoint, ask, usage.prompt_tokens, usage.output_tokens)

"""What is wrong with rules, fallbacks and shadows, across sections: names, order, cycles.

Runs over plain values like `gateway.config_checks`, so that all problems of a file are told at once; values of another
shape are passed over, the schema speaks of them.
"""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from backends.registry import KNOWN
from gateway.config_checks import below
from gateway.config_file import Location, Problem, format_location
from policies.rules.condition import Condition


def routing_problems(values: dict[str, Any]) -> Iterator[Problem]:
    """Models that are not there, rules that can never match, cycles, shares of nothing."""
    names = _PublicNames(values)
    yield from _weight_problems(values)
    yield from _fallback_problems(values, names)
    for location, shadow in below(values, "models", "*", "shadows", "*"):
        yield from _unknown_model((*location, "model"), shadow.get("model"), names)
        if names.declared(shadow.get("model")) == location[1]:
            yield Problem((*location, "model"), "is the model itself: its requests would be doubled")
    yield from _rule_problems(values, names)


class _PublicNames:
    """What callers may name: models, their aliases, `{provider}/{model}`."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.models = {str(location[-1]): model for location, model in below(values, "models", "*")}
        self._aliases = {
            alias: name for name, model in self.models.items() for alias in _texts(model.get("aliases"))
        }
        listed = values.get("providers")
        self._providers = {*KNOWN, *(listed if isinstance(listed, dict) else ())}

    def declared(self, name: Any) -> str | None:
        """The declared model of this name or alias."""
        if not isinstance(name, str):
            return None
        return name if name in self.models else self._aliases.get(name)

    def is_known(self, name: str) -> bool:
        provider, slash, model = name.partition("/")
        return self.declared(name) is not None or bool(slash and model and provider in self._providers)

    def suggestion(self, name: str) -> str:
        known = sorted({*self.models, *self._aliases})
        near = difflib.get_close_matches(name, known, 1, 0.6)
        if near:
            return f'; did you mean "{near[0]}"?'
        return f"; there are {', '.join(known)}, and {{provider}}/{{model}}" if 0 < len(known) <= 30 else ""


def _unknown_model(location: Location, name: Any, names: _PublicNames) -> Iterator[Problem]:
    if isinstance(name, str) and name and not names.is_known(name):
        yield Problem(location, f'there is no model "{name}"' + names.suggestion(name))


def _weight_problems(values: dict[str, Any]) -> Iterator[Problem]:
    for location, model in below(values, "models", "*"):
        targets = [target for _, target in below(model, "targets", "*")]
        weights = [target["weight"] for target in targets if target.get("weight") is not None]
        if weights and all(weight == 0 for weight in weights):
            yield Problem((*location, "targets"), "all weights are 0: nothing would come first")
        if not weights and model.get("split_by") is not None:
            yield Problem((*location, "split_by"), "means nothing without a weight on some target")


def _fallback_problems(values: dict[str, Any], names: _PublicNames) -> Iterator[Problem]:
    edges: dict[str, list[tuple[Location, str]]] = {}
    for location, fallback in below(values, "models", "*", "fallbacks", "*"):
        place = (*location, "model")
        yield from _unknown_model(place, fallback.get("model"), names)
        to = names.declared(fallback.get("model"))
        if to is not None:
            edges.setdefault(str(location[1]), []).append((place, to))
    told: set[frozenset[str]] = set()
    for start in edges:
        for place, trail in _cycles(edges, start):
            if frozenset(trail) not in told:
                told.add(frozenset(trail))
                yield Problem(place, f"a cycle: {' -> '.join((*trail, trail[0]))}")


def _cycles(
    edges: dict[str, list[tuple[Location, str]]], start: str
) -> Iterator[tuple[Location, tuple[str, ...]]]:
    """The ways from a model back to itself, with the place that closes each."""
    ways: list[tuple[str, ...]] = [(start,)]
    while ways:
        trail = ways.pop()
        for place, to in edges.get(trail[-1], ()):
            if to == start:
                yield place, trail
            elif to not in trail and len(ways) < 1000:
                ways.append((*trail, to))


class _RuleScope(NamedTuple):
    """What decides whether a rule can hide another: whom and which models it is for, and its condition."""

    location: Location
    name: str
    scopes: frozenset[tuple[str, str]]
    models: tuple[str, ...] | None
    condition: str

    def hides(self, other: "_RuleScope", scope: tuple[str, str]) -> bool:
        return (
            scope in self.scopes
            and _covers(self.models, other.models)
            and self.condition in ("", other.condition)
        )


def _rule_problems(values: dict[str, Any], names: _PublicNames) -> Iterator[Problem]:
    rules = list(below(values, "rules", "*"))
    seen: dict[str, Location] = {}
    earlier: list[_RuleScope] = []
    for location, rule in rules:
        yield from _unknown_model((*location, "model"), rule.get("model"), names)
        yield from _rule_target_problems(location, rule, names)
        yield from _rule_model_problems(location, rule, names)
        name = rule.get("name")
        if isinstance(name, str):
            if name in seen:
                yield Problem((*location, "name"), f"{format_location(seen[name])} has this name")
            seen.setdefault(name, location)
        scope = _rule_scope(location, rule)
        if scope is not None:
            yield from _unreachable(scope, earlier)
            earlier.append(scope)
    if rules and _is_list_of_mappings(values["rules"]):
        location, last = rules[-1]
        if any(last.get(part) not in (None, [], "*") for part in ("keys", "teams", "models", "when")):
            message = "the last rule is the default: it has no keys, teams, models and when (with nothing but a name, a request goes to the model it asks for)"
            yield Problem(location, message)


def _unreachable(rule: _RuleScope, earlier: Iterable[_RuleScope]) -> Iterator[Problem]:
    """A rule that another hides in every list that it is in."""
    hiding = [
        next((before for before in earlier if before.hides(rule, scope)), None)
        for scope in sorted(rule.scopes)
    ]
    first = hiding[0]
    if first is None or None in hiding:
        return
    before = f"{format_location(first.location)} ({first.name})"
    reason = "has the same condition" if first.condition else "always matches"
    yield Problem(rule.location, f"can never match: {before} comes before it and {reason}")


def _rule_target_problems(location: Location, rule: dict[str, Any], names: _PublicNames) -> Iterator[Problem]:
    target = rule.get("target")
    if not isinstance(target, str) or not target:
        return
    asked = [rule["model"]] if rule.get("model") is not None else _texts(rule.get("models"))
    models = [names.declared(name) for name in asked] if asked else list(names.models)
    if None in models:
        return  # a provider's wildcard, a prefix, or told already
    known = sorted({n for name in models for n in _target_names(names.models[str(name)], str(name))})
    if target not in known:
        near = difflib.get_close_matches(target, known, 1, 0.6)
        hint = f'; did you mean "{near[0]}"?' if near else f"; there are {', '.join(known)}" if known else ""
        whose = f"{asked[0]} has" if len(asked) == 1 else "none of its models has"
        yield Problem((*location, "target"), f'{whose} no target "{target}"{hint}')


def _rule_model_problems(location: Location, rule: dict[str, Any], names: _PublicNames) -> Iterator[Problem]:
    """Names it is for that nobody serves: with a `model` of its own a rule may give any name a meaning."""
    if rule.get("model") is not None:
        return
    for index, name in enumerate(_texts(rule.get("models"))):
        if not name.endswith("*") and not names.is_known(name):
            near = difflib.get_close_matches(name, names.models, 1, 0.7)
            if near:
                message = f'there is no model "{name}"; did you mean "{near[0]}"?'
                yield Problem((*location, "models", index), message)


def _rule_scope(location: Location, rule: dict[str, Any]) -> _RuleScope | None:
    """None if what it says cannot be read: the schema tells."""
    condition, when = "", rule.get("when")
    if when is not None:
        try:
            condition = Condition(when).source
        except (ValueError, TypeError):
            return None
    scopes = [("key", name) for name in _texts(rule.get("keys"))]
    scopes += [("team", name) for name in _texts(rule.get("teams"))]
    models = rule.get("models")
    return _RuleScope(
        location,
        str(rule.get("name")),
        frozenset(scopes or [("", "")]),
        None if models in (None, "*") else tuple(_texts(models)),
        condition,
    )


def _covers(wide: tuple[str, ...] | None, narrow: tuple[str, ...] | None) -> bool:
    if wide is None:
        return True
    if narrow is None:
        return "*" in wide
    return all(any(_includes(pattern, name) for pattern in wide) for name in narrow)


def _includes(pattern: str, name: str) -> bool:
    return pattern == name or (pattern.endswith("*") and name.startswith(pattern[:-1]))


def _target_names(model: dict[str, Any], public: str) -> Iterator[str]:
    for _, target in below(model, "targets", "*"):
        upstream = target.get("pool") or target.get("provider")
        if isinstance(upstream, str):
            yield upstream
            yield f"{upstream}/{target.get('model') or public}"


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _is_list_of_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)

"""Rules: where a request goes by the operator's word. First match wins; key before team before everyone.

An `admit` hook that runs before all others: it leaves `exchange.model`, and where the configuration says so
`targets`, `edits`, `on_full` and tags, so that access, limits and prices are those of the model that is dispatched. A
rule never gives a caller a model that its key may not use, unless it says `grants`: it is passed over. Evaluated over
the request's own fields only; nothing is decoded that no condition reads.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from policies.access import may_use
from policies.exchange import Exchange, OnFull
from policies.policy import Policy
from policies.routing import Model, Target
from policies.rules.condition import Condition, Reads, activation
from policies.rules.facts import BYTES_PER_TOKEN, BudgetUsed, Facts, RefusedDeclarationError
from policies.rules.fallback import ModelRouting, fall_back, order_targets
from policies.rules.params import Params
from policies.verdict import Denial


class Class(NamedTuple):
    """A priority: its place in `policies.placement.priority.PRIORITIES`, and when an endpoint is full for it."""

    place: int
    ceiling: float


class Action(NamedTuple):
    """What a rule that matches does. `model` None: the one asked for. `target`: one of the model's own, by name."""

    model: Model | None = None
    target: str = ""
    params: Params | None = None
    on_full: OnFull = ""
    priority: Class | None = None
    tags: tuple[str, ...] = ()
    grants: bool = False


class Rule:
    """`models` are names and prefixes ending in `*`; None: whatever was asked for. No condition: it always matches.

    `off` says why a rule cannot be followed now (its model is not served); such a rule is passed over.
    """

    __slots__ = ("_names", "_prefixes", "action", "condition", "name", "off")

    def __init__(
        self,
        name: str,
        action: Action,
        models: frozenset[str] | None = None,
        condition: Condition | None = None,
        off: str = "",
    ) -> None:
        self.name = name
        self.action = action
        self.condition = condition
        self.off = off
        self._names = models
        self._prefixes = tuple(m[:-1] for m in models or () if m.endswith("*"))

    def is_for(self, model_name: str) -> bool:
        names = self._names
        return names is None or model_name in names or model_name.startswith(self._prefixes or "\0")

    def obstacle(self, exchange: Exchange) -> str:
        """Why this request cannot go where the rule says; "" if it can."""
        action = self.action
        model = action.model or exchange.model
        if self.off or model is None:
            return self.off or "no such model"
        if action.target and not targets_named(model, action.target):
            return f"{model.name} has no target {action.target}"
        caller = exchange.caller
        if action.model is None or action.grants or (caller is not None and may_use(caller, model.name)):
            return ""
        return f"this key may not use {model.name}"


class Trial(NamedTuple):
    """What became of one rule. `read` is what its condition looked at; `outcome` starts with matched, or says why not."""

    scope: str
    rule: str
    condition: str
    outcome: str
    read: Mapping[str, Any]


MATCHED: Final = "matched"


class RuleList:
    """The rules of one scope, in order."""

    def __init__(self, scope: str, rules: Sequence[Rule], budget_used: BudgetUsed | None = None) -> None:
        self.scope = scope
        self.rules = tuple(rules)
        reads = Reads()
        for rule in rules:
            if rule.condition is not None:
                reads |= rule.condition.reads
        self._facts = Facts(reads, budget_used)

    def first(
        self, exchange: Exchange, counts: dict[tuple[str, str], int], trace: list[Trial] | None
    ) -> Rule | None:
        """The first that matches and can be followed. Counts matches and conditions that had no value."""
        values: dict[str, Any] = {}
        activated = None
        for rule in self.rules:
            condition = rule.condition
            holds: bool | str = True
            if not rule.is_for(exchange.model_name):
                holds = "not for this model"
            elif condition is not None:
                if activated is None:
                    values = self._facts.values(exchange)
                    activated = activation(values)
                holds = condition.value(activated)
                if isinstance(holds, str):
                    counts[rule.name, "no_value"] = counts.get((rule.name, "no_value"), 0) + 1
            if holds is True:
                holds = rule.obstacle(exchange) or True
            if trace is not None:
                outcome = holds if isinstance(holds, str) else MATCHED if holds else "false"
                trace.append(_trial(self.scope, rule, outcome, values))
            if holds is True:
                counts[rule.name, MATCHED] = counts.get((rule.name, MATCHED), 0) + 1
                return rule
        return None


class Rules(Policy):
    """All scopes, and the shares of models. `counts` outlives a reload: by rule and outcome."""

    chooses_model = True

    def __init__(
        self,
        by_key: Mapping[str, RuleList],
        by_team: Mapping[str, RuleList],
        everyone: RuleList,
        budget_used: BudgetUsed | None,
        counts: dict[tuple[str, str], int],
    ) -> None:
        self._by_key = by_key
        self._by_team = by_team
        self._everyone = everyone
        self._budget_used = budget_used
        self._counts = counts

    def admit(self, exchange: Exchange, now: float) -> Denial | None:
        del now
        return self.route(exchange)

    def route(self, exchange: Exchange, trace: list[Trial] | None = None) -> Denial | None:
        """`trace`, if given, gets what became of each rule that was asked."""
        if exchange.document is None:
            return None  # a passthrough request: its path says where it goes
        try:
            rule = self._choose(exchange, trace)
        except RefusedDeclarationError as refused:
            return refused.denial
        if rule is not None:
            _follow(rule.action, exchange)
        if exchange.model is not None and exchange.model.routing is not None:
            self._turn_early(exchange, exchange.model.routing)
            order_targets(exchange)
        return None

    def _choose(self, exchange: Exchange, trace: list[Trial] | None) -> Rule | None:
        caller = exchange.caller
        if caller is not None:
            for scoped, name in ((self._by_key, caller.name), (self._by_team, caller.team)):
                rules = scoped.get(name)
                rule = rules.first(exchange, self._counts, trace) if rules is not None else None
                if rule is not None:
                    return rule
        return self._everyone.first(exchange, self._counts, trace)

    def _turn_early(self, exchange: Exchange, routing: ModelRouting | None) -> None:
        """Failures that are certain before anything is sent: no budget left, a prompt beyond the window."""
        if self._budget_used is not None and self._budget_used(exchange) >= 1.0:
            fall_back(exchange, "budget")
            routing = exchange.model.routing if exchange.model is not None else None
        tokens = exchange.body_bytes // BYTES_PER_TOKEN
        while routing is not None and routing.context_tokens is not None and tokens > routing.context_tokens:
            if not fall_back(exchange, "context"):
                return
            routing = exchange.model.routing if exchange.model is not None else None


def targets_named(model: Model, name: str) -> tuple[Target, ...]:
    """A model's targets by `{provider or pool}`, or that with `/{upstream model}`."""
    return tuple(t for t in model.targets if name in (t.name, f"{t.name}/{t.upstream_model}"))


def _follow(action: Action, exchange: Exchange) -> None:
    if action.model is not None:
        exchange.model = action.model
    model, document = exchange.model, exchange.document
    assert model is not None
    assert document is not None
    if action.target:
        exchange.targets = targets_named(model, action.target)
    if action.params is not None:
        exchange.edits = action.params.edits(exchange.dialect, document.values)
        exchange.max_tokens = action.params.max_tokens(exchange.dialect, exchange.max_tokens)
    exchange.on_full = exchange.on_full or action.on_full
    priority = action.priority
    # A client that asked to come later than it must is taken at its word.
    if priority is not None and not (_asks_priority(exchange) and exchange.priority > priority.place):
        exchange.priority, exchange.ceiling = priority
    if action.tags:
        exchange.tags = (*exchange.tags, *action.tags)


def _asks_priority(exchange: Exchange) -> bool:
    return exchange.headers is not None and b"x-headgate-priority" in exchange.headers


def _trial(scope: str, rule: Rule, outcome: str, values: Mapping[str, Any]) -> Trial:
    condition = rule.condition
    read = condition.reads.variables if condition is not None else ()
    return Trial(
        scope,
        rule.name,
        condition.text if condition is not None else "",
        outcome,
        {name: values[name] for name in sorted(read) if name in values},
    )

"""From the configuration's rules, shares, fallbacks and shadows to what decides over requests.

Runs after the catalog is built, as a rule names models. What cannot be followed now (a model whose provider is off)
is left in its place and passed over, so that explaining it can say why.
"""

from collections.abc import Callable, Iterable, Mapping

from gateway.config import Config, ModelConfig
from gateway.routing_config import RuleConfig
from policies.cost_guard import is_unpriced
from policies.placement.priority import PRIORITIES, ceilings
from policies.routing import Catalog, Model
from policies.rules.condition import Condition
from policies.rules.facts import BudgetUsed
from policies.rules.fallback import Fallback, ModelRouting
from policies.rules.rule import Action, Class, Rule, RuleList, Rules
from policies.rules.shadow import Shadow
from policies.rules.split import Split

RuleCounts = dict[tuple[str, str], int]


def rules_of(
    config: Config, catalog: Catalog, counts: RuleCounts, budget_used: BudgetUsed | None = None
) -> Rules | None:
    """Sets the routing of the catalog's models, and makes the policy. None where there is nothing to decide.

    `counts` is kept from one configuration to the next; `budget_used` is there once budgets are.
    """
    names = _declared_names(config)
    has_routing = [
        _set_routing(name, model, catalog, config, names)
        for name, model in config.models.items()
        if model.fallbacks or model.shadows or model.context_tokens or _is_weighted(model)
    ]
    if not config.rules and not any(has_routing):
        return None
    full_at = ceilings(config.overload.classes())
    by_key: dict[str, list[Rule]] = {}
    by_team: dict[str, list[Rule]] = {}
    everyone: list[Rule] = []
    for entry in config.rules:
        rule = _rule(entry, catalog, names, full_at)
        for key in entry.keys:
            by_key.setdefault(key, []).append(rule)
        for team in entry.teams:
            by_team.setdefault(team, []).append(rule)
        if not entry.keys and not entry.teams:
            everyone.append(rule)
    return Rules(
        _lists("key", by_key, budget_used),
        _lists("team", by_team, budget_used),
        RuleList("everyone", everyone, budget_used),
        budget_used,
        counts,
    )


def routing_notes(config: Config, catalog: Catalog) -> list[str]:
    """What is passed over for now, and names that only a key made elsewhere can give a meaning."""
    declared = {key.name for key in config.keys}  # empty ones, too: they are off, not misspelt
    notes = [
        f"rules[{number}].keys: no key here is named {name}; one made with `headgate keys create` may be"
        for number, rule in enumerate(config.rules)
        for name in rule.keys
        if name not in declared
    ]
    named = [
        (f"rules[{number}]", rule.model, False)
        for number, rule in enumerate(config.rules)
        if rule.model is not None
    ]
    for name, model in config.models.items():
        named += [(f"models.{name}.fallbacks[{n}]", e.model, True) for n, e in enumerate(model.fallbacks)]
        named += [(f"models.{name}.shadows[{n}]", e.model, True) for n, e in enumerate(model.shadows)]
    for place, wanted, needs_price in named:
        found = catalog.find(wanted)
        if found is None:
            notes.append(f"{place}: passed over ({wanted} is not served)")
        elif needs_price and config.prices.unknown == "block" and is_unpriced(found):
            notes.append(f"{place}: passed over ({wanted} has no price, and prices.unknown is block)")
    return notes


def _lists(
    kind: str, scoped: Mapping[str, list[Rule]], budget_used: BudgetUsed | None
) -> dict[str, RuleList]:
    return {name: RuleList(f"{kind} {name}", rules, budget_used) for name, rules in scoped.items()}


def _rule(entry: RuleConfig, catalog: Catalog, names: Mapping[str, str], full_at: tuple[float, ...]) -> Rule:
    model = _find(catalog, entry.model, names) if entry.model is not None else None
    place = None if entry.priority is None else PRIORITIES.index(entry.priority)
    action = Action(
        model=model,
        target=entry.target,
        params=entry.params.resolve(),
        on_full=entry.on_full or "",
        priority=None if place is None else Class(place, full_at[place]),
        tags=entry.tags,
        grants=entry.grants,
    )
    return Rule(
        entry.name,
        action,
        None if entry.models is None else frozenset(entry.models),
        None if entry.when is None else Condition(entry.when),
        off=f"{entry.model} is not served" if entry.model is not None and model is None else "",
    )


def _set_routing(
    name: str, declared: ModelConfig, catalog: Catalog, config: Config, names: Mapping[str, str]
) -> bool:
    """The model's own and its aliases'; False if it is not served."""
    model = catalog.find(name)
    if model is None:
        return False
    split = None
    if _is_weighted(declared):
        weights = [target.weight or 0.0 for target in config.served_models()[name]]
        split = Split(model.targets, weights, declared.split_by) if any(weights) else None
    blocks = config.prices.unknown == "block"

    def find(wanted: str) -> Model | None:
        """What nobody admits by itself must not be reached by failing: no policy is asked again there."""
        found = _find(catalog, wanted, names)
        return None if found is None or (blocks and is_unpriced(found)) else found

    routing = ModelRouting(
        split,
        tuple(_fallbacks(declared, find)),
        tuple(_shadows(declared, find)),
        declared.context_tokens,
    )
    for public in (name, *declared.aliases):
        found = catalog.find(public)
        assert found is not None
        found.routing = routing
    return True


def _fallbacks(declared: ModelConfig, find: Callable[[str], Model | None]) -> Iterable[Fallback]:
    for entry in declared.fallbacks:
        model = find(entry.model)
        if model is not None:
            yield Fallback(model, frozenset(entry.failures), entry.grants)


def _shadows(declared: ModelConfig, find: Callable[[str], Model | None]) -> Iterable[Shadow]:
    for entry in declared.shadows:
        model = find(entry.model)
        if model is not None:
            yield Shadow(model, entry.percent, entry.max_in_flight)


def _find(catalog: Catalog, name: str, names: Mapping[str, str]) -> Model | None:
    """By its declared name, so that a model and its alias are never taken for two."""
    return catalog.find(names.get(name, name))


def _declared_names(config: Config) -> dict[str, str]:
    return {alias: name for name, model in config.models.items() for alias in model.aliases}


def _is_weighted(model: ModelConfig) -> bool:
    return any(target.weight is not None for target in model.targets)

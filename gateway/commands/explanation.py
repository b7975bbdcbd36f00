"""What becomes of a made-up request, as plain values: rules, admission, placement, and what would follow a failure.

Runs the very policies that the gateway runs; connects to nothing. What only a running gateway knows (load, health) is
taken as it is at the start: nothing is loaded and everything is well.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import msgspec
import orjson

from backends.adapter import Edits
from backends.config import PoolSettings
from backends.json_object import JsonObject, read_object
from gateway.catalog import CatalogBuilder, Upstreams
from gateway.commands.explain_limits import LimitsExplained
from gateway.commands.prices import usd_per_million_tokens
from gateway.config import Config
from gateway.ingress import read_fields
from gateway.route_builder import rules_of
from policies.access import may_use
from policies.exchange import Exchange
from policies.health.book import HealthBook
from policies.limits.refusals import BUDGET_EXCEEDED
from policies.placement.place import Choice, place
from policies.placement.priority import PRIORITIES
from policies.policy import Hooks
from policies.prices import PriceBook
from policies.registry import policies
from policies.routing import Candidate, Model
from policies.rules.fallback import fall_back
from policies.rules.rule import MATCHED, Rules, Trial
from policies.verdict import Denial

_NOBODY: Final[HealthBook] = HealthBook()


def read_into(exchange: Exchange, body: bytes, headers: Mapping[bytes, bytes], model: str) -> None:
    """What the read stage would find. Refusal if the body is none; `model` stands over the body's own."""
    if model:
        body = _with_model(body or b"{}", model)
    fields = read_fields(body)
    exchange.document = fields.document
    exchange.body_bytes = len(body)
    exchange.headers = headers
    exchange.model_name = fields.model
    exchange.is_stream = fields.stream
    exchange.max_tokens = fields.max_tokens


async def explained(config: Config, exchange: Exchange, limits: LimitsExplained) -> dict[str, Any]:
    """Everything after the read stage. A coroutine, because connection pools are made in a loop."""
    pools = Upstreams().pools([*_with_addresses(config), *config.enabled_providers().values()])
    catalog = CatalogBuilder(config, pools, PriceBook(), int(exchange.received_time)).catalog()
    exchange.model = catalog.find(exchange.model_name)
    rules = rules_of(config, catalog, {}, await limits.budget_used(exchange))
    told: dict[str, Any] = {}
    if rules is not None:
        told["rules"] = _routed(rules, exchange)
        if told["rules"]["denied"]:
            return told
    hooks = Hooks(policies(blocks_unpriced=config.prices.unknown == "block", limits=limits.policy))
    held, denial = await _admitted(hooks, exchange, limits)
    if denial is not None:
        return told | {"admit": _denied(denial) | ({"limits": held} if held else {})}
    model = exchange.model
    assert model is not None
    choices = place(exchange, _NOBODY, time.perf_counter())
    candidates = [candidate for choice in choices for candidate in choice.candidates]
    simulated = {pool.name for pool in config.enabled_pools().values() if pool.simulator is not None}
    return told | {
        "admit": {"denied": None, "limits": held},
        "model": model.name,
        "targets": [_target(choice, model) for choice in choices],
        "place": [_described(candidate, exchange.received_time) for candidate in candidates],
        "ordered_by": _order(exchange),
        # Sessions are placed by address, and a simulator has none before it runs.
        "is_order_known": not (exchange.session_hash and any(c.target.name in simulated for c in candidates)),
        "dialects": model.dialects(),
        "fallbacks": list(_fallbacks(exchange, model)),
        "shadows": [
            {"model": shadow.model.name, "percent": shadow.percent}
            for shadow in (model.routing.shadows if model.routing is not None else ())
        ],
    }


async def _admitted(
    hooks: Hooks, exchange: Exchange, limits: LimitsExplained
) -> tuple[list[dict[str, Any]], Denial | None]:
    """What each limit says, and the first refusal that stands: past a budget the model may have a fallback."""
    while True:
        for admit in hooks.admit:
            denial = admit(exchange, 0.0)
            if denial is not None:
                return [], denial
        held, denial = await limits.judged(exchange)
        if denial is None or denial.code != BUDGET_EXCEEDED or not fall_back(exchange, "budget"):
            return held, denial


def _with_model(body: bytes, model: str) -> bytes:
    values: dict[str, msgspec.Raw] = read_object(body).values
    values["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(values)


def _with_addresses(config: Config) -> list[PoolSettings]:
    """Engines get their addresses when they start; here each has one that nothing is sent to, and takes requests."""
    return [
        replace(
            pool,
            base_urls=pool.base_urls
            if pool.simulator is None
            else tuple(f"http://127.0.0.1:{n + 1}" for n in range(pool.simulator.replicas)),
            members=tuple(member.model_copy(update={"is_open": True}) for member in pool.members),
        )
        for pool in config.enabled_pools().values()
    ]


def _routed(rules: Rules, exchange: Exchange) -> dict[str, Any]:
    trace: list[Trial] = []
    tags, asked, priority = exchange.tags, exchange.model, exchange.priority
    denial = rules.route(exchange, trace)
    followed = next((trial for trial in trace if trial.outcome == MATCHED), None)
    return {
        "trace": [_trial(trial) for trial in trace],
        "followed": followed.rule if followed is not None else None,
        "model": exchange.model.name if exchange.model is not None else None,
        "is_another_model": exchange.model is not asked,
        "fallen_from": [model.name for model in exchange.fallen_from],
        "edits": _edits(exchange.edits, exchange.document),
        "on_full": exchange.on_full,
        "priority": PRIORITIES[exchange.priority],
        "usual_priority": PRIORITIES[priority],
        "tags": list(exchange.tags[len(tags) :]),
        "denied": None if denial is None else _denied(denial),
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return trial._asdict() | {"read": {name: _plain(value) for name, value in trial.read.items()}}


def _plain(value: Any) -> Any:
    """What JSON has for it; else (a moment, a number beyond 64 bits) its text."""
    try:
        return orjson.loads(orjson.dumps(value))
    except TypeError:
        return str(value)


def _edits(edits: Edits | None, document: JsonObject | None) -> dict[str, Any]:
    if edits is None or document is None:
        return {"set": {}, "drop": []}
    values = {name: msgspec.json.decode(b"{" + member + b"}")[name] for name, member in edits.sets.items()}
    return {"set": values, "drop": sorted(edits.drops)}


def _denied(denial: Denial) -> dict[str, Any]:
    return {"denied": denial.code, "status": denial.status, "message": denial.message}


def _target(choice: Choice, model: Model) -> dict[str, Any]:
    target = choice.group.target
    name = f"{target.name}/{target.upstream_model}"
    split = model.routing.split if model.routing is not None else None
    return {
        "target": name,
        "policy": target.placer.name if target.placer is not None else "only",
        "reason": choice.reason,
        "share": None if split is None else split.shares().get(name, 0.0),
        "split_by": None if split is None else split.by,
    }


def _order(exchange: Exchange) -> str:
    """`conversation`: the client named no session, but its first turns tell which one it is."""
    if exchange.ask is not None and exchange.ask.is_derived:
        return "conversation"
    return "session" if exchange.session_hash else "load"


def _described(candidate: Candidate, now_time: float) -> dict[str, Any]:
    target = candidate.target
    return {
        "endpoint": candidate.endpoint.name,
        "provider": candidate.endpoint.provider.name,
        "upstream_model": target.upstream_model,
        "price": target.price.kind,
        "usd_per_million_tokens": usd_per_million_tokens(target.price, now_time),
        "price_source": target.price.source,
    }


def _fallbacks(exchange: Exchange, model: Model) -> Any:
    caller = exchange.caller
    assert caller is not None
    for fallback in model.routing.fallbacks if model.routing is not None else ():
        obstacle = None
        if not (fallback.grants or may_use(caller, fallback.model.name)):
            obstacle = f"this key may not use {fallback.model.name}"
        elif not fallback.model.candidates(exchange.dialect):
            obstacle = f"{fallback.model.name} does not speak {exchange.dialect.name}"
        yield {
            "model": fallback.model.name,
            "failures": sorted(fallback.failures),
            "passed_over": obstacle,
        }

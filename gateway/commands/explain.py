"""`headgate explain`: what would happen to a request, stage by stage, without sending anything.

Runs the very policies that the gateway runs, over an Exchange made up from the options. Makes nothing, connects
to nothing.
"""

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
import typer
from rich.console import Console
from rich.markup import escape

from backends.dialect import DIALECTS
from gateway.commands.explain_limits import LimitsExplained, tenants_of
from gateway.commands.explanation import explained, read_into
from gateway.commands.prices import price_text
from gateway.commands.storage import Storage, fail, opened, pepper_of
from gateway.commands.tables import Column, print_table
from gateway.config import DEFAULT_PATH, Config, ConfigError, load
from gateway.inbound import Refusal
from gateway.key_lifecycle import state_of
from gateway.keys import PEPPER_NAME, caller_in_team
from gateway.stores import key_table
from gateway.stores.sqlite import StorageError
from gateway.tenants import Tenants
from policies.exchange import Caller, Exchange
from policies.session import session_hash, session_secret

_ORDERS: Final = {
    "session": "this session's endpoint first",
    "conversation": "the endpoint of this conversation first, which its first turns tell",
    "load": "the least loaded first, in turn",
}
_COLUMNS: Final = (
    Column("endpoint"),
    Column("provider", rank=1),
    Column("upstream model", folds=True),
    Column("price of a million tokens", folds=True),
    Column("from", rank=2),
)

_LIMIT_COLUMNS: Final = (
    Column("scope", folds=True),
    Column("name", folds=True),
    Column("amount"),
    Column("per", rank=1),
    Column("spent"),
    Column("reserved"),
    Column("asks"),
    Column("verdict"),
)


def explain(
    model: Annotated[str, typer.Option(help="The model a client would ask for; default: the body's.")] = "",
    key: Annotated[
        str, typer.Option(help="The name or id of a caller key; none: one that may use every model.")
    ] = "",
    session: Annotated[str, typer.Option(help="A session id, as in x-session-affinity.")] = "",
    dialect: Annotated[str, typer.Option(help=f"One of {', '.join(DIALECTS)}.")] = "chat",
    body: Annotated[str, typer.Option(help="A file with the request's body; -: standard input.")] = "",
    header: Annotated[
        list[str] | None, typer.Option(help="A request header, `name: value`; may be given several times.")
    ] = None,
    user: Annotated[str, typer.Option(help="An end user's id, as a trusted key would say it.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=0, help="What the request allows its answer.")] = None,
    body_bytes: Annotated[int, typer.Option(min=0, help="How long its body is, where none is given.")] = 1000,
    config_path: Annotated[
        Path, typer.Option("--config", "-c", envvar="HEADGATE_CONFIG", help="The configuration file.")
    ] = DEFAULT_PATH,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What would happen to a request, and why, without sending it."""
    if dialect not in DIALECTS:
        raise typer.BadParameter(f"one of {', '.join(DIALECTS)}", param_hint="--dialect")
    if not (model or body):
        raise typer.BadParameter("say which one, or give a --body that does", param_hint="--model")
    config = _config(config_path)
    headers = _headers(header or [])
    session = session or _session(config, headers)
    storage = Storage(config.storage.directory, config.pepper())
    tenants = tenants_of(config, storage)
    caller, problem = _in_team(*_caller(config, storage, key), tenants)
    secret = session_secret(_pepper(storage)) if session and not problem else b""
    exchange = Exchange("explain", DIALECTS[dialect], 0.0, time.time())
    exchange.caller, exchange.tags = caller, caller.tags
    exchange.end_user = f"{caller.tenant}/{user}" if user else ""
    try:
        read_into(exchange, _body(body), headers, model)
    except Refusal as refusal:
        fail(f"{refusal.status} {refusal.code}: {refusal.message}")
    except ValueError as error:
        fail(f"The body is not a JSON object: {error}")
    if max_tokens is not None:
        exchange.max_tokens = max_tokens
    if not body:
        exchange.body_bytes = body_bytes
    if session:
        exchange.session_hash = session_hash(secret, caller, session.encode())
    told: dict[str, Any] = {
        "identify": _identified(caller, problem),
        "read": {"model": exchange.model_name, "dialect": dialect, "has_session": bool(session)},
    }
    if not problem:
        try:
            told |= asyncio.run(explained(config, exchange, LimitsExplained(config, tenants)))
        except StorageError as error:
            fail(str(error))
    if as_json:
        print(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode())
    else:
        _print(told)


def _config(path: Path) -> Config:
    try:
        return load(path, os.environ)
    except ConfigError as error:
        fail(str(error))


def _body(path: str) -> bytes:
    if not path:
        return b""
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        fail(f"The body cannot be read: {path}: {error.strerror or error}")


def _headers(lines: list[str]) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise typer.BadParameter(f"{line!r} is not `name: value`", param_hint="--header")
        headers[name.strip().lower().encode()] = value.strip().encode()
    return headers


def _session(config: Config, headers: dict[bytes, bytes]) -> str:
    found = (headers.get(name.encode()) for name in config.sessions.headers)
    return next((value.decode() for value in found if value), "")


def _caller(config: Config, storage: Storage, key: str) -> tuple[Caller, str | None]:
    """The caller of this key, found by name or id, never by the key; and why the key would be refused."""
    if not key:
        return Caller("", "any key"), None
    now_time = time.time()
    for declared in config.declared_keys():
        if declared.name == key and declared.kind == "caller":
            caller = Caller(
                f"config:{key}", key, declared.team, declared.models, declared.expires_time, declared.tags
            )
            return caller, "expired" if (declared.expires_time or now_time) < now_time else None
    with opened(storage, may_write=False) as connection:
        records = [r for r in key_table.find(connection, key) if r.kind == "caller"]
    if not records:
        fail(f"There is no caller key named {key}: see `headgate keys list`.")
    record = next((r for r in records if r.revoked_time is None), records[-1])
    models = None if record.models is None else frozenset(record.models)
    caller = Caller(record.id, record.name, record.team, models, record.expires_time, record.tags)
    state = state_of(record, now_time)
    return caller, None if state == "active" else state


def _in_team(caller: Caller, problem: str | None, tenants: Tenants) -> tuple[Caller, str | None]:
    team = tenants.teams.get(caller.team)
    if team is None:
        return caller, problem
    return caller_in_team(caller, team), problem or ("blocked" if team.is_blocked else None)


def _identified(caller: Caller, problem: str | None) -> dict[str, Any]:
    return {
        "key": caller.name,
        "team": caller.team,
        "organisation": caller.organisation,
        "models": sorted(["*"] if caller.models is None else caller.models),
        "denied": problem and f"key_{problem}",
        "status": problem and (403 if problem == "blocked" else 401),
    }


def _pepper(storage: Storage) -> bytes:
    """Sessions are hashed with it. One that does not exist yet is not made here."""
    if not storage.pepper:
        try:
            (storage.directory / PEPPER_NAME).stat()
        except OSError as error:
            place = f"the secret in {storage.directory} ({error.strerror})"
            fail(f"Sessions are placed with {place}: start the gateway once, or run this as its user.")
    return pepper_of(storage)


def _print(told: dict[str, Any]) -> None:
    who, read = told["identify"], told["read"]
    team = f" of team {who['team']}" if who["team"] else ""
    team += f" of {who['organisation']}" if who["organisation"] else ""
    if who["denied"]:
        _say("identify", f"{who['key']}{team}: {who['status']} {who['denied']}")
        return
    _say("identify", f"{who['key']}{team}, may use {', '.join(who['models'])}")
    _say(
        "read",
        f"{read['model']} on {read['dialect']}, {'with' if read['has_session'] else 'without'} a session",
    )
    if "rules" in told:
        _print_rules(told["rules"])
        if told["rules"]["denied"]:
            return
    admit = told["admit"]
    if admit["denied"]:
        _say("admit", f"{admit['status']} {admit['denied']}: {admit['message']}")
        _print_limits(admit.get("limits", []))
        return
    _say("admit", "yes")
    _print_limits(admit["limits"])
    if not told["place"]:
        _say("place", f"400 dialect_not_supported: it is served on {', '.join(told['dialects'])}")
        return
    _print_targets(told)
    print()
    print_table(
        _COLUMNS,
        [
            (
                place["endpoint"],
                place["provider"],
                place["upstream_model"],
                price_text(place["price"], place["usd_per_million_tokens"]),
                place["price_source"],
            )
            for place in told["place"]
        ],
    )
    for fallback in told["fallbacks"]:
        passed_over = f" (passed over: {fallback['passed_over']})" if fallback["passed_over"] else ""
        _say("fallback", f"{fallback['model']} for {', '.join(fallback['failures'])}{passed_over}")
    for shadow in told["shadows"]:
        _say("shadow", f"{shadow['percent']:g} % of requests are copied to {shadow['model']}")


def _print_rules(rules: dict[str, Any]) -> None:
    """Each rule that was asked, what it looked at and what became of it."""
    for trial in rules["trace"]:
        condition = f" when {trial['condition']}" if trial["condition"] else ""
        read = ", ".join(f"{name} = {_shown(value)}" for name, value in trial["read"].items())
        _say(
            "rules",
            f"{trial['scope']}: {trial['rule']}{condition}: {trial['outcome']}" + (read and f" ({read})"),
        )
    denied = rules["denied"]
    if denied:
        _say("rules", f"{denied['status']} {denied['denied']}: {denied['message']}")
        return
    for name in rules["fallen_from"]:
        _say("rules", f"{name} cannot take this request: its fallback is next")
    if rules["is_another_model"]:
        _say("rules", f"the model is {rules['model']}")
    edits = rules["edits"]
    if edits["set"] or edits["drop"]:
        changes = [f"{name} = {_shown(value)}" for name, value in edits["set"].items()]
        _say("rules", "the body is changed: " + ", ".join(changes + [f"without {n}" for n in edits["drop"]]))
    if rules["on_full"]:
        _say("rules", f"when every endpoint is full: {rules['on_full']}")
    if rules["priority"] != rules["usual_priority"]:
        _say("rules", f"its priority is {rules['priority']}")
    if rules["tags"]:
        _say("rules", f"tagged {', '.join(rules['tags'])}")


def _print_targets(told: dict[str, Any]) -> None:
    if not told["is_order_known"]:
        _say("place", "always the same one for this session; which one is known when the simulators run")
    else:
        _say("place", _ORDERS[told["ordered_by"]])
    if len(told["targets"]) == 1:
        return
    for number, target in enumerate(told["targets"]):
        share = "" if target["share"] is None else f", {target['share']:.1%} of each {target['split_by']}"
        _say("place", f"{number + 1}. {target['target']}{share}")


def _shown(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def _print_limits(limits: list[dict[str, Any]]) -> None:
    if not limits:
        return
    print()
    rows = [[str(each[column.title] or "") for column in _LIMIT_COLUMNS] for each in limits]
    print_table(_LIMIT_COLUMNS, rows)
    print()


def _say(stage: str, text: str) -> None:
    Console().print(f"[bold]{stage:<9}[/] {escape(text)}", highlight=False, soft_wrap=True)

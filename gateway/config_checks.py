"""What is wrong with a configuration, in sentences that say what to change.

Owns the checks across sections, which run over plain values so that they work beside schema errors, and the
wording of pydantic's errors. Refuses to repeat a value that may be a secret: names and references only.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from backends.registry import KNOWN
from gateway.config_file import Location, Problem

# First parts of paths that the data plane serves itself: a provider of that name could not be reached raw.
RESERVED: Final = frozenset({"v1", "client", "health", "healthz", "livez", "readyz", "metrics", "models"})
_UPSTREAM_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*")
_DEFAULT_PORTS: Final = {"server": 8080, "management": 8081}


def upstream_name(name: str) -> str:
    """A provider's or pool's name: it stands in URLs, in model names before a slash, and in labels."""
    if not _UPSTREAM_NAME.fullmatch(name) or len(name) > 64:
        raise ValueError("a name has small letters, digits, - _ and single dots, up to 64")
    if name in RESERVED:
        raise ValueError(f"the name {name} is taken by a path of the gateway's own")
    return name


def pattern(name: str) -> str:
    """A model's name, or its beginning and a `*`."""
    if "*" in name[:-1]:
        raise ValueError(f'"{name}": a * may stand only at the end')
    return name


def explain(error: ValidationError, root: type[BaseModel], values: dict[str, Any]) -> list[Problem]:
    """pydantic's errors with locations as in the file. The input is never in them."""
    problems: dict[Location, str] = {}
    details = error.errors(include_url=False, include_input=False, include_context=False)
    for detail in details:
        if detail["type"] == "too_short" and any(
            _is_inside(other["loc"], detail["loc"]) for other in details
        ):
            continue  # its items were lost to errors of their own
        location = _as_in_file(detail["loc"], values)
        if detail["type"] == "extra_forbidden":
            message = "unknown key" + _suggestion(str(location[-1]), _fields_at(root, location[:-1]))
        elif detail["type"] == "missing":
            message = "is needed"
        elif detail["type"] == "string_type":
            message = "must be a text; put it in quotes"
        elif detail["type"] == "model_type":
            message = "must be a section of settings, `name: value` each"
        elif detail["type"] == "too_short":
            message = "must not be empty"
        else:
            message = re.sub(r"^[A-Z][a-z]+ should ", "must ", detail["msg"].removeprefix("Value error, "))
            message = message.replace("must be a valid tuple", "must be a list")
        if location in problems and message not in problems[location]:
            message = f"{problems[location]}; or {message}"
        problems[location] = message
    return [Problem(location, message) for location, message in problems.items()]


def reference_problems(values: dict[str, Any]) -> Iterator[Problem]:
    """Names that refer to nothing, or to two things."""
    yield from _type_problems(values)
    yield from _target_problems(values)
    yield from _name_problems(values)
    yield from _key_problems(values)
    yield from _override_problems(values)
    yield from _port_problems(values)
    yield from _credential_problems(values)
    yield from _absence_problems(values)


def below(values: Any, *path: str) -> Iterator[tuple[Location, dict[str, Any]]]:
    """The mappings at a path, `*` standing for every key or index; what is of another shape is passed over."""
    if not path:
        if isinstance(values, dict):
            yield (), values
        return
    first, *rest = path
    if isinstance(values, list) and first == "*":
        children: Iterable[tuple[str | int, Any]] = enumerate(values)
    elif isinstance(values, dict):
        children = values.items() if first == "*" else [(first, values[first])] if first in values else []
    else:
        return
    for key, child in children:
        for location, found in below(child, *rest):
            yield (key, *location), found


def _type_problems(values: dict[str, Any]) -> Iterator[Problem]:
    for location, provider in below(values, "providers", "*"):
        name, kind = str(location[-1]), provider.get("type")
        if name not in KNOWN and kind is None:
            near = difflib.get_close_matches(name, KNOWN, 1)
            hint = f', or did you mean the provider "{near[0]}"?' if near else ""
            message = f"is needed: the known provider that it speaks like, often openai{hint}"
            yield Problem((*location, "type"), message)
        elif name in KNOWN and kind not in (None, name):
            yield Problem(
                (*location, "type"), f"{name} is a known provider; choose another name for another type"
            )


def _target_problems(values: dict[str, Any]) -> Iterator[Problem]:
    pools, providers = _names(values, "pools"), {*_names(values, "providers"), *KNOWN}
    for location, target in below(values, "models", "*", "targets", "*"):
        for kind, known, others in (("pool", pools, providers), ("provider", providers, pools)):
            name = target.get(kind)
            if not isinstance(name, str) or name in known:
                continue
            if name in others:
                other = "provider" if kind == "pool" else "pool"
                yield Problem((*location, kind), f'"{name}" is a {other}; write `{other}: {name}`')
            else:
                yield Problem((*location, kind), f'there is no {kind} "{name}"' + _suggestion(name, known))


def _name_problems(values: dict[str, Any]) -> Iterator[Problem]:
    for name in _names(values, "pools") & {*_names(values, "providers"), *KNOWN}:
        yield Problem(("pools", name), "is also the name of a provider; they share one name space")
    for name in _names(values, "models"):
        if "*" in name or not name.isprintable() or not name.strip() or len(name) > 256:
            yield Problem(("models", name), "a model's name is printable, without *, up to 256 characters")
    taken = dict.fromkeys(_names(values, "models"), "a model")
    for location, model in below(values, "models", "*"):
        aliases = model.get("aliases")
        for index, alias in enumerate(aliases if isinstance(aliases, list) else ()):
            if not isinstance(alias, str):
                continue
            place = (*location, "aliases", index)
            if "*" in alias or not alias.strip():
                yield Problem(place, "an alias is a whole name, without *")
            elif alias in taken:
                yield Problem(place, f'"{alias}" is already {taken[alias]}')
            taken.setdefault(alias, f"an alias of {location[-1]}")


def _key_problems(values: dict[str, Any]) -> Iterator[Problem]:
    entries = [*below(values, "keys", "*"), *below(values, "management", "keys", "*")]
    for field, message in (
        ("name", "another key has this name"),
        ("key", "another entry has the same key"),
    ):
        given = [entry.get(field) for _, entry in entries]
        times = Counter(value for value in given if isinstance(value, str) and value)
        for (location, _), value in zip(entries, given, strict=True):
            if isinstance(value, str) and times[value] > 1:
                yield Problem((*location, field), message)


def _override_problems(values: dict[str, Any]) -> Iterator[Problem]:
    known = {*_names(values, "pools"), *_names(values, "providers"), *KNOWN}
    for location, overrides in below(values, "prices", "overrides"):
        for name in overrides:
            upstream, slash, model = name.partition("/")
            if not slash or not model:
                yield Problem(
                    (*location, name), "is written {provider or pool}/{model}, or {provider or pool}/*"
                )
            elif upstream not in known:
                message = f'there is no provider or pool "{upstream}"' + _suggestion(upstream, known)
                yield Problem((*location, name), message)
            elif "*" in model[:-1]:
                yield Problem((*location, name), "a * may stand only at the end")


def _port_problems(values: dict[str, Any]) -> Iterator[Problem]:
    sections = {name: dict(next(below(values, name), ((), {}))[1]) for name in _DEFAULT_PORTS}
    ports = {name: str(section.get("port", _DEFAULT_PORTS[name])) for name, section in sections.items()}
    hosts = {str(section.get("host", "127.0.0.1")) for section in sections.values()}
    shares_address = len(hosts) == 1 or bool(hosts & {"0.0.0.0", "::"})  # noqa: S104 - only compared here
    if ports["server"] == ports["management"] != "0" and shares_address:
        yield Problem(
            ("management", "port"), f"{ports['management']} is also server.port; the two planes are apart"
        )


def _credential_problems(values: dict[str, Any]) -> Iterator[Problem]:
    """Two keys in one header, which no upstream reads as was meant."""
    for section in ("providers", "pools"):
        for location, upstream in below(values, section, "*"):
            record = KNOWN.get(str(upstream.get("type") or location[-1]))
            auth = upstream.get("auth") or (record.auth if record is not None else "bearer")
            carrier = "authorization" if auth == "bearer" else auth
            headers = upstream.get("headers")
            for name in headers if isinstance(headers, dict) and upstream.get("api_key") else ():
                if isinstance(name, str) and name.lower() == carrier:
                    message = "is the header that api_key is sent in; keep one of the two"
                    yield Problem((*location, "headers", name), message)


def _absence_problems(values: dict[str, Any]) -> Iterator[Problem]:
    """What is asked for here and can do nothing without another section."""
    has_redis = any(True for _ in below(values, "storage", "redis"))
    for location, queue in below(values, "queue"):
        if queue.get("store") == "redis" and not has_redis:
            yield Problem((*location, "store"), "is redis; say where that is, in storage.redis")
    is_anyone_told = any(
        users.get("fields") or users.get("header") for _, users in below(values, "limits", "end_users")
    )
    for location, limit in below(values, "limits", "rules", "*"):
        if str(limit.get("scope")).startswith("user:") and not is_anyone_told:
            message = (
                "counts nobody: limits.end_users.fields or .header must say where requests name their user"
            )
            yield Problem((*location, "scope"), message)


def _names(values: dict[str, Any], section: str) -> set[str]:
    entries = values.get(section)
    return {name for name in entries if isinstance(name, str)} if isinstance(entries, dict) else set()


def _suggestion(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1, 0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; there are {', '.join(known)}" if 0 < len(known) <= 30 else ""


def _as_in_file(location: Iterable[str | int], values: Any) -> Location:
    """Without the parts that pydantic adds for unions and keys, which are not in the file."""
    parts = list(location)
    kept: list[str | int] = []
    for position, part in enumerate(parts):
        if _has(values, part):
            values = values[part]
        elif position < len(parts) - 1 or part == "[key]" or not isinstance(values, dict):
            continue
        kept.append(part)
    return tuple(kept)


def _has(values: Any, part: str | int) -> bool:
    if isinstance(values, list):
        return isinstance(part, int) and part < len(values)
    return isinstance(values, dict) and part in values


def _is_inside(location: tuple[str | int, ...], around: tuple[str | int, ...]) -> bool:
    return len(location) > len(around) and location[: len(around)] == around


def _fields_at(model: Any, location: Location) -> list[str]:
    """The keys that are known at a place of the file."""
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(str(part))
            model = field and inner(field.annotation)
        else:
            arguments = get_args(model)
            model = inner(arguments[-1] if get_origin(model) is dict else arguments[0]) if arguments else None
    if isinstance(model, type) and issubclass(model, BaseModel):
        return list(model.model_fields)
    return []


def inner(annotation: Any) -> Any:
    """A type without its `Annotated` and `| None`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, UnionType):
            members = [member for member in get_args(annotation) if member is not NoneType]
            if len(members) != 1:
                return members[0]
            annotation = members[0]
        else:
            return annotation

"""The reference of the configuration, made from its models: the JSON Schema and docs/configuration.md.

`python -m gateway.config_reference` prints the page. Owns no facts: a test compares the page with its output.
"""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Final, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from backends.config import PoolConfig, UpstreamConfig
from backends.registry import KNOWN
from gateway.config import Config
from gateway.config_checks import inner
from local_engine.config import RESTART
from policies.prices import PriceConfig

SCHEMA_ID: Final = "https://json-schema.org/draft/2020-12/schema"
# `port: "${PORT:-8080}"` is a text to an editor, whatever the setting is.
_FROM_ENVIRONMENT: Final = {"type": "string", "pattern": r"\$\{"}


class Setting(NamedTuple):
    """One key. `path` has `*` for a name of the operator's and `[]` for a place in a list."""

    path: str
    field: FieldInfo
    section: type[BaseModel] | None  # what is below it


def settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[Setting]:
    """All keys, in the order of the file, each section before what is in it."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        annotation = inner(field.annotation)
        suffix = ""
        if get_origin(annotation) is dict:
            annotation, suffix = inner(get_args(annotation)[1]), ".*"
        elif get_origin(annotation) in (tuple, list) and get_args(annotation):
            annotation, suffix = inner(get_args(annotation)[0]), "[]"
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        yield Setting(path, field, section)
        if section is not None:
            yield from settings(section, f"{path}{suffix}.")


def schema() -> dict[str, Any]:
    """JSON Schema for editors; every plain value may also be a text with `${...}` in it."""
    document = Config.model_json_schema(mode="validation")
    document = _allow_placeholders(document)
    return {"$schema": SCHEMA_ID, **document, "title": "Headgate configuration"}


def page() -> str:
    """docs/configuration.md."""
    lines = [_INTRODUCTION, "## Settings", ""]
    for heading, rows in _sections():
        lines += [heading, "", "| key | default | meaning |", "|---|---|---|", *rows, ""]
    lines += ["## Known providers", "", *_provider_table(), ""]
    return "\n".join(lines)


def _sections() -> Iterator[tuple[str, list[str]]]:
    """A heading and its rows for each section of the file."""
    for name in Config.model_fields:
        setting, *inside = (s for s in settings() if s.path == name or re.match(rf"{name}(\.|\[)", s.path))
        shown = [s for s in inside if not re.search(r"(\.price|overrides\.\*)[.\[]", s.path)]
        rows = [
            _row(s, " See [a price](#a-price)." if s.section is PriceConfig else "")
            for s in shown
            if not _is_a_providers_too(s.path)
        ]
        yield f"### `{name}`\n\n{_text(setting.section.__doc__ if setting.section else None)}", rows
    yield f"### A price\n\n{_text(PriceConfig.__doc__)}", list(_price_rows())


def _price_rows() -> Iterator[str]:
    """A tier takes the same prices again: only what it has besides is shown, once."""
    shown = set(PriceConfig.model_fields)
    for setting in settings(PriceConfig):
        outer, _, name = setting.path.rpartition(".")
        if not outer or name not in shown:
            shown.add(name)
            yield _row(setting)


def _is_a_providers_too(path: str) -> bool:
    """A pool's setting that the table of providers explains."""
    top, _, name, *_ = [*path.split("."), "", ""]
    return top == "pools" and name in UpstreamConfig.model_fields and name not in PoolConfig.__annotations__


def _text(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def _row(setting: Setting, more: str = "") -> str:
    field = setting.field
    text = _text(field.description or (setting.section.__doc__ if setting.section else None)) + more
    if field.json_schema_extra == RESTART:
        text += " *Needs a restart.*"
    return f"| `{setting.path}` | {_default(field)} | {text.replace('|', chr(92) + '|')} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    extra = field.json_schema_extra
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(extra, dict) and "default" in extra:
        value = extra["default"]
    if isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value, default=lambda v: float(v) if isinstance(v, Decimal) else str(v))}`"


def _provider_table() -> Iterator[str]:
    yield "| name | key from | base URL (overridden by) | dialects | never sent to it |"
    yield "|---|---|---|---|---|"
    for record in KNOWN.values():
        key = f"`{record.key_env}`" if record.key_env else "needs none"
        url = f"`{record.base_url}`" if record.base_url else "to be given"
        override = f" (`{record.base_url_env}`)" if record.base_url_env else ""
        drops = ", ".join(f"`{name}`" for name in sorted(record.drops)) or "-"
        yield f"| [{record.name}]({record.docs}) | {key} | {url}{override} | {', '.join(record.paths)} | {drops} |"


def _allow_placeholders(node: Any) -> Any:
    if isinstance(node, list):
        return [_allow_placeholders(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _allow_placeholders(value) for key, value in node.items()}
    limited = node.get("type") in ("integer", "number", "boolean") or (
        node.get("type") == "string" and not {"pattern", "enum", "format", "minLength"}.isdisjoint(node)
    )
    if not limited:
        return node
    around = {
        key: node.pop(key) for key in ("title", "description", "default", "x-needs-restart") if key in node
    }
    return {**around, "anyOf": [node, dict(_FROM_ENVIRONMENT)]}


_INTRODUCTION: Final = """\
# Configuration

<!-- Made by `python -m gateway.config_reference` from the models in gateway/config.py; a test compares. -->

One YAML file, `config.yaml` in the working directory unless `--config` says otherwise. The one in the repository
shows every key. `headgate check` tells what is wrong with a file, all at once; `headgate check --schema` prints its
JSON Schema, for editors:

```yaml
# yaml-language-server: $schema=headgate.schema.json
```

- **Environment.** `${VAR}` in a text is replaced by the variable, which must be set; `${VAR:-default}` has a default
  for a variable that is unset or empty; `$${` is a literal `${`. It happens after YAML, so a value never becomes
  structure; numbers and booleans are read from it where one is wanted.
- **Secrets** (`api_key`, `key`, header values, proxies) are never shown: not in errors, logs or `headgate check`.
- **Known providers** (below) are on as soon as their key is in the environment, listed or not; `enabled: false`
  switches one off. A caller reaches a provider's models as `{provider}/{model}`.
- **Unknown keys** are errors. So are references to nothing, the same name twice, and the same key twice.
- **Reload.** A changed file, or SIGHUP, is checked whole and then takes effect without dropping a request; an
  invalid one changes nothing and is logged. Settings marked *Needs a restart* keep their values until then, and so
  do pools of simulators.
- **Fields left out** (`drops`) are hints that do not change the answer. A field that would is sent on, and the
  provider says that it does not know it.
- **Client headers** reach an upstream only by its `forwards` list. `openai-organization` and `openai-project` choose
  who pays, so they are set in `headers`; `idempotency-key` would be shared by all callers of one account.
"""

if __name__ == "__main__":
    print(page(), end="")  # noqa: T201 - its purpose

"""The condition of a rule: a CEL expression, checked and compiled when the configuration is loaded.

Owns what a condition may read, and finds out which of it one reads, so that nothing else of a request is looked at.
An expression is typed: one that is not true or false, or that names what there is not, is refused before it runs.
Language: https://cel.dev (cel-expr-python, the CEL project's own C++ implementation; regular expressions are RE2's,
so no text of a client's makes one slow).
"""

import difflib
import functools
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

# Dynamic where whole and broken numbers are to be compared with each other: CEL itself would refuse `x > 0`.
VARIABLES: Final[Mapping[str, str]] = {
    "model": "string",
    "dialect": "string",
    "stream": "bool",
    "max_tokens": "int",
    "session": "bool",
    "key": "string",
    "team": "string",
    "tags": "list(string)",
    "headers": "map(string, string)",
    "metadata": "map(string, dyn)",
    "body": "map(string, dyn)",
    "input_bytes": "int",
    "input_tokens": "int",
    "turns": "int",
    "tools": "int",
    "complexity": "string",
    "risk": "string",
    "budget_used": "dyn",
    "now": "timestamp",
}
# Held back from conditions: secrets.
_SECRET_HEADERS: Final = frozenset({"authorization", "x-api-key", "api-key", "cookie", "proxy-authorization"})
# Fields that may be megabytes: a condition may ask whether they are there, and `input_tokens`, `turns` and `tools`
# tell their size.
_LARGE_FIELDS: Final = frozenset(
    {"messages", "input", "prompt", "system", "instructions", "tools", "documents", "requests"}
)
_MAX_CHARACTERS: Final = 4000

_TOKEN: Final = re.compile(
    r"""\s+|//[^\n]*
    |(?P<text>[bBrR]{0,2}(?:\"\"\"(?:[^\\]|\\.)*?\"\"\"|'''(?:[^\\]|\\.)*?'''|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'))
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<other>[0-9][0-9A-Za-z.]*|&&|\|\||[=!<>]=|.)""",
    re.VERBOSE | re.DOTALL,
)
_PLAIN_TEXT: Final = re.compile(r"""(["'])([^"'\\]*)\1""")
_PROBLEM: Final = re.compile(r"<input>:(\d+):(\d+): (.*)")
_UNDECLARED: Final = re.compile(r"undeclared reference to '([^']*)'")


class Reads(NamedTuple):
    """What conditions look at. `fields` are read with their values, `asked` only for being there."""

    variables: frozenset[str] = frozenset()
    headers: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()
    asked: frozenset[str] = frozenset()

    def __or__(self, other: "Reads") -> "Reads":
        return Reads(*(mine | theirs for mine, theirs in zip(self, other, strict=True)))


class Condition:
    """`source` is the expression with its blanks evened out: equal ones are equal conditions. `text` is as written."""

    __slots__ = ("_expression", "reads", "source", "text")

    def __init__(self, text: str) -> None:
        """ValueError with a sentence if it is none."""
        if len(text) > _MAX_CHARACTERS:
            raise ValueError(f"a condition may have {_MAX_CHARACTERS} characters")
        tokens = [match for match in _TOKEN.finditer(text) if match.lastgroup]
        self.text = text.strip()
        self.source = " ".join(match[0] for match in tokens)
        self._expression = _compiled(text)
        self.reads = _reads(tokens)

    @property
    def is_constant(self) -> bool:
        """It looks at nothing of the request."""
        return not self.reads.variables

    def value(self, activation: "Activation") -> bool | str:
        """True, false, or why it is neither: something it reads is not in the request. Takes 2 us and never raises."""
        try:
            found = self._expression.eval(activation)
        except RuntimeError:
            return (
                "it takes too many steps"  # CEL counts them: nested loops over a list that a client made long
            )
        value = found.value()
        if value is True or value is False:
            return value
        return (
            _failure(str(value))
            if found.type() == _language().types.ERROR
            else f"it is {value!r:.60}, not a boolean"
        )


Activation = Any
"""What conditions are evaluated over (`cel.Activation`): values that are converted once for all of them."""


def activation(values: dict[str, Any]) -> Activation:
    """Values by the names of VARIABLES. A name that no condition reads may be missing."""
    return _language().environment.Activation(values)


class _Language(NamedTuple):
    environment: Any
    types: Any  # `cel.Type`


@functools.cache
def _language() -> _Language:
    """CEL with our variables: loaded by the first condition, because it takes 6 MB of every worker."""
    from cel_expr_python import cel

    told = cel.Type
    types = {
        "string": told.STRING,
        "bool": told.BOOL,
        "int": told.INT,
        "dyn": told.DYN,
        "timestamp": told.TIMESTAMP,
        "list(string)": told.List(told.STRING),
        "map(string, string)": told.Map(told.STRING, told.STRING),
        "map(string, dyn)": told.Map(told.STRING, told.DYN),
    }
    variables = {name: types[kind] for name, kind in VARIABLES.items()}
    return _Language(cel.NewEnv(variables=variables), told)


def _compiled(text: str) -> Any:
    language = _language()
    try:
        expression = language.environment.compile(text)
    except RuntimeError as error:
        raise ValueError(_explained(str(error), text)) from None
    kind = expression.return_type()
    if kind not in (language.types.BOOL, language.types.DYN):
        raise ValueError(f"is {_article(kind.name())}, not true or false: compare it with something")
    return expression


def _explained(error: str, text: str) -> str:
    found = _PROBLEM.search(error)
    if "recursion limit" in error:
        return "nests too deeply"
    if found is None:
        return f"is not a CEL expression: {error.splitlines()[0].rpartition(': ')[2][:200]}"
    message = found[3].partition(" (in container")[0].partition(" [INVALID_ARGUMENT]")[0]
    undeclared = _UNDECLARED.search(message)
    if undeclared is None:
        return f"is not a CEL expression (line {found[1]}, column {int(found[2])}): {message[:200]}"
    name = undeclared[1]
    is_call = re.search(rf"\b{re.escape(name)}\s*\(", text) is not None
    if is_call:
        return f'there is no function "{name}"'
    near = difflib.get_close_matches(name, VARIABLES, 1, 0.6)
    hint = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(VARIABLES)}"
    return f'there is no variable "{name}" (a field of the request is body.{name}); {hint}'


def _article(kind: str) -> str:
    words = {"INT": "a number", "DOUBLE": "a number", "UINT": "a number", "STRING": "a text"}
    return words.get(kind, f"of type {kind.lower()}")


def _failure(message: str) -> str:
    kind, _, detail = message.partition(": ")
    return "not in the request:" + detail.rpartition(":")[2] if kind == "NOT_FOUND" else detail[:120]


def _reads(tokens: list["re.Match[str]"]) -> Reads:
    variables: set[str] = set()
    found: dict[str, set[str]] = {"headers": set(), "body": set(), "metadata": set()}
    asked: set[str] = set()
    for position, token in enumerate(tokens):
        name = token[0]
        if token["name"] is None or name not in VARIABLES or _text(tokens, position - 1) == ".":
            continue
        variables.add(name)
        if name in ("headers", "body"):
            key, is_asked = _key(tokens, position, name)
            (asked if is_asked and name == "body" else found[name]).add(key)
    for header in found["headers"]:
        if header in _SECRET_HEADERS:
            raise ValueError(f"the header {header} cannot be read here: it is a secret")
        if header != header.lower():
            raise ValueError(f'headers have small letters here: write "{header.lower()}"')
    for field in found["body"] & _LARGE_FIELDS:
        raise ValueError(
            f"body.{field} may be megabytes: has(body.{field}), input_tokens, turns and tools tell of it"
        )
    return Reads(
        frozenset(variables), frozenset(found["headers"]), frozenset(found["body"]), frozenset(asked)
    )


def _key(tokens: list["re.Match[str]"], position: int, name: str) -> tuple[str, bool]:
    """Which member of a map is read there, and whether only its being there is asked for."""
    after = _text(tokens, position + 1)
    if after == "." and position + 2 < len(tokens) and tokens[position + 2]["name"]:
        is_whole = _text(tokens, position + 3) == ")"
        is_has = _text(tokens, position - 2) == "has" and _text(tokens, position - 1) == "("
        return tokens[position + 2][0], is_has and is_whole
    if after == "[" and _text(tokens, position + 3) == "]":
        plain = _PLAIN_TEXT.fullmatch(_text(tokens, position + 2))
        if plain is not None:
            return plain[2], False
    if _text(tokens, position - 1) == "in":
        plain = _PLAIN_TEXT.fullmatch(_text(tokens, position - 2))
        if plain is not None:
            return plain[2], True
    raise ValueError(f"{name} is read by name: {name}.x, {name}['x-y'], has({name}.x) or 'x-y' in {name}")


def _text(tokens: list["re.Match[str]"], position: int) -> str:
    return tokens[position][0] if 0 <= position < len(tokens) else ""

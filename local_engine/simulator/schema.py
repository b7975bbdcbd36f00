"""The smallest JSON value that a JSON Schema allows.

Owns how a schema is satisfied: required members only, first alternatives, shortest strings, numbers nearest zero.
Deterministic, and bounded whatever the schema asks for. What it cannot satisfy it refuses with a sentence, rather
than answer something invalid.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, Final

SHALLOW: Final = 4
MAX_DEPTH: Final = 48
MAX_VALUES: Final = 2_000
MAX_LENGTH: Final = 10_000
_REFUSED: Final = ("not", "if", "dependentRequired", "dependentSchemas", "contains", "$dynamicRef")
_FORMATS: Final = {
    "date-time": "2026-01-01T00:00:00Z",
    "date": "2026-01-01",
    "time": "00:00:00Z",
    "duration": "PT1S",
    "email": "a@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
# Short ones only: a pattern made to backtrack takes time exponential in the length.
_GUESSES: Final = (
    *("text", "a", "A", "0", "", "a-a", "a_a", "A1", "a1", "1.0.0", "#000000", "AAA-000"),
    *(example for example in _FORMATS.values() if len(example) <= 20),
    *(letter * length for length in range(2, 17) for letter in "aA0"),
)


class UnsatisfiableError(ValueError):
    """The schema asks for something the simulator cannot make; the message says what."""


def instance(schema: Any) -> Any:
    """A value valid under `schema`. UnsatisfiableError if there is none, or none that can be found."""
    try:
        return _Maker(schema).value(schema, 0)
    except UnsatisfiableError:
        raise
    except (TypeError, AttributeError, LookupError, ArithmeticError, ValueError) as error:
        raise UnsatisfiableError(f"the schema is malformed: {error}") from error


class _Maker:
    """One schema being satisfied: the document references point into, and how much has been made."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._values = 0

    def value(self, schema: Any, depth: int) -> Any:
        self._values += 1
        if depth > MAX_DEPTH or self._values > MAX_VALUES:
            raise UnsatisfiableError("the schema requires endless nesting, or too many values")
        if schema is True or schema == {}:
            return {}
        if not isinstance(schema, dict):
            raise UnsatisfiableError("a schema must be an object or true")
        for word in _REFUSED:
            if word in schema:
                raise UnsatisfiableError(f"the simulator does not understand the keyword {word!r}")
        if "$ref" in schema:
            return self.value(_merged(self._resolve(schema["$ref"]), schema), depth + 1)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            if not schema["enum"]:
                raise UnsatisfiableError("an enum must list at least one value")
            return schema["enum"][0]
        if "allOf" in schema:
            return self.value(self._all_of(schema), depth + 1)
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return self._any_of(schema, word, depth)
        return self._typed(schema, depth)

    def _typed(self, schema: dict[str, Any], depth: int) -> Any:
        match _type_of(schema):
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, depth)
            case "string":
                return _string(schema)
            case "integer" | "number" as name:
                return _number(schema, is_integer=name == "integer")
            case "boolean":
                return False
            case "null":
                return None
            case other:
                raise UnsatisfiableError(f"{other!r} is not a type of JSON")

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        names = list(schema.get("required", []))
        missing = schema.get("minProperties", 0) - len(names)
        names += [name for name in properties if name not in names][: max(0, missing)]
        if len(names) < schema.get("minProperties", 0):
            raise UnsatisfiableError("minProperties asks for more members than `properties` names")
        extra = schema.get("additionalProperties", True)
        return {name: self.value(properties.get(name, extra), depth + 1) for name in names}

    def _array(self, schema: dict[str, Any], depth: int) -> list[Any]:
        fixed = schema.get("prefixItems", [])
        rest = schema.get("items", True)
        count = min(schema.get("minItems", 0), MAX_VALUES + 1)
        if schema.get("uniqueItems") and count > 1:
            choices = rest.get("enum", []) if isinstance(rest, dict) else []
            if fixed or len(choices) < count:
                raise UnsatisfiableError("uniqueItems with minItems above 1 is only understood for an enum")
            return list(choices[:count])
        schemas = [*fixed[:count], *[rest] * (count - len(fixed))]
        return [self.value(item, depth + 1) for item in schemas]

    def _any_of(self, schema: dict[str, Any], word: str, depth: int) -> Any:
        siblings = {key: value for key, value in schema.items() if key != word}
        problem = UnsatisfiableError(f"{word} is empty")
        options = list(schema[word])
        if depth > SHALLOW:
            # A tree of optional children ends here: references last.
            options.sort(key=lambda option: isinstance(option, dict) and "$ref" in option)
        for option in options:
            try:
                return self.value(_merged(option, siblings), depth + 1)
            except UnsatisfiableError as error:
                problem = error
        raise problem

    def _all_of(self, schema: dict[str, Any]) -> Any:
        merged: Any = {key: value for key, value in schema.items() if key != "allOf"}
        for part in schema["allOf"]:
            has_reference = isinstance(part, dict) and "$ref" in part
            merged = _merged(self._resolve(part["$ref"]) if has_reference else part, merged)
        return merged

    def _resolve(self, reference: str) -> Any:
        if not reference.startswith("#"):
            raise UnsatisfiableError(f"the reference {reference!r} points outside the schema")
        target = self._root
        for part in reference[1:].split("/")[1:]:
            target = target[part.replace("~1", "/").replace("~0", "~")]
        return target


def _type_of(schema: dict[str, Any]) -> Any:
    named = schema.get("type")
    if isinstance(named, list):
        return next((name for name in named if name != "null"), "null")
    if named is not None:
        return named
    if "items" in schema or "prefixItems" in schema:
        return "array"
    if "minimum" in schema or "maximum" in schema:
        return "number"
    if "pattern" in schema or "minLength" in schema:
        return "string"
    return "object"


def _string(schema: dict[str, Any]) -> str:
    shortest = schema.get("minLength", 0)
    longest = schema.get("maxLength", math.inf)
    if shortest > MAX_LENGTH:
        raise UnsatisfiableError(f"minLength is above {MAX_LENGTH}")
    if "pattern" in schema:
        return _matching(schema["pattern"], shortest, longest)
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    text = "text".ljust(shortest, "x")
    return text if len(text) <= longest else text[: int(longest)]


def _matching(pattern: str, shortest: int, longest: float) -> str:
    """Tries a few plausible strings: solving any regular expression is not a simulator's business."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UnsatisfiableError(f"the pattern {pattern!r} is not a regular expression: {error}") from error
    for guess in _GUESSES:
        if shortest <= len(guess) <= longest and expression.search(guess):
            return guess
    raise UnsatisfiableError(f"the simulator finds no string for the pattern {pattern!r}")


def _number(schema: dict[str, Any], *, is_integer: bool) -> float:
    low = schema.get("minimum", -math.inf)
    high = schema.get("maximum", math.inf)
    above = schema.get("exclusiveMinimum", -math.inf)
    below = schema.get("exclusiveMaximum", math.inf)
    step = schema.get("multipleOf", 1 if is_integer else 0)
    if step <= 0 and "multipleOf" in schema:
        raise UnsatisfiableError("multipleOf must be above 0")
    if is_integer and step != int(step):
        raise UnsatisfiableError("multipleOf of an integer must be whole")
    for value in _near(max(low, above), min(high, below), step):
        if low <= value <= high and above < value < below:
            return int(value) if is_integer else value
    raise UnsatisfiableError("the bounds leave no number")


def _near(floor: float, ceiling: float, step: float) -> Iterator[float]:
    """Zero, then the first few numbers inside each bound."""
    yield 0
    for bound, sign in ((floor, 1), (ceiling, -1)):
        if math.isinf(bound):
            continue
        if step:
            first = (math.ceil if sign > 0 else math.floor)(bound / step) * step
            yield from (first, first + sign * step)
        else:
            yield from (bound, (floor + ceiling) / 2, bound + sign)


def _merged(schema: Any, siblings: dict[str, Any]) -> Any:
    """`schema` with the keywords that stood beside the reference or the alternative."""
    beside = {key: value for key, value in siblings.items() if key != "$ref"}
    if not isinstance(schema, dict):
        return beside if schema is True else schema
    merged = {**schema, **beside}
    if "properties" in schema and "properties" in beside:
        merged["properties"] = {**schema["properties"], **beside["properties"]}
    if "required" in schema and "required" in beside:
        merged["required"] = list(dict.fromkeys([*schema["required"], *beside["required"]]))
    return merged

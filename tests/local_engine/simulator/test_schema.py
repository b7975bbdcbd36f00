"""Answers to a JSON schema: valid, or refused with a sentence, and bounded either way."""

from typing import Annotated, Literal, Optional

import jsonschema
import pytest
from annotated_types import Ge, Len, MultipleOf
from pydantic import BaseModel

from local_engine.simulator.schema import UnsatisfiableError, instance


class Leaf(BaseModel):
    kind: Literal["oak", "elm"]
    weight: float
    note: str | None


class Tree(BaseModel):
    name: Annotated[str, Len(6, 9)]
    rings: Annotated[int, Ge(7), MultipleOf(5)]
    leaf: Leaf
    leaves: Annotated[list[Leaf], Len(2)]
    parent: Optional["Tree"]
    tags: dict[str, int] = {}


SATISFIABLE = [
    Tree.model_json_schema(),
    True,
    {},
    {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "boolean"}}, "minProperties": 2},
    {"type": "object", "required": ["x"], "additionalProperties": {"type": "integer"}},
    {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}, "minItems": 3},
    {"type": "array", "uniqueItems": True, "minItems": 2, "items": {"enum": ["a", "b", "c"]}},
    {"type": "integer", "minimum": 5, "multipleOf": 4},
    {"type": "integer", "maximum": -3},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "number", "exclusiveMinimum": 3},
    {"type": "string", "maxLength": 2},
    {"type": "string", "pattern": "^[0-9]{5}$"},
    {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{3}$"},
    {"type": ["null", "string"], "pattern": "^[a-z]+$"},
    {"anyOf": [{"type": "string", "pattern": "^never 1 of the guesses$"}, {"type": "null"}]},
    {"oneOf": [{"const": 4}, {"const": 5}]},
    {
        "allOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"$ref": "#/$defs/b"}],
        "$defs": {"b": {"required": ["b"]}},
    },
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"enum": [{"deep": [1]}]}}},
]


@pytest.mark.parametrize("schema", SATISFIABLE, ids=str)
def test_the_instance_is_valid_under_its_schema(schema):
    jsonschema.validate(instance(schema), schema, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", ["date-time", "date", "email", "ipv4", "ipv6", "uri", "uuid", "hostname"])
def test_formats_are_kept(name):
    schema = {"type": "string", "format": name}
    checker = jsonschema.FormatChecker()
    jsonschema.validate(instance(schema), schema, format_checker=checker)


@pytest.mark.parametrize(
    "schema",
    [
        False,
        5,
        [],
        {"type": "shape"},
        {"enum": []},
        {"not": {"type": "null"}},
        {"type": "object", "required": 5},
        {"type": "object", "required": ["a"], "properties": []},
        {"type": "array", "minItems": 10**9},
        {"type": "array", "minItems": 50, "items": {"$ref": "#"}},
        {"type": "string", "minLength": 10**9},
        {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "^a{40}$"},
        {"type": "string", "pattern": "^(a+)+X$"},
        {"type": "integer", "minimum": "a"},
        {"type": "integer", "minimum": 1.2, "maximum": 1.5},
        {"type": "integer", "multipleOf": 0},
        {"$ref": "#"},
        {"$ref": "#/$defs/none"},
        {"$ref": "https://example.com/schema"},
        {"$ref": 5},
        {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    ],
    ids=str,
)
def test_what_cannot_be_made_is_refused_with_a_sentence(schema):
    with pytest.raises(UnsatisfiableError, match=r"\w+ \w+"):
        instance(schema)

import datetime as dt
import json

import pytest

from backends.dialect import CHAT, RESPONSES
from backends.json_object import read_object
from policies.rules.condition import VARIABLES, Condition, Reads, activation
from policies.rules.facts import MAX_FIELD_BYTES, Facts, RefusedDeclarationError
from tests.support.builders import a_caller, an_exchange

EVERYTHING = Reads(
    frozenset(VARIABLES), frozenset({"x-a", "x-b"}), frozenset({"top_p"}), frozenset({"tools"})
)


def a_request(body: dict | None = None, headers: dict[bytes, bytes] | None = None, **fields):
    raw = json.dumps({"model": "demo", **(body or {})}).encode()
    exchange = an_exchange(document=read_object(raw), body_bytes=len(raw), model_name="demo", **fields)
    exchange.headers = headers or {}
    return exchange


def values(exchange, reads: Reads = EVERYTHING, **facts_of):
    return Facts(reads, **facts_of).values(exchange)


def test_a_bare_request_has_a_value_for_every_variable():
    told = values(a_request(caller=a_caller(team="research")))
    assert set(told) == set(VARIABLES)
    assert told["key"] == "name of k1"
    assert told["team"] == "research"
    assert (told["max_tokens"], told["session"], told["budget_used"], told["risk"]) == (0, False, 0.0, "")
    assert told["now"] == dt.datetime(2023, 11, 14, 22, 13, 20, tzinfo=dt.UTC)
    for name in VARIABLES.keys() - {"headers", "body"}:  # each is of the type that it is declared with
        assert Condition(f"{name} == {name}").value(activation(told)) is True
    assert Condition("'x-a' in headers || 'tools' in body").value(activation(told)) is False


def test_of_headers_and_fields_only_those_that_are_read_are_told():
    told = values(
        a_request(
            {"top_p": 0.5, "temperature": 1, "tools": [{"type": "function"}]}, {b"x-a": b"1", b"x-c": b"2"}
        )
    )
    assert told["headers"] == {"x-a": "1"}
    assert told["body"] == {"top_p": 0.5, "tools": True}
    assert told["tools"] == 1


def test_a_variable_that_no_condition_reads_is_not_looked_for():
    assert values(a_request(), Reads(frozenset({"team"}))) == {"team": ""}


@pytest.mark.parametrize("value", [b'"' + b"x" * MAX_FIELD_BYTES + b'"', b"1e400"], ids=["huge", "no number"])
def test_a_field_that_is_huge_or_no_machine_number_is_not_told(value):
    exchange = a_request()
    exchange.document = read_object(b'{"model":"demo","top_p":' + value + b"}")
    assert values(exchange)["body"] == {}


def test_metadata_of_the_header_lies_over_that_of_the_body():
    told = values(
        a_request(
            {"metadata": {"plan": "free", "user": "u1"}},
            {b"x-headgate-metadata": b'{"plan":"pro","risk":"High"}'},
        )
    )
    assert told["metadata"] == {"plan": "pro", "user": "u1", "risk": "High"}
    assert told["risk"] == "high"


def test_the_risk_of_its_own_header_comes_first():
    headers = {b"x-headgate-risk": b" PII ", b"x-headgate-metadata": b'{"risk":"low"}'}
    assert values(a_request(headers=headers))["risk"] == "pii"


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        (
            {b"x-headgate-metadata": b"[1]"},
            "`x-headgate-metadata` must be a JSON object, as text on one line",
        ),
        (
            {b"x-headgate-metadata": b'{"a":\xff}'},
            "`x-headgate-metadata` must be a JSON object, as text on one line",
        ),
        (
            {b"x-headgate-metadata": b"[" * 5000},
            "`x-headgate-metadata` must be a JSON object, as text on one line",
        ),
        ({b"x-headgate-complexity": b"hard"}, "`x-headgate-complexity` must be one of low, medium, high"),
    ],
)
def test_a_declaration_that_says_nonsense_is_refused(headers, message):
    with pytest.raises(RefusedDeclarationError) as caught:
        values(a_request(headers=headers))
    assert (caught.value.denial.status, caught.value.denial.message) == (400, message)


def test_turns_and_tools_are_counted_in_every_dialect():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert values(a_request({"messages": messages}))["turns"] == 2
    assert values(a_request({"input": messages}, dialect=RESPONSES))["turns"] == 2
    assert values(a_request({"input": "one text"}, dialect=RESPONSES))["turns"] == 1
    assert values(a_request({"messages": None, "tools": None}))["turns"] == 0


def test_what_a_caller_declares_of_complexity_stands_over_the_guess():
    assert values(a_request())["complexity"] == "low"
    assert values(a_request(headers={b"x-headgate-complexity": b"High"}))["complexity"] == "high"


def test_the_budget_is_asked_of_whoever_knows_it():
    assert values(a_request(dialect=CHAT), budget_used=lambda exchange: 0.75)["budget_used"] == 0.75

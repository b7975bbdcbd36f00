import json

import pytest

from backends.adapter import encode
from backends.dialect import CHAT, COMPLETIONS, COUNT_TOKENS, DIALECTS, EMBEDDINGS, MESSAGES, RESPONSES
from backends.json_object import read_object
from policies.rules.params import Params
from tests.support.builders import a_provider, an_endpoint


def edited(body: dict, params: Params, dialect=CHAT, **facts) -> dict:
    document = read_object(json.dumps({"model": "up", **body}).encode())
    sent = encode(
        an_endpoint(provider=a_provider(**facts)),
        dialect,
        b'"up"',
        document,
        is_stream=False,
        edits=params.edits(dialect, document.values),
    )
    fields = json.loads(sent.body)
    del fields["model"]
    return fields


def params(sets=None, caps=None, drops=()) -> Params:
    return Params(sets or {}, caps or {}, frozenset(drops))


async def test_a_field_is_set_whether_or_not_the_request_has_it():
    rule = params({"temperature": 0.2, "service_tier": "flex"})
    assert edited({"temperature": 1}, rule) == {"temperature": 0.2, "service_tier": "flex"}


async def test_every_byte_that_no_rule_speaks_of_survives():
    body = b'{"seed":9007199254740993, "x" : 1.0,"model":"up","top_p":0.5,"messages":[{"content":"\\u00e9"}]}'
    document = read_object(body)
    edits = params({"top_p": 0.1}).edits(CHAT, document.values)
    sent = encode(an_endpoint(), CHAT, b'"up"', document, is_stream=False, edits=edits)
    assert sent.body == (
        b'{"seed":9007199254740993,"x" : 1.0,"model":"up","messages":[{"content":"\\u00e9"}],"top_p":0.1}'
    )


@pytest.mark.parametrize(
    ("dialect", "given", "sent"),
    [
        (CHAT, {"max_tokens": 500}, {"max_tokens": 100}),
        (CHAT, {"max_completion_tokens": 500}, {"max_completion_tokens": 100}),
        (
            CHAT,
            {"max_tokens": 500, "max_completion_tokens": 50},
            {"max_tokens": 100, "max_completion_tokens": 50},
        ),
        (CHAT, {"max_tokens": 99}, {"max_tokens": 99}),
        (CHAT, {"max_tokens": None}, {"max_tokens": 100}),
        (CHAT, {}, {"max_tokens": 100}),
        (COMPLETIONS, {}, {"max_tokens": 100}),
        (RESPONSES, {}, {"max_output_tokens": 100}),
        (RESPONSES, {"max_output_tokens": 1e3}, {"max_output_tokens": 100}),
        (MESSAGES, {"max_tokens": 4096}, {"max_tokens": 100}),
        (EMBEDDINGS, {}, {}),
        (COUNT_TOKENS, {}, {}),
    ],
)
async def test_the_limit_of_the_answer_is_capped_under_the_name_each_dialect_has_for_it(dialect, given, sent):
    assert edited(given, params(caps={"max_tokens": 100}), dialect) == sent


async def test_a_limit_named_as_the_newer_models_want_it_is_set_under_that_name():
    assert edited({}, params(caps={"max_completion_tokens": 7})) == {"max_completion_tokens": 7}


async def test_other_numbers_are_lowered_but_never_made_up():
    rule = params(caps={"n": 2, "top_logprobs": 5})
    assert edited({"n": 8, "top_logprobs": 3}, rule) == {"n": 2, "top_logprobs": 3}
    assert edited({}, rule) == {}
    assert edited({"n": "many"}, rule) == {"n": "many"}  # the upstream says what is wrong with it


async def test_fields_are_left_out_but_never_one_that_the_dialect_must_have():
    rule = params(drops=["logprobs", "max_tokens"])
    assert edited({"logprobs": True, "max_tokens": 5}, rule) == {}
    assert edited({"max_tokens": 5}, rule, MESSAGES) == {"max_tokens": 5}


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
async def test_a_dialect_gets_no_field_it_does_not_know(dialect):
    rule = params(
        {"reasoning_effort": "low", "thinking": {"type": "disabled"}, "min_p": 0.1, "dimensions": 8}
    )
    known = {
        "chat": {"reasoning_effort", "min_p"},
        "completions": {"min_p"},
        "responses": {"min_p"},
        "messages": {"thinking"},
        "embeddings": {"dimensions"},
        "count_tokens": set(),
    }
    assert set(edited({}, rule, dialect)) == known[dialect.name]


async def test_what_the_provider_refuses_is_left_out_whatever_the_rule_says():
    assert edited({}, params({"user": "x", "top_p": 1}), drops=frozenset({"user"})) == {"top_p": 1}


async def test_a_rule_without_effect_on_this_body_edits_nothing():
    document = read_object(b'{"model":"up","max_tokens":5}')
    assert params(caps={"max_tokens": 10}, drops=["logprobs"]).edits(CHAT, document.values) is None


def test_what_may_be_generated_is_known_after_the_edits():
    rule = params(caps={"max_tokens": 100})
    assert rule.max_tokens(CHAT, None) == 100
    assert rule.max_tokens(CHAT, 50) == 50
    assert rule.max_tokens(EMBEDDINGS, None) is None
    assert params().max_tokens(CHAT, 7) == 7

import pytest

from policies.rules.condition import VARIABLES, Condition, activation
from policies.rules.facts import Facts

VALUES = {
    "team": "research",
    "input_tokens": 1200,
    "headers": {"x-risk": "high"},
    "body": {"temperature": 0.5, "tools": True, "reasoning": {"effort": "high"}},
    "metadata": {"plan": "free", "level": 3},
    "tags": ["ci", "nightly"],
    "budget_used": 0.91,
    "stream": True,
}


def value_of(text: str, values: dict = VALUES):
    return Condition(text).value(activation(values))


@pytest.mark.parametrize(
    "text",
    [
        "team == 'research' && input_tokens < 2000",
        "headers['x-risk'] == 'high'",
        "'x-risk' in headers",
        "has(body.tools) && body.temperature < 1",
        "body.reasoning.effort in ['medium', 'high']",
        "metadata.plan == 'free' && metadata.level >= 3",
        "tags.exists(tag, tag == 'nightly')",
        "budget_used > 0.9 && budget_used > 0",
        "team.matches('^re.*h$')",
        "stream",
        "headers['x-nothing'] == 'a' || team == 'research'",
    ],
)
def test_a_condition_that_holds_is_true(text):
    assert value_of(text) is True


@pytest.mark.parametrize(
    "text", ["team == 'other'", "has(body.top_p)", "'x-other' in headers", "!stream", "metadata.level > 3"]
)
def test_a_condition_that_does_not_hold_is_false(text):
    assert value_of(text) is False


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("headers['x-nothing'] != 'a'", 'not in the request: "x-nothing"'),
        ("body.top_p < 1", 'not in the request: "top_p"'),
        ("body.temperature", "it is 0.5, not a boolean"),
        ("metadata.plan > 5", "No matching overloads found : _>_(string, int64)"),
        ("input_tokens / 0 == 1", "divide by zero"),
        ("team.matches(metadata.plan + '(')", "invalid regular expression: missing ): free("),
    ],
)
def test_what_has_no_value_says_why_and_is_not_true(text, why):
    assert value_of(text) == why


def test_loops_over_what_a_client_made_long_end_after_a_number_of_steps():
    text = "body.a.all(x, body.a.all(y, x == y))"
    assert value_of(text, {"body": {"a": [1] * 2000}}) == "it takes too many steps"


def test_a_number_of_a_client_that_no_machine_holds_makes_no_value():
    assert "out of range" in value_of("body.seed > 1", {"body": {"seed": 2**70}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "max_token > 5",
            'there is no variable "max_token" (a field of the request is body.max_token); did you mean "max_tokens"?',
        ),
        (
            "temperature > 1",
            f'there is no variable "temperature" (a field of the request is body.temperature); there are {", ".join(VARIABLES)}',
        ),
        ("shout(team)", 'there is no function "shout"'),
        ("team", "is a text, not true or false: compare it with something"),
        ("input_tokens + 1", "is a number, not true or false: compare it with something"),
        ("tags", "is of type list<string>, not true or false: compare it with something"),
        (
            "headers['x-risk'] == 1",
            "is not a CEL expression (line 1, column 19): found no matching overload for '_==_' applied to '(string, int)'",
        ),
        ("headers['authorization'] == 'x'", "the header authorization cannot be read here: it is a secret"),
        ("headers['X-Risk'] == 'x'", 'headers have small letters here: write "x-risk"'),
        (
            "body.messages == 'x'",
            "body.messages may be megabytes: has(body.messages), input_tokens, turns and tools tell of it",
        ),
        (
            "body[team] == 'x'",
            "body is read by name: body.x, body['x-y'], has(body.x) or 'x-y' in body",
        ),
        ("(" * 100 + "true" + ")" * 100, "nests too deeply"),
        ("x" * 5000, "a condition may have 4000 characters"),
    ],
)
def test_a_condition_that_cannot_work_is_refused_in_a_sentence(text, message):
    with pytest.raises(ValueError) as caught:
        Condition(text)
    assert str(caught.value) == message


def test_only_what_is_read_is_looked_at():
    reads = Condition(
        "headers['x-a'] == '1' && (has(body.tools) || body.temperature > 1 || 'n' in body) && team != 'body.x'"
    ).reads
    assert reads.variables == {"headers", "body", "team"}
    assert reads.headers == {"x-a"}
    assert reads.fields == {"temperature"}
    assert reads.asked == {"tools", "n"}


def test_blanks_and_comments_do_not_make_another_condition():
    assert Condition("team=='a'&&stream").source == Condition("team == 'a'  // who\n && stream").source
    assert Condition("team == 'a b'").source != Condition("team == 'a  b'").source


def test_every_variable_has_a_value_in_every_request():
    assert len(Facts(Condition("team == ''").reads)._plan) == 1
    for name in VARIABLES:
        assert callable(getattr(Facts, f"_read_{name}"))

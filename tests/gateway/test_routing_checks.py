"""What is refused of rules, weights, fallbacks and shadows, and in which words."""

import pytest
import yaml

from gateway.config import ConfigError, load
from policies.rules.fallback import CLASSES

MODELS = """
pools: {demo: {simulator: {replicas: 2}}}
models:
  small: {targets: [{pool: demo, model: demo}], aliases: [mini]}
  large: {targets: [{pool: demo, model: big}, {provider: openai, model: gpt-5}]}
"""


@pytest.fixture
def problems(tmp_path):
    """What is wrong with MODELS and this beside or inside it, without file and line."""

    def told(text: str = "", **models: dict) -> list[str]:
        values = yaml.safe_load(MODELS)
        for name, more in models.items():
            values["models"].setdefault(name, {"targets": [{"pool": "demo"}]}).update(more)
        values |= yaml.safe_load(text) or {}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        try:
            load(path, {})
        except ConfigError as error:
            return [line.partition(": ")[2] for line in error.lines]
        return []

    return told


def rules(*entries: str) -> str:
    return (
        "rules:\n"
        + "".join(f"  - {{name: r{n}, {entry}}}\n" for n, entry in enumerate(entries))
        + "  - name: end"
    )


def test_rules_that_can_work_are_taken(problems):
    assert (
        problems(
            rules(
                "keys: [ci], model: small",
                "teams: [a], model: small",
                "models: [small], when: input_tokens < 100, model: large, target: openai/gpt-5",
                "models: [small], when: input_tokens < 200, model: openai/gpt-5-mini",
                "models: [old-name], model: mini",
                "models: [small]",
                "when: input_tokens < 100, target: demo",
            )
        )
        == []
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("model: smal, models: [small]", 'rules[0].model: there is no model "smal"; did you mean "small"?'),
        (
            "model: other, models: [small]",
            'rules[0].model: there is no model "other"; there are large, mini, small, and {provider}/{model}',
        ),
        (
            "model: acme/x, models: [small]",
            'rules[0].model: there is no model "acme/x"; there are large, mini, small, and {provider}/{model}',
        ),
        (
            "model: large, target: openai/gpt-4, models: [small]",
            'rules[0].target: large has no target "openai/gpt-4"; did you mean "openai/gpt-5"?',
        ),
        (
            "target: nowhere, models: [small, mini]",
            'rules[0].target: none of its models has no target "nowhere"; there are demo, demo/demo',
        ),
        ("models: [smal], tags: [a]", 'rules[0].models[0]: there is no model "smal"; did you mean "small"?'),
        (
            "when: team = 'a'",
            "rules[0].when: is not a CEL expression (line 1, column 6): Syntax error: token recognition error at: '= '",
        ),
        (
            "when: teem == 'a'",
            'rules[0].when: there is no variable "teem" (a field of the request is body.teem); did you mean "team"?',
        ),
        ("when: input_tokens", "rules[0].when: is a number, not true or false: compare it with something"),
        (
            "when: 1 < 2",
            "rules[0].when: looks at nothing of the request; a rule that always matches has no `when`",
        ),
        (
            "models: [small], params: {set: {stream: true}}",
            "rules[0].params.set: stream is not a rule's to change",
        ),
        ("models: [small], params: {set: {x: .inf}}", "rules[0].params.set: x has a value that JSON has not"),
        (
            "models: [small], params: {set: {x: [{y: 2026-01-01}]}}",
            "rules[0].params.set: x has a value that JSON has not",
        ),
        (
            "models: [small], params: {drop: [messages]}",
            "rules[0].params.drop: messages is not a rule's to change",
        ),
        (
            "models: [small], params: {set: {n: 1}, cap: {n: 2}}",
            "rules[0].params: n is named twice: it can be set, capped or dropped",
        ),
        (
            "models: [small], params: {cap: {max_tokens: 5, max_output_tokens: 6}}",
            "rules[0].params: cap: max_tokens and max_output_tokens are names of the same limit; give one",
        ),
        (
            "models: [small], on_full: never",
            "rules[0].on_full: must be 'wait', 'fallback', 'queue' or 'reject'",
        ),
        ("models: [small], modle: large", 'rules[0].modle: unknown key; did you mean "model"?'),
    ],
)
def test_a_rule_that_cannot_work_is_refused_with_what_to_change(problems, rule, message):
    assert problems(rules(rule)) == [message]


def never(later: str, earlier: str, why: str) -> str:
    return f"{later}: can never match: {earlier} comes before it and {why}"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["model: small", "model: large"], [never("rules[1]", "rules[0] (r0)", "always matches")]),
        (
            ["when: team == 'a', model: small", "when: 'team==\"a\"', model: large"],
            [],  # another text: another condition, as far as a check can tell
        ),
        (
            ["when: stream, model: small", "models: [small], when: '(stream)', tags: [a]"],
            [],
        ),
        (
            ["when: stream &&session, model: small", "models: [small], when: stream&& session, tags: [a]"],
            [never("rules[1]", "rules[0] (r0)", "has the same condition")],
        ),
        (["models: [sm*], model: large", "models: [small, small2], model: large"], ["rules[1]"]),
        (["models: [small], model: large", "models: [sm*], model: large"], []),
        (["keys: [a], model: small", "keys: [a, b], model: large"], []),
        (["keys: [a, b], model: small", "keys: [a, b], model: large"], ["rules[1]"]),
        (["keys: [a], model: small", "teams: [a], model: large"], []),
        (["model: small", "keys: [a], model: large"], []),  # the key's rules come first anyway
    ],
)
def test_a_rule_that_another_hides_is_refused(problems, entries, expected):
    always = [e if ": " in e else never(e, "rules[0] (r0)", "always matches") for e in expected]
    found = problems(rules(*entries))
    hides_the_end = [e for e in entries if e == "model: small"]
    always += [never(f"rules[{len(entries)}]", "rules[0] (r0)", "always matches")] if hides_the_end else []
    assert found == always


@pytest.mark.parametrize(
    "last", ["when: stream", "keys: [a]", "teams: [a]", "models: [small]", "models: [small], when: stream"]
)
def test_the_last_rule_must_be_a_default(problems, last):
    text = "the last rule is the default: it has no keys, teams, models and when"
    more = "(with nothing but a name, a request goes to the model it asks for)"
    assert problems(f"rules: [{{name: a, {last}}}]") == [f"rules[0]: {text} {more}"]
    assert problems("rules: [{name: a, model: small}]") == []


def test_two_rules_of_one_name_are_refused(problems):
    text = "rules: [{name: a, when: stream}, {name: a}]"
    assert problems(text) == ["rules[1].name: rules[0] has this name"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            {"small": {"fallbacks": [{"model": "larg"}]}},
            'models.small.fallbacks[0].model: there is no model "larg"; did you mean "large"?',
        ),
        (
            {"small": {"fallbacks": [{"model": "large"}]}, "large": {"fallbacks": [{"model": "mini"}]}},
            "models.large.fallbacks[0].model: a cycle: small -> large -> small",
        ),
        (
            {"small": {"fallbacks": [{"model": "small"}]}},
            "models.small.fallbacks[0].model: a cycle: small -> small",
        ),
        (
            {"small": {"fallbacks": [{"model": "mini"}]}},
            "models.small.fallbacks[0].model: a cycle: small -> small",
        ),
        (
            {"small": {"fallbacks": [{"model": "large", "failures": ["overflow"]}]}},
            f"models.small.fallbacks[0].failures[0]: must be {', '.join(map(repr, CLASSES[:-1]))} or 'budget'",
        ),
        (
            {"small": {"shadows": [{"model": "mini"}]}},
            "models.small.shadows[0].model: is the model itself: its requests would be doubled",
        ),
        (
            {"small": {"shadows": [{"model": "larj"}]}},
            'models.small.shadows[0].model: there is no model "larj"; did you mean "large"?',
        ),
        (
            {"small": {"shadows": [{"model": "large", "percent": 0}]}},
            "models.small.shadows[0].percent: must be greater than 0",
        ),
        (
            {"small": {"targets": [{"pool": "demo", "weight": 0}]}},
            "models.small.targets: all weights are 0: nothing would come first",
        ),
        (
            {"small": {"split_by": "caller"}},
            "models.small.split_by: means nothing without a weight on some target",
        ),
    ],
)
def test_models_that_lead_nowhere_or_in_a_circle_are_refused(problems, models, message):
    assert problems(**models) == [message]


def test_a_circle_of_three_is_told_once(problems):
    middle = {"middle": {"fallbacks": [{"model": "large"}]}}
    circle = {"small": {"fallbacks": [{"model": "middle"}]}, "large": {"fallbacks": [{"model": "small"}]}}
    assert problems(**circle, **middle) == [
        "models.large.fallbacks[0].model: a cycle: small -> middle -> large -> small"
    ]


def test_a_model_that_two_chains_share_is_no_circle(problems):
    assert (
        problems(
            small={"fallbacks": [{"model": "middle"}, {"model": "large"}]},
            middle={"fallbacks": [{"model": "large"}]},
        )
        == []
    )


@pytest.mark.parametrize(
    "value", ["text", "[1, 2]", "{a: b}", "[{name: [1]}]", "[{when: 5}, {models: {}}]", "[[]]"]
)
def test_rules_of_any_other_shape_are_told_by_the_schema_and_crash_nothing(problems, value):
    assert problems(f"rules: {value}")

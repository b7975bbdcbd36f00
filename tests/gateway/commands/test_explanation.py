"""What `headgate explain` tells of rules, shares, fallbacks and shadows."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from backends.registry import KNOWN
from gateway.commands.explain import explain

APP = typer.Typer()
APP.command()(explain)
CONFIG = """
keys:
  - {name: ci, key: caller-key-4fd8a1c6e2, team: platform}
  - {name: narrow, key: caller-key-77aa71b3d0, models: [auto]}
pools:
  own: {endpoints: ["http://a.test:1/v1", "http://b.test:1/v1"]}
  new: {endpoints: ["http://c.test:1/v1"]}
models:
  auto: {targets: [{pool: own, model: m}], price: {input: 1, output: 2}}
  cheap:
    targets: [{pool: own, model: s, weight: 95}, {pool: new, model: s, weight: 5}]
    price: {input: 1, output: 2}
    split_by: caller
    fallbacks: [{model: strong}, {model: auto, failures: [context, budget]}]
    shadows: [{model: strong, percent: 2.5}]
  strong: {targets: [{pool: own, model: l}], price: {input: 1, output: 2}}
rules:
  - {name: ci-nights, keys: [ci], when: "now.getHours() > 24", model: strong}
  - {name: team, teams: [platform], models: [other], model: strong}
  - {name: hard, when: "complexity == 'high' || headers['x-tier'] == 'gold'", model: strong}
  - name: easy
    models: [auto]
    when: body.temperature <= 1 && input_tokens < 100
    model: cheap
    params: {cap: {max_tokens: 64}, set: {top_p: 0.5}, drop: [logprobs]}
    on_full: fallback
    priority: bulk
    tags: [saved]
  - name: default
"""
BODY = {
    "model": "auto",
    "temperature": 0.5,
    "logprobs": True,
    "messages": [{"role": "user", "content": "Hi"}],
}
SNAPSHOT = """\
identify  ci of team platform, may use *
read      auto on chat, without a session
rules     key ci: ci-nights when now.getHours() > 24: false (now = "NOW")
rules     team platform: team: not for this model
rules     everyone: hard when complexity == 'high' || headers['x-tier'] == 'gold': not in the request: "x-tier" (complexity = "low", headers = {})
rules     everyone: easy when body.temperature <= 1 && input_tokens < 100: matched (body = {"temperature":0.5}, input_tokens = 26)
rules     the model is cheap
rules     the body is changed: top_p = 0.5, max_tokens = 64, without logprobs
rules     when every endpoint is full: fallback
rules     its priority is bulk
rules     tagged saved
admit     yes
place     the endpoint of this conversation first, which its first turns tell
place     1. FIRST
place     2. SECOND
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    for record in KNOWN.values():
        for variable in filter(None, (record.key_env, record.base_url_env)):
            monkeypatch.delenv(variable, raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    (tmp_path / "body.json").write_text(json.dumps(BODY))
    return path


@pytest.fixture
def run(config):
    def invoke(*arguments: str, stdin: str | None = None) -> tuple[int, str]:
        result = CliRunner().invoke(APP, ["--config", str(config), *arguments], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.output

    return invoke


@pytest.fixture
def told(run):
    return lambda *arguments, **more: json.loads(run(*arguments, "--json", **more)[1])


def test_the_whole_decision_is_told_in_its_order(run, told, config):
    arguments = ("--body", str(config.parent / "body.json"), "--key", "ci")
    code, text = run(*arguments)
    assert code == 0
    found = told(*arguments)
    shares = {"own/s": "own/s, 95.0% of each caller", "new/s": "new/s, 5.0% of each caller"}
    first, second = (shares[target["target"]] for target in found["targets"])
    now = found["rules"]["trace"][0]["read"]["now"]
    head, _, rest = text.partition("\n\n")
    lines = [
        line if '(now = "' not in line else line.partition("(now")[0] + '(now = "NOW")'
        for line in head.splitlines()
    ]
    assert "\n".join(lines) + "\n" == SNAPSHOT.replace("FIRST", first).replace("SECOND", second)
    assert now.endswith("+00:00")
    assert rest.endswith(
        "fallback  strong for error, overload, rate_limit, timeout\n"
        "fallback  auto for budget, context\n"
        "shadow    2.5 % of requests are copied to strong\n"
    )


def test_programs_get_every_part_of_it(told, config):
    found = told("--body", str(config.parent / "body.json"), "--key", "ci")
    rules = found["rules"]
    assert [trial["outcome"] for trial in rules["trace"]][1:] == [
        "not for this model",
        'not in the request: "x-tier"',
        "matched",
    ]
    assert (rules["followed"], rules["model"], rules["tags"]) == ("easy", "cheap", ["saved"])
    assert rules["edits"] == {"set": {"top_p": 0.5, "max_tokens": 64}, "drop": ["logprobs"]}
    assert found["fallbacks"][0] == {
        "model": "strong",
        "failures": ["error", "overload", "rate_limit", "timeout"],
        "passed_over": None,
    }
    assert found["shadows"] == [{"model": "strong", "percent": 2.5}]
    assert {place["upstream_model"] for place in found["place"]} == {"s"}


def test_headers_decide_as_they_would(told):
    arguments = ("--model", "auto", "--header", "x-tier: gold", "--header", "X-Session-Id: 7")
    assert told(*arguments[:4])["model"] == "strong"
    assert told("--model", "auto", "--header", "X-Headgate-Complexity: HIGH")["model"] == "strong"
    assert told("--model", "auto")["rules"]["followed"] == "default"


def test_a_key_that_may_not_use_a_rules_model_is_told_so(told):
    found = told("--model", "auto", "--key", "narrow", "--header", "x-tier: gold")
    assert found["rules"]["trace"][0]["outcome"] == "this key may not use strong"
    assert (found["rules"]["followed"], found["model"]) == ("default", "auto")


def test_fallbacks_that_this_key_would_not_get_say_why(told, config):
    config.write_text(CONFIG.replace("models: [auto]}", "models: [cheap, auto]}"))
    found = told("--model", "cheap", "--key", "narrow")
    assert [fallback["passed_over"] for fallback in found["fallbacks"]] == [
        "this key may not use strong",
        None,
    ]
    assert [f["passed_over"] for f in told("--model", "cheap", "--dialect", "messages")["fallbacks"]] == [
        None,
        None,
    ]


def test_a_body_comes_from_standard_input_too(told, run):
    assert told("--body", "-", stdin=json.dumps(BODY))["rules"]["followed"] == "easy"
    assert told("--body", "-", "--model", "strong", stdin=json.dumps(BODY))["rules"]["followed"] == "default"
    big = json.dumps(BODY | {"temperature": 2**70})
    assert "out of range" in told("--body", "-", stdin=big)["rules"]["trace"][-2]["outcome"]
    assert run("--body", "-", stdin=big)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["--body", "-"], "[1]", "400 invalid_json: the request body must be a JSON object"),
        (["--body", "-"], "{}", "400 invalid_field: `model` is missing"),
        (["--body", "-", "--model", "x"], "[1]", "The body is not a JSON object"),
        (["--body", "/nowhere/body.json"], None, "The body cannot be read: /nowhere/body.json: No such file"),
    ],
)
def test_a_body_that_is_none_is_a_sentence(run, arguments, stdin, message):
    code, text = run(*arguments, stdin=stdin)
    assert code == 1
    assert f"Error: {message}" in text
    assert run()[0] == 2


def test_a_declaration_that_is_refused_ends_the_story(run, told):
    arguments = ("--model", "auto", "--header", "x-headgate-complexity: huge")
    assert told(*arguments)["rules"]["denied"]["status"] == 400
    assert (
        "400 invalid_declaration: `x-headgate-complexity` must be one of low, medium, high"
        in run(*arguments)[1]
    )
    assert run("--model", "auto", "--header", "no colon")[0] == 2

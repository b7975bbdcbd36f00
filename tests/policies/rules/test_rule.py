import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.json_object import read_object
from policies.exchange import Exchange
from policies.routing import Model
from policies.rules.condition import Condition
from policies.rules.fallback import Fallback, ModelRouting
from policies.rules.params import Params
from policies.rules.rule import Action, Class, Rule, RuleList, Rules, Trial
from policies.rules.split import Split
from policies.verdict import Denial
from tests.support.builders import a_caller, a_model, an_exchange
from tests.support.properties import STEADY

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=20,
)
FIELDS = ("top_p", "tools", "messages", "input", "metadata", "reasoning", "response_format", "risk")
HEADERS = (b"x-headgate-metadata", b"x-headgate-complexity", b"x-headgate-risk", b"x-a")
HOSTILE = (
    "body.top_p > 0.5 && body.top_p.x == 'a'",
    "has(body.tools) && tools > 2",
    "metadata.a.b == 'c' || metadata.all(k, k != '')",
    "headers['x-a'].matches('^(a+)+$')",
    "complexity == 'high' && risk == 'pii' && turns > 1",
    "body.reasoning.effort in ['high'] && input_tokens > 1",
)


def a_rule(name: str, when: str | None = None, models: set[str] | None = None, **action) -> Rule:
    return Rule(
        name,
        Action(**action),
        None if models is None else frozenset(models),
        None if when is None else Condition(when),
    )


def the_rules(
    *everyone: Rule, key: tuple[Rule, ...] = (), team: tuple[Rule, ...] = (), budget_used=None
) -> Rules:
    return Rules(
        {"name of k1": RuleList("key", key, budget_used)},
        {"research": RuleList("team", team, budget_used)},
        RuleList("everyone", everyone, budget_used),
        budget_used,
        {},
    )


def a_request(model: Model | None, body: dict | None = None, headers=None, **fields) -> Exchange:
    raw = json.dumps({"model": "demo", **(body or {})}).encode()
    fields = {"model_name": model.name if model else "nothing", "body_bytes": len(raw), **fields}
    exchange = an_exchange(model=model, document=read_object(raw), **fields)
    exchange.headers = headers or {}
    return exchange


def routed(rules: Rules, exchange: Exchange) -> str:
    assert rules.admit(exchange, 0.0) is None
    return exchange.model.name if exchange.model is not None else ""


async def test_the_first_rule_that_matches_is_followed():
    small, large = a_model("small"), a_model("large")
    rules = the_rules(
        a_rule("short", "input_tokens < 100", model=small),
        a_rule("long", "input_tokens >= 100", model=large),
        a_rule("default"),
    )
    assert routed(rules, a_request(a_model("demo"))) == "small"
    assert routed(rules, a_request(a_model("demo"), {"messages": "x" * 500})) == "large"


async def test_rules_of_the_key_come_before_those_of_the_team_and_of_everyone():
    key, team, all_ = (a_rule(name, model=a_model(name)) for name in ("key", "team", "all"))
    member = a_caller(team="research")
    assert routed(the_rules(all_, key=(key,), team=(team,)), a_request(a_model(), caller=member)) == "key"
    assert routed(the_rules(all_, team=(team,)), a_request(a_model(), caller=member)) == "team"
    assert routed(the_rules(all_, team=(team,)), a_request(a_model(), caller=a_caller())) == "all"
    off = a_rule("off", "team == 'other'", model=a_model("off"))
    assert routed(the_rules(all_, key=(off,), team=(team,)), a_request(a_model(), caller=member)) == "team"


async def test_without_a_match_a_request_goes_where_it_asked():
    rules = the_rules(a_rule("other", "team == 'other'", model=a_model("other")))
    assert routed(rules, a_request(a_model("demo"))) == "demo"


async def test_a_rule_is_for_the_models_it_names():
    rules = the_rules(a_rule("r", models={"demo", "open*"}, model=a_model("other")))
    assert routed(rules, a_request(a_model("demo"))) == "other"
    assert routed(rules, a_request(a_model("openai/x"))) == "other"
    assert routed(rules, a_request(a_model("demo2"))) == "demo2"


async def test_a_rule_may_give_a_name_that_nobody_serves_a_meaning():
    rules = the_rules(a_rule("r", models={"nothing"}, model=a_model("demo")))
    assert routed(rules, a_request(None)) == "demo"
    assert routed(the_rules(a_rule("default")), a_request(None)) == ""


async def test_no_rule_gives_a_caller_a_model_that_its_key_may_not_use():
    rules = the_rules(
        a_rule("r", model=a_model("large")), a_rule("s", model=a_model("small")), a_rule("default")
    )
    restricted = a_caller(models=frozenset({"demo", "small"}))
    assert routed(rules, a_request(a_model("demo"), caller=restricted)) == "small"
    only = a_caller(models=frozenset({"demo"}))
    assert routed(rules, a_request(a_model("demo"), caller=only)) == "demo"


async def test_a_rule_that_grants_gives_its_model_to_every_caller():
    rules = the_rules(a_rule("r", model=a_model("large"), grants=True))
    assert routed(rules, a_request(a_model("demo"), caller=a_caller(models=frozenset({"demo"})))) == "large"


async def test_a_rule_chooses_among_the_targets_of_its_model():
    model = a_model("demo", fallback_endpoints=1)
    for target in ("spare", "spare/demo"):
        exchange = a_request(model)
        routed(the_rules(a_rule("r", target=target)), exchange)
        assert exchange.targets == (model.targets[1],)
    exchange = a_request(model)
    routed(the_rules(a_rule("r", target="other"), a_rule("default")), exchange)
    assert exchange.targets is None


async def test_what_a_rule_says_besides_reaches_the_request():
    exchange = a_request(a_model(), {"max_tokens": 900}, max_tokens=900, tags=("mine",))
    params = Params({"temperature": 0}, {"max_tokens": 100}, frozenset())
    routed(the_rules(a_rule("r", params=params, on_full="reject", tags=("cheap",))), exchange)
    assert exchange.edits.sets == {"temperature": b'"temperature":0', "max_tokens": b'"max_tokens":100'}
    assert (exchange.max_tokens, exchange.on_full, exchange.tags) == (100, "reject", ("mine", "cheap"))


async def test_what_the_client_says_of_a_full_pool_stands():
    exchange = a_request(a_model(), on_full="wait")
    routed(the_rules(a_rule("r", on_full="reject")), exchange)
    assert exchange.on_full == "wait"


@pytest.mark.parametrize(
    ("asked", "key", "rule", "found"),
    [(None, 2, 3, 3), (None, 2, 1, 1), ("bulk", 3, 1, 3), ("default", 2, 3, 3)],
)
async def test_a_rule_sets_the_class_and_a_client_may_ask_for_a_lower_one(asked, key, rule, found):
    headers = {} if asked is None else {b"x-headgate-priority": asked.encode()}
    exchange = a_request(a_model(), headers=headers, priority=key)
    routed(the_rules(a_rule("r", priority=Class(rule, 0.5))), exchange)
    assert exchange.priority == found
    assert exchange.ceiling == (0.5 if found == rule else 1.0)


@pytest.mark.parametrize("session", [1, 2, 3])
async def test_a_model_with_weights_is_shared_out_by_session(session):
    model = a_model("demo", fallback_endpoints=1)
    model.routing = ModelRouting(split=Split(model.targets, [1, 1], "session"))
    drawn = set()
    for n in range(20):
        exchange = a_request(model, session_hash=session, request_id=f"req_{n}")
        routed(the_rules(), exchange)
        drawn.add(exchange.targets)
    assert len(drawn) == 1


async def test_requests_without_a_named_session_stay_with_their_conversation():
    model = a_model("demo", fallback_endpoints=1)
    model.routing = ModelRouting(split=Split(model.targets, [1, 1], "session"))
    firsts = set()
    for talk in range(40):
        turns = [{"role": "user", "content": f"talk {talk}"}]
        drawn = set()
        for n in range(3):
            exchange = a_request(model, {"messages": turns}, request_id=f"req_{talk}_{n}")
            routed(the_rules(), exchange)
            drawn.add(exchange.targets[0])
            turns = [*turns, {"role": "assistant", "content": "yes"}, {"role": "user", "content": str(n)}]
        assert len(drawn) == 1
        firsts |= drawn
    assert firsts == set(model.targets)


async def test_a_canary_by_caller_keeps_each_key_on_one_side():
    model = a_model("demo", fallback_endpoints=1)
    model.routing = ModelRouting(split=Split(model.targets, [1, 1], "caller"))
    sides = {}
    for n in range(200):
        caller = a_caller(f"k{n % 20}")
        exchange = a_request(model, caller=caller, session_hash=n + 1)
        routed(the_rules(), exchange)
        assert sides.setdefault(caller.key_id, exchange.targets) == exchange.targets
    assert len(set(sides.values())) == 2


async def test_a_target_that_a_rule_chose_is_not_shared_out():
    model = a_model("demo", fallback_endpoints=1)
    model.routing = ModelRouting(split=Split(model.targets, [1, 0], "session"))
    exchange = a_request(model)
    routed(the_rules(a_rule("r", target="spare")), exchange)
    assert exchange.targets == (model.targets[1],)


async def test_a_caller_whose_budget_is_used_up_falls_back_before_anything_is_sent():
    model, free = a_model("demo"), a_model("free")
    model.routing = ModelRouting(fallbacks=(Fallback(free, frozenset({"budget"})),))
    assert routed(the_rules(budget_used=lambda exchange: 1.0), a_request(model)) == "free"
    assert routed(the_rules(budget_used=lambda exchange: 0.99), a_request(model)) == "demo"
    assert routed(the_rules(), a_request(model)) == "demo"


async def test_a_prompt_beyond_the_window_falls_back_until_it_fits():
    small, middle, large = a_model("small"), a_model("middle"), a_model("large")
    on = frozenset({"context"})
    small.routing = ModelRouting(fallbacks=(Fallback(middle, on),), context_tokens=100)
    middle.routing = ModelRouting(fallbacks=(Fallback(large, on),), context_tokens=1000)
    rules = the_rules()
    assert routed(rules, a_request(small, body_bytes=403)) == "small"
    assert routed(rules, a_request(small, body_bytes=404)) == "middle"
    assert routed(rules, a_request(small, body_bytes=3000)) == "middle"
    assert routed(rules, a_request(small, body_bytes=50_000)) == "large"


async def test_adaptive_routing_by_declared_complexity_and_risk():
    local, cheap, strong = a_model("local"), a_model("cheap"), a_model("strong")
    rules = the_rules(
        a_rule("sensitive", "risk in ['pii', 'high']", model=local),
        a_rule("hard", "complexity == 'high' || metadata.stakes == 'high'", model=strong),
        a_rule("easy", "complexity == 'low'", model=cheap),
        a_rule("default", model=strong),
    )

    def ask(**declared: str) -> str:
        headers = {f"x-headgate-{name}".encode(): value.encode() for name, value in declared.items()}
        return routed(rules, a_request(a_model("auto"), headers=headers))

    assert ask(risk="pii", complexity="high") == "local"
    assert ask(complexity="high") == "strong"
    assert ask(complexity="low") == "cheap"
    assert ask(complexity="medium") == "strong"
    assert ask(complexity="low", metadata='{"stakes":"high"}') == "strong"


async def test_a_declaration_that_cannot_be_read_is_refused_where_a_rule_reads_it():
    rules = the_rules(a_rule("r", "complexity == 'high'", model=a_model("x")))
    exchange = a_request(a_model(), headers={b"x-headgate-complexity": b"huge"})
    assert rules.admit(exchange, 0.0).code == "invalid_declaration"
    assert the_rules(a_rule("default")).admit(exchange, 0.0) is None


async def test_a_passthrough_request_goes_where_its_path_says():
    exchange = an_exchange(model=a_model("openai/*"))
    assert the_rules(a_rule("r", model=a_model("other"))).admit(exchange, 0.0) is None
    assert exchange.model.name == "openai/*"


async def test_a_trace_tells_what_became_of_each_rule_and_what_it_looked_at():
    trace: list[Trial] = []
    rules = the_rules(
        a_rule("b", "team == 'x' || input_tokens > 5", models={"demo"}, model=a_model("large")),
        a_rule("c", "body.top_p > 0.5", model=a_model("small")),
        a_rule("d", models={"other"}),
        a_rule("e", "stream == false"),
        a_rule("f"),
        key=(a_rule("a", "team == 'y'"),),
    )
    caller = a_caller(models=frozenset({"demo"}), team="x")
    assert rules.route(a_request(a_model(), caller=caller), trace) is None
    read = {"input_tokens": 4, "stream": False, "team": "x", "body": {}}

    def of(*names: str):
        return {name: read[name] for name in names}

    assert [tuple(trial) for trial in trace] == [
        ("key", "a", "team == 'y'", "false", of("team")),
        (
            "everyone",
            "b",
            "team == 'x' || input_tokens > 5",
            "this key may not use large",
            of("input_tokens", "team"),
        ),
        ("everyone", "c", "body.top_p > 0.5", 'not in the request: "top_p"', of("body")),
        ("everyone", "d", "", "not for this model", {}),
        ("everyone", "e", "stream == false", "matched", of("stream")),
    ]


async def test_matches_and_conditions_without_a_value_are_counted():
    counts: dict[tuple[str, str], int] = {}
    everyone = RuleList("everyone", [a_rule("a", "body.top_p > 1"), a_rule("default")])
    rules = Rules({}, {}, everyone, None, counts)
    for _ in range(3):
        routed(rules, a_request(a_model()))
    assert counts == {("a", "no_value"): 3, ("default", "matched"): 3}


@STEADY
@given(
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5),
    st.dictionaries(
        st.sampled_from(HEADERS),
        st.binary(max_size=40) | JSON.map(lambda v: json.dumps(v).encode()),
        max_size=3,
    ),
)
async def test_nothing_that_a_client_sends_makes_a_rule_fail(body, headers):
    rules = the_rules(*(a_rule(f"r{n}", when) for n, when in enumerate(HOSTILE)), a_rule("default"))
    exchange = a_request(a_model(), body, headers)
    denial = rules.admit(exchange, 0.0)
    assert denial is None or (isinstance(denial, Denial) and denial.status == 400)

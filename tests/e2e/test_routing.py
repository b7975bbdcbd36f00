"""Rules, shares, fallbacks and shadows in the real gateway, in front of scripted upstreams."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import UPSTREAM_KEY
from tests.support.gateway_process import KEY, Gateway
from tests.support.upstream_thread import Answer, BlockingUpstream, Record, UpstreamThread

pytestmark = pytest.mark.e2e

CI_KEY = "sk-ci-7a6b5c4d3e2f1a0b"
NARROW_KEY = "sk-narrow-9f8e7d6c5b4a3f2e"
PRICE = {"input": 1, "output": 2}
OVERFLOW = {
    "error": {
        "message": "This model's maximum context length is 8192 tokens.",
        "code": "context_length_exceeded",
    }
}
# One account for each kind of trouble: what one endpoint is left alone for must not touch another test.
ACCOUNTS = (
    "sick",
    "broken",
    "limited",
    "stuck",
    "small",
    "gone",
    "busy",
    "locked",
    "chained",
    "plain",
    "spare",
    "canary",
)


@pytest.fixture(scope="module")
def main() -> Iterator[BlockingUpstream]:
    with UpstreamThread() as thread:
        yield thread.start()


@pytest.fixture(scope="module")
def gateway(main: BlockingUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Gateway(tmp_path_factory.mktemp("routing"), **config(f"{main.url}/v1")) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-8000:]


@pytest.fixture(autouse=True)
def _forget(main: BlockingUpstream) -> None:
    main.clear()


def config(url: str) -> dict[str, Any]:
    account = {"type": "openai", "api_key": UPSTREAM_KEY, "base_url": url}
    slow = {"deadlines": {"first_byte_s": 0.3}}
    safe = {"model": "safe", "failures": ["error", "timeout", "rate_limit", "overload"]}
    return {
        "keys": [
            {"name": "ci", "key": CI_KEY, "team": "platform"},
            {"name": "narrow", "key": NARROW_KEY, "models": ["broken", "auto", "secretive", "talk"]},
        ],
        "overload": {"default": {"wait_s": 0.3}},
        "pools": {"tiny": {"endpoints": [url], "placement": {"max_in_flight": 1}}},
        "providers": {name: account | (slow if name == "stuck" else {}) for name in ACCOUNTS},
        "models": {
            **{name: target(name, fallbacks=[safe]) for name in ACCOUNTS[:8] if name != "small"},
            "small": target("small", fallbacks=[{"model": "large", "failures": ["context"]}]),
            "chained": target("chained", fallbacks=[{"model": "broken"}]),
            "full": {"targets": [{"pool": "tiny"}], "price": PRICE, "fallbacks": [{"model": "safe"}]},
            "safe": target("spare"),
            "large": target("spare", model="large"),
            "secretive": target("plain", fallbacks=[{"model": "safe", "grants": True}]),
            "auto": target("plain", model="auto"),
            "cheap": target("plain", model="cheap"),
            "strong": target("plain", model="strong"),
            "local": target("plain", model="local"),
            "talk": {
                "targets": [
                    {"provider": "plain", "model": "stable", "weight": 80},
                    {"provider": "canary", "model": "new", "weight": 20},
                ],
                "price": PRICE,
            },
            "watched": target("plain", shadows=[{"model": "copy", "max_in_flight": 2}]),
            "copy": target("canary", model="copy"),
        },
        "rules": [
            {"name": "ci-is-cheap", "keys": ["ci"], "models": ["auto"], "when": "!stream", "model": "cheap"},
            {"name": "team", "teams": ["platform"], "models": ["talk"], "target": "canary"},
            {"name": "private", "when": "risk in ['pii', 'high']", "model": "local", "grants": True},
            {"name": "hard", "models": ["auto"], "when": "complexity == 'high'", "model": "strong"},
            {
                "name": "easy",
                "models": ["auto"],
                "when": "complexity == 'low' && body.temperature <= 1",
                "model": "cheap",
                "grants": True,
                "params": {"set": {"service_tier": "flex"}, "cap": {"max_tokens": 64}, "drop": ["logprobs"]},
                "tags": ["saved"],
            },
            {"name": "default"},
        ],
        "prices": {"overrides": {f"{name}/*": PRICE for name in ACCOUNTS}},
    }


def target(provider: str, *, model: str = "", **more: Any) -> dict[str, Any]:
    return {"targets": [{"provider": provider, "model": model or provider}], "price": PRICE, **more}


def ask(
    gateway: Gateway, model: str, *, key: str = KEY, headers: dict[str, str] | None = None, **fields: Any
):
    """(status, headers by lower-case name, body) of a chat completion."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], **fields}
    sent = {"authorization": f"Bearer {key}"} | (headers or {})
    status, answered, content = gateway.post("/v1/chat/completions", body, sent)
    return status, {name.lower(): value for name, value in answered.items()}, content


def sent(main: BlockingUpstream) -> list[Record]:
    """Without the probes of the pool."""
    return [record for record in main.journal if record.method == "POST"]


def sent_models(main: BlockingUpstream) -> list[str]:
    return [record.model for record in sent(main)]


def wait_for(main: BlockingUpstream, count: int) -> None:
    wait_until(lambda: len(sent(main)) >= count)


@pytest.mark.parametrize(
    ("model", "answer"),
    [
        ("broken", Answer.of_error(500)),
        ("limited", Answer.of_error(429)),
        ("stuck", Answer.of_json({}).hang_before_head()),
        ("gone", Answer.of_json({}).reset_before_head()),
        ("busy", Answer.of_error(503)),
        ("locked", Answer.of_error(401)),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_is_answered_for_by_its_fallback(gateway, main, model, answer, stream):
    main.script("chat", answer, model=model)
    status, headers, content = ask(gateway, model, stream=stream)
    assert status == 200
    assert (headers["x-headgate-model"], headers["x-headgate-target"]) == ("safe", "spare")
    assert int(headers["x-headgate-attempts"]) >= 1
    assert sent(main)[-1].model == "spare"
    assert (b"data: [DONE]" in content) == stream
    row = gateway.row(headers["x-request-id"])
    assert (row["requested_model"], row["target"], row["endpoint"], row["ended"]) == (
        model,
        "spare",
        "spare",
        "completed",
    )
    assert row["cost_nanousd"] > 0


def test_a_prompt_that_does_not_fit_goes_to_the_larger_model(gateway, main):
    main.script("chat", Answer.of_json(OVERFLOW, 400), model="small")
    status, headers, _ = ask(gateway, "small")
    assert (status, headers["x-headgate-model"], headers["x-headgate-attempts"]) == (200, "large", "2")
    assert sent_models(main) == ["small", "large"]


def test_any_other_refusal_reaches_the_client_as_the_upstream_wrote_it(gateway, main):
    refusal = {"error": {"message": "temperature must be at most 2", "code": "invalid_value"}}
    main.script("chat", Answer.of_json(refusal, 400), model="small")
    status, headers, content = ask(gateway, "small")
    assert (status, json.loads(content), headers["x-headgate-model"]) == (400, refusal, "small")
    assert sent_models(main) == ["small"]


def test_a_chain_goes_on_until_a_model_answers(gateway, main):
    for model in ("chained", "broken"):
        main.script("chat", Answer.of_error(500), model=model)
    status, headers, _ = ask(gateway, "chained")
    assert (status, headers["x-headgate-model"]) == (200, "safe")
    assert list(dict.fromkeys(sent_models(main))) in (["chained", "broken", "spare"], ["chained", "spare"])


def test_a_model_that_is_known_to_be_down_is_not_asked_again_by_every_request(gateway, main):
    main.script("chat", Answer.of_error(500), model="sick")
    attempts = []
    for _ in range(30):
        status, headers, _ = ask(gateway, "sick")
        assert (status, headers["x-headgate-model"]) == (200, "safe")
        attempts.append(int(headers["x-headgate-attempts"]))
    assert attempts[0] == 2
    assert attempts.count(1) >= 15
    assert sent_models(main).count("sick") <= 15


def test_a_model_that_is_full_falls_back_after_the_wait_or_at_once_if_the_client_says_so(gateway, main):
    gate = main.gate()
    main.script("chat", Answer.of_json({"id": "x"}).gate_after(0, gate), model="full")
    with ThreadPoolExecutor(1) as thread:
        holding = thread.submit(ask, gateway, "full")
        try:
            wait_for(main, 1)
            for more in ({}, {"x-headgate-on-full": "fallback"}):
                status, headers, _ = ask(gateway, "full", headers=more)
                assert (status, headers["x-headgate-model"], headers["x-headgate-attempts"]) == (
                    200,
                    "safe",
                    "1",
                )
            for word, refusal in (("reject", 429), ("wait", 503)):
                assert ask(gateway, "full", headers={"x-headgate-on-full": word})[0] == refusal
        finally:
            gate.set()
        assert holding.result()[0] == 200
    counted = gateway.metrics()
    assert counted['headgate_fallbacks_total{failure="overload",model="full",to="safe"}'] >= 2


def test_when_no_model_is_left_the_client_gets_the_last_failure(gateway, main):
    main.script("chat", Answer.of_error(500))
    status, headers, _ = ask(gateway, "chained")
    assert status == 500
    assert headers["x-headgate-model"] == "safe"


def test_a_caller_never_falls_to_a_model_that_its_key_may_not_use(gateway, main):
    main.script("chat", Answer.of_error(500), model="broken")
    status, headers, _ = ask(gateway, "broken", key=NARROW_KEY)
    assert (status, headers["x-headgate-model"]) == (500, "broken")
    assert set(sent_models(main)) == {"broken"}
    main.script("chat", Answer.of_error(500), model="plain")
    status, headers, _ = ask(gateway, "secretive", key=NARROW_KEY)
    assert (status, headers["x-headgate-model"]) == (200, "safe")  # that fallback grants it


@pytest.mark.parametrize(
    ("declared", "key", "model"),
    [
        ({"x-headgate-risk": "PII", "x-headgate-complexity": "high"}, KEY, "local"),
        ({"x-headgate-metadata": '{"risk":"high"}'}, NARROW_KEY, "local"),
        ({"x-headgate-complexity": "high"}, KEY, "strong"),
        (
            {"x-headgate-complexity": "high"},
            NARROW_KEY,
            "auto",
        ),  # may not use it: the next rule, then as asked
        ({"x-headgate-complexity": "low"}, KEY, "cheap"),
        ({}, KEY, "cheap"),
        ({"x-headgate-complexity": "medium"}, KEY, "auto"),
        ({"x-headgate-complexity": "high"}, CI_KEY, "cheap"),
    ],
)
def test_work_goes_where_its_declared_complexity_and_risk_send_it(gateway, main, declared, key, model):
    status, headers, _ = ask(gateway, "auto", key=key, headers=declared, temperature=0.5)
    assert (status, headers["x-headgate-model"]) == (200, model)
    assert sent(main)[-1].model == model
    assert not any(name.lower().startswith("x-headgate") for name, _ in sent(main)[-1].headers)


def test_a_rule_changes_the_body_by_key_and_tags_the_row(gateway, main):
    status, headers, _ = ask(gateway, "auto", temperature=0.5, logprobs=True, max_tokens=500, seed=2**53 + 1)
    assert status == 200
    assert sent(main)[-1].fields == {
        "model": "cheap",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0.5,
        "max_tokens": 64,
        "seed": 2**53 + 1,
        "service_tier": "flex",
    }
    row = gateway.row(headers["x-request-id"])
    assert (json.loads(row["tags"]), row["requested_model"]) == (["saved"], "auto")


def test_a_condition_over_what_a_request_does_not_have_does_not_match(gateway, main):
    assert ask(gateway, "auto")[1]["x-headgate-model"] == "auto"
    assert gateway.metrics()['headgate_rule_outcomes_total{outcome="no_value",rule="easy"}'] >= 1


def test_nonsense_in_a_declaration_is_refused_with_what_is_wanted(gateway):
    status, _, content = ask(gateway, "auto", headers={"x-headgate-complexity": "huge"})
    assert status == 400
    assert (
        json.loads(content)["error"]["message"] == "`x-headgate-complexity` must be one of low, medium, high"
    )


def test_a_rule_of_the_team_comes_before_the_shares(gateway, main):
    for _ in range(5):
        assert ask(gateway, "talk", key=CI_KEY)[1]["x-headgate-target"] == "canary"


def test_a_canary_gets_its_share_and_sessions_stay_on_their_side(gateway, main):
    def side(number: int) -> str:
        return ask(gateway, "talk", headers={"x-session-id": f"s{number % 150}"})[1]["x-headgate-target"]

    with ThreadPoolExecutor(4) as threads:
        sides = list(threads.map(side, range(300)))
    assert sides[:150] == sides[150:]
    assert 10 <= sides[:150].count("canary") <= 55  # 20 % of 150 sessions, four deviations either way


def test_a_shadow_gets_a_copy_whose_answer_nobody_sees_and_no_caller_pays(gateway, main):
    before = gateway.metrics().get('headgate_shadow_requests_total{ended="completed",model="copy"}', 0)
    main.script("chat", Answer.of_json({"secret": "of the shadow"}), model="copy")
    status, headers, content = ask(gateway, "watched", key=CI_KEY, temperature=0.25)
    assert status == 200
    assert b"secret" not in content
    row = gateway.row(f"{headers['x-request-id']}-s0")
    assert (row["key_name"], row["team"], row["target"], row["ended"]) == (
        "shadow",
        "",
        "canary",
        "completed",
    )
    assert json.loads(row["tags"]) == ["shadow", headers["x-request-id"]]
    assert [record.fields["temperature"] for record in sent(main)] == [0.25, 0.25]
    assert gateway.row(headers["x-request-id"])["key_name"] == "ci"
    wait_until(
        lambda: (
            gateway.metrics().get('headgate_shadow_requests_total{ended="completed",model="copy"}', 0)
            > before
        )
    )


def test_a_shadow_that_hangs_neither_delays_nor_fails_anything_and_is_bounded(gateway, main):
    gate = main.gate()
    main.script("chat", Answer.of_json({"id": "x"}).gate_after(0, gate), model="copy")
    try:
        for _ in range(6):
            status, _, _ = ask(gateway, "watched")
            assert status == 200
        assert sent_models(main).count("copy") <= 2
        dropped = 'headgate_shadow_requests_dropped_total{reason="at_limit"}'
        wait_until(lambda: gateway.metrics().get(dropped, 0) >= 4)
    finally:
        gate.set()
    wait_until(lambda: gateway.metrics()['headgate_requests_in_flight{endpoint="canary"}'] == 0)


def test_a_shadowed_stream_is_read_to_its_end(gateway, main):
    status, headers, content = ask(gateway, "watched", stream=True)
    assert status == 200
    assert content.endswith(b"data: [DONE]\n\n")
    row = gateway.row(f"{headers['x-request-id']}-s0")
    assert (row["ended"], row["is_estimated"]) == ("completed", 0)
    assert row["cost_nanousd"] > 0


def wait_until(holds, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_shadow_under_way_does_not_hold_up_the_end(main, tmp_path):
    gate = main.gate()
    main.script("chat", Answer.of_json({"id": "x"}).gate_after(0, gate), model="copy")
    with Gateway(tmp_path, **config(f"{main.url}/v1")) as gateway:
        status, headers, _ = ask(gateway, "watched")
        assert status == 200
        wait_for(main, 2)
        assert gateway.stop(20) == 0
        row = gateway.row(f"{headers['x-request-id']}-s0")
    gate.set()
    assert (row["ended"], row["key_name"]) == ("drained", "shadow")
    assert gateway.row(headers["x-request-id"])["ended"] == "completed"

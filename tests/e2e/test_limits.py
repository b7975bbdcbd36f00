"""Limits as callers meet them: the SDKs' own error classes, waits and headers; and how soon a change holds."""

import json
import re
import time
from datetime import UTC, datetime

import anthropic
import openai
import pytest
from typer.testing import CliRunner

from gateway.commands.app import app
from gateway.stores.limit_sqlite import STEPS
from gateway.stores.sqlite import open_database
from gateway.webhooks import read_secret, signature
from tests.e2e.conftest import PRICE, UPSTREAM_KEY
from tests.e2e.raw import USER
from tests.support.gateway_process import Gateway

pytestmark = pytest.mark.e2e

KEYS = {
    "plain": "sk-plain-1a2b3c4d5e6f7081",
    "slow": "sk-slow-2b3c4d5e6f708192",
    "poor": "sk-poor-3c4d5e6f708192a3",
    "narrow": "sk-narrow-4d5e6f708192a3b4",
    "told": "sk-told-5e6f708192a3b4c5",
    "warned": "sk-warned-6f708192a3b4c5d6",
    "app": "sk-app-708192a3b4c5d6e7",
    "changing": "sk-changing-8192a3b4c5d6e7f8",
    "spender": "sk-spender-92a3b4c5d6e7f809",
}
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SPENDER = "key:config:spender"
TEAMS = {"poor": "secret-team-name", "changing": "moving"}


@pytest.fixture(scope="module")
def limited(upstreams, tmp_path_factory):
    account = {"api_key": UPSTREAM_KEY}
    config = {
        "keys": [{"name": name, "key": key, "team": TEAMS.get(name, "")} for name, key in KEYS.items()],
        "teams": {"secret-team-name": {"organisation": "secret-org-name"}},
        "providers": {
            "acme": {"type": "openai", "base_url": f"{upstreams.main.url}/v1", **account},
            "claude": {"type": "anthropic", "base_url": upstreams.main.url, **account},
        },
        "prices": {"overrides": {"acme/*": PRICE, "claude/*": PRICE}},
        "limits": {
            "rules": [
                {"scope": "key:slow", "requests": 1, "per": "1s"},
                {"scope": "org:secret-org-name", "usd": "0.00001", "per": "month"},
                {"scope": "key:narrow", "concurrent_streams": 1},
                {"scope": "key:told", "requests": 100, "per": "1m"},
                {"scope": "key:told", "tokens": 100_000, "per": "1m"},
                {"scope": "key:told", "tokens": 5_000_000, "per": "day"},
                {"scope": "key:warned", "usd": 0, "per": "day", "soft": True},
                {"scope": "user:*", "requests": 1, "per": "1h"},
                {"scope": "key:spender", "usd": "0.01", "per": "day"},
            ],
            "end_users": {"fields": ["safety_identifier", "user", "metadata.user_id"], "keys": ["app"]},
        },
    }
    config["alerts"] = {
        "thresholds": [1],
        "webhooks": [{"url": f"{upstreams.spare.url}/hook", "secrets": [SECRET], "private": True}],
    }
    with Gateway(tmp_path_factory.mktemp("limited"), workers=2, **config) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-8000:]


def sdk(gateway: Gateway, name: str, **options) -> openai.OpenAI:
    options = {"max_retries": 0, "timeout": 60, **options}
    return openai.OpenAI(base_url=gateway.base_url, api_key=KEYS[name], **options)


def claude(gateway: Gateway, name: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=gateway.url, api_key=KEYS[name], max_retries=0, timeout=60)


def ask(client: openai.OpenAI, **fields):
    fields = {"model": "acme/plain", "messages": USER, "max_tokens": 20, **fields}
    return client.chat.completions.with_raw_response.create(**fields)


def test_a_rate_is_a_rate_limit_error_that_says_when_to_come_back(limited):
    with sdk(limited, "slow") as client:
        with pytest.raises(openai.RateLimitError) as refused:
            for _ in range(5):
                ask(client)
        error, headers = refused.value, refused.value.response.headers
        assert (error.status_code, error.code, error.type) == (429, "rate_limit_exceeded", "rate_limit_error")
        assert headers["retry-after"] == "1"
        assert 0 < int(headers["retry-after-ms"]) <= 1000
        assert headers["x-should-retry"] == "true"
        assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == (
            "1",
            "0",
        )
        told = error.body["limit"]
        assert (told["name"], told["level"], told["measure"], told["amount"]) == (
            "requests-1s",
            "key",
            "requests",
            1,
        )
        assert datetime.fromisoformat(told["resets"]) <= datetime.fromtimestamp(time.time() + 2, UTC)


def test_sdks_wait_as_they_are_told_and_get_their_answer(limited):
    with sdk(limited, "slow", max_retries=3) as client:
        begin = time.monotonic()
        for _ in range(3):
            ask(client)
        assert time.monotonic() - begin > 0.9


def test_a_budget_says_what_is_spent_and_nobodys_name(limited):
    with sdk(limited, "poor") as client, pytest.raises(openai.RateLimitError) as refused:
        ask(client)
    error, headers = refused.value, refused.value.response.headers
    assert error.code == "budget_exceeded"
    told = error.body["limit"]
    assert (told["level"], told["measure"], told["amount"], told["spent"]) == ("org", "usd", "0.00001", "0")
    assert float(told["requested"]) > 0.00001
    assert "your organisation" in error.message
    assert "secret" not in error.response.text
    assert headers["x-should-retry"] == "false"  # it does not fit, ever


def test_messages_are_refused_in_their_own_envelope(limited):
    with claude(limited, "poor") as client, pytest.raises(anthropic.RateLimitError) as refused:
        client.messages.create(model="claude/plain", messages=USER, max_tokens=20)
    body = refused.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "rate_limit_error")
    assert body["error"]["limit"]["name"] == "money-month"
    assert body["request_id"] == refused.value.request_id


def test_answers_say_what_is_left(limited):
    with sdk(limited, "told") as client:
        first, second = ask(client), ask(client, stream=True)
        second.http_response.read()
    headers = second.headers
    assert headers["x-ratelimit-limit-requests"] == "100"
    assert 0 < int(headers["x-ratelimit-remaining-requests"]) < 100
    assert headers["x-ratelimit-limit-tokens"] == "100000"  # of the two the tighter one
    assert 99_000 < int(headers["x-ratelimit-remaining-tokens"]) < 100_000
    for answer in (first, second):
        for name in ("requests", "tokens"):
            assert re.fullmatch(r"\d+ms|(\d+m)?[\d.]+s", answer.headers[f"x-ratelimit-reset-{name}"])


def test_messages_answers_say_it_in_anthropics_names(limited):
    with claude(limited, "told") as client:
        answer = client.messages.with_raw_response.create(model="claude/plain", messages=USER, max_tokens=20)
    assert answer.headers["anthropic-ratelimit-requests-limit"] == "100"
    assert int(answer.headers["anthropic-ratelimit-tokens-remaining"]) < 100_000
    resets = datetime.fromisoformat(answer.headers["anthropic-ratelimit-requests-reset"])
    assert abs((resets - datetime.now(UTC)).total_seconds()) < 60


def test_without_a_limit_nothing_is_said(limited):
    with sdk(limited, "plain") as client:
        assert not [name for name in ask(client).headers if "ratelimit" in name]


def test_one_stream_too_many_is_refused_until_the_first_has_ended(limited):
    with sdk(limited, "narrow") as client:
        create = client.chat.completions.create
        stream = create(model="acme/hang-after-3", messages=USER, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            create(model="acme/plain", messages=USER, stream=True)
        assert refused.value.code == "concurrency_limit_exceeded"
        assert refused.value.response.headers["x-should-retry"] == "true"
        create(model="acme/plain", messages=USER)  # not streamed
        stream.close()
    with sdk(limited, "narrow", max_retries=8) as client:
        assert list(client.chat.completions.create(model="acme/plain", messages=USER, stream=True))


def test_a_soft_limit_warns_and_refuses_nobody(limited):
    with sdk(limited, "warned") as client:
        deadline = time.monotonic() + 40
        while "x-headgate-limit-warning" not in (answer := ask(client)).headers:
            assert time.monotonic() < deadline
        assert answer.headers["x-headgate-limit-warning"] == "money-day"


def test_each_end_user_has_a_limit_where_the_key_is_trusted_to_say_who(limited):
    with sdk(limited, "app") as client:
        ask(client, user="ada")
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client, user="ada")
        assert refused.value.body["limit"]["level"] == "user"
        ask(client, safety_identifier="bob", user="ada")
        ask(client)
    with sdk(limited, "plain") as client:
        for _ in range(3):
            ask(client, user="ada")


def test_a_blocked_team_is_out_within_seconds_and_back_again(limited):
    def until(refusal: type[Exception] | None, reason: str = "") -> None:
        """Every worker, hence several times."""
        deadline, streak = time.monotonic() + 40, 0
        while streak < 6:
            assert time.monotonic() < deadline, "no change in ten seconds"
            try:
                with sdk(limited, "changing") as client:  # another connection, perhaps another worker
                    ask(client)
                is_so = refusal is None
            except openai.APIStatusError as error:
                is_so = refusal is not None and isinstance(error, refusal) and error.code == reason
            streak = streak + 1 if is_so else 0

    until(None)
    limited.manage("/api/teams", "POST", {"name": "moving", "blocked": True})
    until(openai.PermissionDeniedError, "key_blocked")
    limited.manage("/api/teams/moving", "PATCH", {"blocked": False})
    until(None)
    limited.manage("/api/limits", "PUT", {"scope": "team:moving", "requests": 0, "per": "day"})
    until(openai.RateLimitError, "rate_limit_exceeded")
    limited.manage(
        "/api/limits/raised",
        "PUT",
        {"scope": "team:moving", "name": "requests-day", "amount": 1000, "until": "1h"},
    )
    until(None)


def told_of(hook) -> dict:
    return json.loads(hook.body)["data"]


def test_a_limit_that_comes_near_is_told_once_to_who_asked(limited, upstreams):
    with sdk(limited, "spender") as client:
        for _ in range(4):
            ask(client)
    deadline = time.monotonic() + 30
    while not (hooks := [hook for hook in upstreams.spare.journal if told_of(hook)["scope"] == SPENDER]):
        assert time.monotonic() < deadline, "no webhook"
        time.sleep(0.02)
    hook = hooks[0]
    headers = {name.lower(): value for name, value in hook.headers}
    assert hook.path == "/hook"
    sent = (headers["webhook-id"], int(headers["webhook-timestamp"]), hook.body)
    assert headers["webhook-signature"] == signature([read_secret(SECRET)], *sent)
    assert (told_of(hook)["limit"], told_of(hook)["threshold_percent"]) == ("money-day", 1)
    assert len(hooks) == 1
    limited.wait_log("a limit has come to 1 % of its amount")


def test_what_was_counted_is_what_the_ledger_says(limited):
    """And of all of the above where they ran before it: streams, refusals, a client that left."""
    for name in ("told", "spender", "changing"):
        with sdk(limited, name) as client:
            ask(client)
    limited.manage("/api/limits", "PUT", {"scope": "key:changing", "tokens": 1_000_000, "per": "day"})

    def run(command: str) -> dict:
        result = CliRunner().invoke(app, ["ledger", command, "-c", str(limited.config_path), "--json"])
        assert result.exit_code in (0, 1), result.output
        return json.loads(result.stdout)

    # A limit that was set just now has not seen what came before it, until the gateway's own check has told it.
    limited.wait_log("a budget had less than the ledger, and was brought up to it", 60)
    deadline = time.monotonic() + 60
    while (found := run("verify"))["differences"]:
        assert time.monotonic() < deadline, found
    assert found["compared"] >= 3
    connection = open_database(limited.directory / "data/limits.db", steps=STEPS)
    connection.execute("DELETE FROM counter")
    connection.close()
    assert {one["counter"].split("/")[-1] for one in run("rebuild")["differences"]} >= {
        "tokens-day",
        "money-day",
    }
    assert run("verify")["differences"] == []

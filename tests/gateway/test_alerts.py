"""Alerts: once per threshold and window over all workers, and delivered whoever dies."""

import contextlib
import json

import pytest

from gateway.alert_delivery import AlertOutbox, receivers_of
from gateway.alerts import Alerts, AlertsConfig
from gateway.limits_config import LimitConfig
from gateway.stores.sqlite import DATABASE_NAME, database
from gateway.webhook_delivery import RETRIES_S, WebhookDelivery
from policies.limits.account import Account
from policies.limits.messages import Reading
from tests.gateway.test_webhooks import SECRET, receiving

NOW_TIME = 1_790_000_000.0


def account(**written) -> Account:
    limit = LimitConfig(**{"scope": "team:*", "usd": 100, "per": "month", **written}).limit()
    return Account(limit, "research", int(NOW_TIME * 1e6))


def spend(alerts: Alerts, one: Account, percent: float) -> None:
    one.reading = Reading(int(one.counter.amount * percent / 100), 0, 0)
    alerts.observe([one])


@pytest.fixture
def worker(tmp_path):
    """Makes workers' alerts; `raised` tells what is written down once they are closed."""
    made: list[Alerts] = []

    def make(**settings) -> Alerts:
        alerts = Alerts(tmp_path, clock=lambda: NOW_TIME)
        alerts.configure(AlertsConfig(**settings))
        made.append(alerts)
        return alerts

    def raised() -> list[dict]:
        while made:
            made.pop().close()
        with database(tmp_path / DATABASE_NAME) as connection:
            return [
                json.loads(payload)["data"] for (payload,) in connection.execute("SELECT payload FROM alert")
            ]

    make.raised = raised
    yield make
    raised()


def test_each_threshold_is_raised_once(worker, caplog):
    alerts, one = worker(), account()
    for percent in (10, 49.9, 50, 51, 79, 80, 85, 99.9, 100, 130):
        spend(alerts, one, percent)
    assert [data["threshold_percent"] for data in worker.raised()] == [50, 80, 100]
    assert caplog.text.count("a limit has come to") == 3


def test_of_several_passed_at_once_only_the_highest_is_news(worker):
    spend(worker(), account(), 95)
    (data,) = worker.raised()
    assert data == {
        "scope": "team:research",
        "limit": "money-month",
        "measure": "usd",
        "threshold_percent": 80,
        "amount": "100",
        "spent": "95",
        "amount_text": "$100.00",
        "spent_text": "$95.00",
        "is_soft": False,
        "window_started": "2026-09-01T00:00:00Z",
        "window_ends": "2026-10-01T00:00:00Z",
    }


def test_workers_raise_an_alert_once_between_them(worker, caplog):
    for _ in range(3):
        spend(worker(), account(), 55)
    assert len(worker.raised()) == 1
    assert caplog.text.count("a limit has come to") == 1


def test_the_next_window_begins_anew(worker):
    alerts, one = worker(), account()
    spend(alerts, one, 60)
    one.counter = one.limit.counter(one.member, one.counter.periods[1])
    spend(alerts, one, 60)
    assert len(worker.raised()) == 2


def test_rates_slots_and_no_thresholds_raise_nothing(worker):
    spend(worker(), account(usd=None, requests=10, per="1m"), 100)
    spend(worker(), account(usd=None, concurrent_requests=10, per=None), 100)
    spend(worker(thresholds=[]), account(), 100)
    assert worker.raised() == []


def test_a_soft_limit_and_a_rolling_one_are_told_too(worker):
    spend(worker(), account(soft=True, tokens=1000, usd=None, per="5h"), 120)
    (data,) = worker.raised()
    assert (data["is_soft"], data["measure"], data["spent"], data["window_ends"]) == (
        True,
        "tokens",
        1200,
        None,
    )


class Clock:
    def __init__(self) -> None:
        self.now = NOW_TIME

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def delivering(worker, tmp_path):
    async with receiving() as (receiver, sender):
        settings = AlertsConfig(webhooks=[{"url": receiver.url, "secrets": [SECRET], "private": True}])
        alerts = worker(**settings.model_dump(context={"reveal": True}))
        spend(alerts, account(), 50)
        worker.raised()
        clock = Clock()
        delivery = WebhookDelivery(
            AlertOutbox(tmp_path, lambda: receivers_of(settings)), "alert", clock=clock
        )

        async def go(after_s: float = 0.0) -> int:
            clock.now += after_s
            return await delivery.deliver_due(sender)

        yield receiver, delivery, go


async def test_an_alert_is_delivered_once(worker, tmp_path):
    async with delivering(worker, tmp_path) as (receiver, delivery, go):
        assert [await go(), await go(60), await go(90_000)] == [1, 0, 0]
    assert (len(receiver.received), delivery.delivered) == (1, 1)
    event = json.loads(receiver.received[0][1])
    assert (event["type"], event["data"]["threshold_percent"]) == ("limit.threshold", 50)


async def test_a_receiver_that_fails_is_tried_again_later_under_the_same_id(worker, tmp_path):
    async with delivering(worker, tmp_path) as (receiver, delivery, go):
        receiver.answers = [500, 302, 204]
        assert [await go(), await go(1), await go(5), await go(340), await go(10_000)] == [1, 0, 1, 1, 0]
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1
    assert len({headers["webhook-timestamp"] for headers, _ in receiver.received}) == 3
    assert (delivery.delivered, delivery.failed) == (1, 2)


async def test_retry_after_is_honoured(worker, tmp_path):
    async with delivering(worker, tmp_path) as (receiver, _, go):
        receiver.answers, receiver.headers = [429, 200], {"retry-after": "600"}
        assert [await go(), await go(300), await go(301)] == [1, 0, 1]


async def test_a_receiver_that_is_gone_is_given_up(worker, tmp_path):
    async with delivering(worker, tmp_path) as (receiver, _, go):
        receiver.answers = [410]
        assert [await go(), await go(10**6)] == [1, 0]


async def test_a_receiver_that_never_answers_well_is_given_up_in_the_end(worker, tmp_path):
    async with delivering(worker, tmp_path) as (receiver, _, go):
        receiver.answers = [500]
        assert sum([await go(10**5) for _ in range(30)]) == len(RETRIES_S) + 1


async def test_what_was_raised_for_a_receiver_no_longer_configured_is_dropped(worker, tmp_path):
    async with delivering(worker, tmp_path) as (receiver, _, _), receiving() as (other, sender):
        moved = AlertsConfig(webhooks=[{"url": other.url, "secrets": [SECRET], "private": True}])
        delivery = WebhookDelivery(AlertOutbox(tmp_path, lambda: receivers_of(moved)), "alert")
        assert await delivery.deliver_due(sender) == 1
        assert await delivery.deliver_due(sender) == 0
        assert receiver.received == other.received == []


async def test_while_nobody_is_to_hear_of_alerts_they_wait(tmp_path):
    async with receiving() as (_, sender):
        assert await WebhookDelivery(AlertOutbox(tmp_path, dict), "alert").deliver_due(sender) == 0


@pytest.mark.parametrize(
    ("webhook", "problem"),
    [
        ({"url": "http://a.example", "secrets": [SECRET]}, "https://"),
        ({"url": "https://127.0.0.1/", "secrets": [SECRET]}, "must be public"),
        ({"url": "https://a.example/", "secrets": ["nothing"]}, "whsec_"),
        ({"url": "https://a.example/", "secrets": []}, "at least 1"),
    ],
)
def test_what_is_no_receiver_says_why(webhook, problem):
    with pytest.raises(ValueError, match=problem):
        AlertsConfig(webhooks=[webhook])


def test_without_a_secret_a_receiver_is_off():
    settings = AlertsConfig(webhooks=[{"url": "https://a.example/", "secrets": [""]}])
    assert receivers_of(settings) == {}

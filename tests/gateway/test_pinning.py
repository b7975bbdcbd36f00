"""Answers are continued where they were made, also by a worker that did not see them made."""

import pytest

from backends.dialect import RESPONSES
from gateway.ledger import Ledger
from gateway.ledger_row import row_of
from gateway.pinning import Pinning
from policies.exchange import Caller
from tests.support.builders import a_model, an_exchange


def of_team(team="", key="k1"):
    return Caller(key, "name", team)


@pytest.fixture
async def storage(tmp_path):
    """A ledger that another worker wrote: one answer of each tenant, with the same id."""
    ledger = Ledger(tmp_path, "w0")
    model = a_model(endpoints=4)
    (group,) = model.groups(an_exchange().dialect)
    endpoints = list(group.candidates.values())
    for number, caller in enumerate([of_team("a"), of_team("b"), of_team("", "k7")]):
        exchange = an_exchange(RESPONSES, model=model, answer_id="resp_1", session_hash=2**63 + number)
        exchange.request_id = f"req_{number}"
        exchange.caller, exchange.candidate = caller, endpoints[number]
        exchange.ended, exchange.status = "completed", 200
        ledger.open(exchange)
        ledger.close(row_of(exchange, worker="w0"))
    await ledger.stop()
    return tmp_path


async def pinned(pinning, caller, answer_id="resp_1", endpoints=4):
    exchange = an_exchange(RESPONSES, model=a_model(endpoints=endpoints), continues=answer_id)
    exchange.caller = caller
    await pinning.pin(exchange)
    return exchange.pinned_to, exchange.session_hash


async def test_the_ledger_knows_what_other_workers_answered(storage):
    pinning = Pinning(storage)
    assert await pinned(pinning, of_team("a")) == ("pool/0", 2**63)
    assert await pinned(pinning, of_team("a", "another key")) == ("pool/0", 2**63)
    assert await pinned(pinning, of_team("b")) == ("pool/1", 2**63 + 1)
    assert await pinned(pinning, of_team("", "k7")) == ("pool/2", 2**63 + 2)


async def test_ids_of_other_tenants_are_unknown(storage):
    pinning = Pinning(storage)
    assert await pinned(pinning, of_team("c")) == ("", 0)
    assert await pinned(pinning, of_team("", "a")) == ("", 0)
    assert await pinned(pinning, of_team("a"), "resp_2") == ("", 0)


async def test_what_was_found_once_is_remembered(storage):
    pinning = Pinning(storage)
    await pinned(pinning, of_team("a"))
    (storage / "headgate.db").unlink()
    assert await pinned(pinning, of_team("a")) == ("pool/0", 2**63)


async def test_without_a_database_the_request_goes_on(tmp_path):
    assert await pinned(Pinning(tmp_path), of_team("a")) == ("", 0)


async def test_nothing_is_looked_up_where_there_is_no_choice(storage):
    assert await pinned(Pinning(storage), of_team("a"), endpoints=1) == ("", 0)

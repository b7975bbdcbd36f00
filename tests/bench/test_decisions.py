"""The bench of decisions measures what the gateway does, and leaves nothing behind."""

import pytest

from bench import decisions


@pytest.mark.parametrize("policy", decisions.POLICIES)
@pytest.mark.parametrize("session", decisions.SESSIONS)
def test_item_29_a_whole_request_is_measured_and_gives_its_load_back(policy, session):
    model = decisions.a_model(policy, 4)
    whole = decisions.request(model, prompt_bytes=2000, session=session, is_whole=True)
    before = [(e.in_flight, e.uncached_tokens) for e in model.targets[0].pool.endpoints]
    for number in range(200):
        whole(number)
    assert [(e.in_flight, e.uncached_tokens) for e in model.targets[0].pool.endpoints] == before


def test_the_table_has_a_row_for_each_policy_and_pool(monkeypatch):
    monkeypatch.setattr(decisions, "POOLS", (4,))
    monkeypatch.setattr(decisions, "PROMPTS", (1000,))
    found = decisions.measured(requests=5, rounds=1)
    table = decisions.table(found).splitlines()
    assert len(found) == len(decisions.POLICIES) * len(decisions.SESSIONS)
    assert len(table) == 2 + len(decisions.POLICIES)

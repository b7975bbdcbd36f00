"""The simulation as a whole, small: what it promises of any policy, and the goals it is there to watch."""

from itertools import count, islice

import pytest

from bench.routing import scenarios
from bench.routing.baselines import NAMES
from bench.routing.figures import Figures, cost_usd
from bench.routing.report import Findings, goals, markdown
from bench.routing.scenarios import Length, simulation
from bench.routing.traces import AgentTraffic, Conversation, Turn

SHORT = Length((1,), 60.0, 150.0)


def play(policy, *, replicas=4, population=40, until_s=120.0, **options):
    run = simulation(policy, replicas, **options)
    conversations = map(AgentTraffic(seed=2).conversation, count())
    return run, run.run(conversations, until_s=until_s, from_s=30.0, population=population)


@pytest.mark.parametrize("policy", NAMES)
def test_every_policy_answers_everything_and_leaves_no_load_behind(policy):
    run, record = play(policy)
    assert run.loads_left() == 0
    assert all(replica.next_at is None and not replica.running for replica in run.everyone)
    assert len(record.ttft_s) > 100
    assert min(record.ttft_s) > 0
    assert all(a <= b for a, b in zip(record.ttft_s, record.total_s, strict=True))
    assert all(c < p for c, p in zip(record.cached_tokens, record.prompt_tokens, strict=True))


def test_the_same_run_gives_the_same_record():
    (_, one), (_, two) = play("session"), play("session")
    assert one == two


def test_item_4_affinity_is_worth_2_5_times_the_hits_and_half_the_wait():
    long_enough_to_fill = Length((1,), 180.0, 300.0)
    turns = scenarios.agents("round-robin", long_enough_to_fill)
    for policy in ("session", "prefix"):
        own = scenarios.agents(policy, long_enough_to_fill)
        assert own.hit_rate > 2.5 * turns.hit_rate
        assert own.ttft_p50 < turns.ttft_p50 / 2


def test_several_processes_agree_where_sessions_live():
    _, alone = play("session", replicas=8, population=100)
    run, shared = play("session", replicas=8, population=100, processes=4)
    assert run.loads_left() == 0
    assert Figures.of(shared).hit_rate > Figures.of(alone).hit_rate - 0.12


def test_a_replica_that_dies_loses_its_cache_but_no_request():
    run = simulation("session", 3)
    asked = list(islice(map(AgentTraffic(seed=4).conversation, count()), 20))
    record = run.run(
        asked,
        until_s=1e6,
        changes=[(20.0, lambda now_running, now: now_running.crash_replica(run.replicas[0], now))],
    )
    assert run.loads_left() == 0
    assert len(record.ttft_s) == sum(len(conversation.turns) for conversation in asked)


def test_what_leaves_gets_nothing_new_and_gets_its_own_back_when_it_returns():
    change = scenarios.change("session", SHORT)
    assert change.bystanders_moved_on_removal < 0.02
    assert change.moved_on_removal < 0.05
    left, joined = scenarios.keys_moved("session", keys=2000)
    assert left < 0.13
    assert joined < 0.13


def test_a_cached_prompt_is_priced_as_one():
    run = simulation("session", 1)
    record = run.run([Conversation(1, [Turn(0.0, 10_000, 10), Turn(1.0, 100, 10)])], until_s=100.0)
    assert list(record.cached_tokens) == [0, 9984]
    total, answers = cost_usd(record, "openai", "gpt-5.1")
    # 1.25, 0.125 and 10 dollars a million.
    fresh = 10_000 + (10_110 - 9984)
    assert total == pytest.approx((fresh * 1.25 + 9984 * 0.125 + 20 * 10) / 1e6)
    assert answers == pytest.approx(20 * 10 / 1e6)


def test_the_report_says_met_and_missed(tmp_path):
    _, record = play("session")
    good = Figures.of(record)
    found = Findings(agents={"session": good, "round-robin": good, "pure-affinity": good})
    found.load = {"session": [(20, good)]}
    found.prices = {"session": (1.0, 0.1), "round-robin": (4.0, 0.1)}
    verdicts = {goal.text: goal.row()[-1] for goal in goals(found)}
    assert verdicts["session: hit rate x round-robin's"] == "MISSED"
    assert verdicts["session: points of hit rate below pure affinity"] == "met"
    text = markdown(found, tmp_path)
    assert "75.0 %" in text
    assert (tmp_path / "plots/load.svg").exists()
    assert markdown(found, tmp_path) == text

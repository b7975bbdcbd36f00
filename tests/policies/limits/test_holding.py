"""A worker and the store in memory, step by step: what is said, what is repeated, what is begun again."""

import itertools

import pytest

from policies.limits.account import Account
from policies.limits.holding import Holding
from policies.limits.limit import Limit, Scope, Window
from tests.support.limit_memory import MemoryStore

BUDGET = Limit("money", Scope("team", "t"), "money", 1000, Window("total"))
SLOTS = Limit("slots", Scope("team", "t"), "concurrent_requests", 3, Window("now"))
RATE = Limit("requests", Scope("team", "t"), "requests", 60, Window("rate", 60), burst=10)
TTL_S = 10.0


class Worker:
    """A Holding and its side of the conversation. `at` is its monotonic clock."""

    def __init__(self, store: MemoryStore, *, over_admission: float = 0.0, name: str = "w") -> None:
        names = (f"{name}{number}" for number in itertools.count())
        self.holding = Holding(lambda: next(names), over_admission=over_admission, ttl_us=int(TTL_S * 1e6))
        self.store = store
        self.at = 100.0
        self.holding.set_time(store.now_us, self.at)

    def account(self, limit: Limit) -> Account:
        return self.holding.account(limit, "t", self.store.now_us)

    def ask(self, *holds: tuple[Limit, int]) -> bool:
        """One request for all of this; whether it was granted."""
        group = tuple((self.account(limit), units) for limit, units in holds)
        for account, units in group:
            account.asked += units
        return self.talk([group]) == [None]

    def talk(self, groups=()):
        self.compose(groups)
        return self.hear()

    def compose(self, groups=()):
        return self.holding.compose(list(groups), self.at)

    def hear(self):
        while True:
            reply = self.store.apply(self.holding.sent)
            outcomes = self.holding.take_in(reply, self.at)
            if outcomes is not None:
                return outcomes

    def end(self, limit: Limit, reserved: int, used: int) -> None:
        account = self.account(limit)
        account.settle(reserved, used, self.store.now_us)
        self.holding.touch(account)

    def wait(self, seconds: float) -> None:
        self.at += seconds
        self.store.wait(seconds)

    def stands(self, limit: Limit) -> tuple[int, int]:
        """Spent and held, as the store has it."""
        _, (reading,) = self.store.look([limit.counter("t", self.store.now_us)])
        return reading.spent, reading.held


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def test_what_was_reserved_and_not_used_comes_back(store) -> None:
    worker = Worker(store)
    assert worker.ask((BUDGET, 800))
    assert not worker.ask((BUDGET, 300))
    worker.end(BUDGET, 800, 100)
    worker.talk()
    assert worker.stands(BUDGET) == (100, 0)
    assert worker.ask((BUDGET, 900))


def test_what_was_used_beyond_the_reservation_is_posted_in_full_and_blocks_the_next(store) -> None:
    worker = Worker(store)
    assert worker.ask((BUDGET, 500))
    assert worker.ask((BUDGET, 400))
    worker.end(BUDGET, 500, 700)
    worker.talk()
    assert worker.stands(BUDGET) == (700, 400)
    worker.end(BUDGET, 400, 400)
    worker.talk()
    assert worker.stands(BUDGET) == (1100, 0)
    assert not worker.ask((BUDGET, 1))


def test_a_request_is_granted_all_it_asks_for_or_nothing(store) -> None:
    worker = Worker(store)
    assert worker.ask((BUDGET, 100), (SLOTS, 1), (RATE, 1))
    assert not worker.ask((SLOTS, 1), (RATE, 1), (BUDGET, 901))
    assert (worker.stands(SLOTS), worker.stands(RATE)) == ((0, 1), (1, 0))


def test_the_refusal_names_the_account_that_had_no_room(store) -> None:
    worker = Worker(store)
    slots, budget = worker.account(SLOTS), worker.account(BUDGET)
    worker.ask((BUDGET, 990))
    ((account, units, refusal),) = worker.talk([((slots, 1), (budget, 20))])
    assert (account, units, refusal.held) == (budget, 20, 990)


def test_an_update_whose_answer_was_lost_is_repeated_and_counts_once(store) -> None:
    worker = Worker(store)
    assert worker.ask((BUDGET, 500))
    worker.end(BUDGET, 500, 300)
    store.apply(worker.compose([((worker.account(BUDGET), 200),)]))
    assert worker.hear() == [None]
    assert worker.stands(BUDGET) == (300, 200)


def test_who_was_given_up_for_dead_begins_again_with_what_it_holds_and_has_spent(store) -> None:
    worker = Worker(store)
    assert worker.ask((BUDGET, 500))
    assert worker.ask((BUDGET, 400))
    worker.end(BUDGET, 400, 250)
    worker.wait(TTL_S + 1)
    assert worker.stands(BUDGET) == (0, 0)
    assert worker.ask((BUDGET, 100))
    assert worker.stands(BUDGET) == (250, 600)
    worker.end(BUDGET, 500, 500)
    worker.end(BUDGET, 100, 0)
    worker.talk()
    assert worker.stands(BUDGET) == (750, 0)


def test_what_was_posted_before_the_death_it_was_taken_for_is_not_posted_again(store) -> None:
    worker = Worker(store)
    assert worker.ask((BUDGET, 500))
    worker.end(BUDGET, 500, 300)
    store.apply(worker.compose())  # the answer is lost
    worker.wait(TTL_S + 1)
    worker.hear()
    worker.talk()
    assert worker.stands(BUDGET) == (300, 0)


def test_a_store_that_forgot_everything_is_told_what_is_held(store) -> None:
    worker = Worker(store)
    assert worker.ask((SLOTS, 2))
    store.states.clear()
    store.holders.clear()
    worker.talk()
    assert worker.stands(SLOTS) == (0, 2)


def test_what_is_held_may_be_used_no_longer_than_the_store_keeps_it(store) -> None:
    worker = Worker(store)
    worker.talk()
    assert worker.holding.valid_until == worker.at + TTL_S


def test_slack_grows_with_demand_up_to_its_bound_and_goes_when_nobody_asks(store) -> None:
    limit = Limit("requests", Scope("team", "t"), "requests", 60_000, Window("rate", 60))
    worker = Worker(store, over_admission=0.01)
    account = worker.account(limit)
    for _ in range(5):
        account.asked += 1000
        worker.wait(1)
        worker.holding.touch(account)
        worker.talk()
    assert account.free == account.slack == 600  # one worker may hold all of the one per cent
    Worker(store, name="other").talk()
    account.asked += 1000
    worker.wait(1)
    worker.holding.touch(account)
    worker.talk()
    worker.holding.touch(account)
    worker.talk()
    assert account.free == account.slack == 300
    for _ in range(4):
        worker.wait(1)
        worker.holding.tell_all()
        worker.talk()
    assert account.free == account.slack == 0


def test_near_the_limit_slack_is_a_part_of_what_is_left(store) -> None:
    worker = Worker(store, over_admission=0.5)
    account = worker.account(BUDGET)
    assert worker.ask((BUDGET, 960))
    worker.end(BUDGET, 960, 960)
    account.asked += 1000
    worker.wait(1)
    worker.talk()
    assert account.free == 10
    assert account.is_near


def test_slack_is_never_more_than_there_is_room_for(store) -> None:
    others = Worker(store, name="other")
    worker = Worker(store, over_admission=0.5)
    account = worker.account(BUDGET)
    account.asked += 1000
    worker.wait(1)
    worker.holding.touch(account)
    worker.compose()  # wants a quarter of what it believes to be free
    assert others.ask((BUDGET, 900))
    worker.hear()
    assert (account.slack, account.free) == (250, 100)
    assert worker.stands(BUDGET) == (0, 1000)


def test_an_exact_limit_and_one_of_less_than_a_request_have_no_slack(store) -> None:
    exact = Limit("exact", Scope("team", "t"), "requests", 60_000, Window("rate", 60), is_exact=True)
    for limit in (exact, SLOTS):
        worker = Worker(store, over_admission=0.01)
        account = worker.account(limit)
        account.asked += 1000
        worker.wait(1)
        worker.holding.touch(account)
        worker.talk()
        assert (account.slack, account.free) == (0, 0)


def test_a_soft_limit_counts_beyond_its_amount(store) -> None:
    soft = Limit("soft", Scope("team", "t"), "concurrent_requests", 2, Window("now"), warns_only=True)
    worker = Worker(store)
    account = worker.account(soft)
    account.free -= 5
    worker.holding.touch(account)
    worker.talk()
    assert worker.stands(soft) == (0, 5)
    worker.end(soft, 5, 0)
    worker.talk()
    assert worker.stands(soft) == (0, 0)


def test_the_last_word_leaves_nothing_held(store) -> None:
    worker = Worker(store, over_admission=0.5)
    assert worker.ask((BUDGET, 100), (SLOTS, 1))
    worker.end(BUDGET, 100, 60)
    worker.end(SLOTS, 1, 0)
    worker.holding.tell_all()
    worker.holding.compose([], worker.at, is_last=True)
    worker.hear()
    assert (worker.stands(BUDGET), worker.stands(SLOTS)) == ((60, 0), (0, 0))


def test_idle_accounts_are_forgotten_and_those_who_know_them_are_told(store) -> None:
    worker = Worker(store)
    assert worker.ask((SLOTS, 1), (BUDGET, 10))
    worker.end(BUDGET, 10, 10)
    worker.talk()
    generation = worker.holding.generation
    worker.at += 61
    assert worker.holding.forget_idle(worker.at)
    assert [account.limit for account in worker.holding.accounts.values()] == [SLOTS]  # it holds a slot
    assert worker.holding.generation != generation


def test_spent_money_is_posted_to_the_period_its_request_came_in(store) -> None:
    daily = Limit("day", Scope("team", "t"), "money", 1000, Window("day"))
    worker = Worker(store)
    assert worker.ask((daily, 300))
    came_us = store.now_us
    midnight_us = daily.counter("t", came_us).periods[1]
    seconds = (midnight_us - came_us) / 1e6 + 60
    while seconds > 0:
        worker.wait(min(seconds, TTL_S / 2))
        worker.talk()
        seconds -= TTL_S / 2
    account = worker.account(daily)
    worker.ask((daily, 10))  # of the new day
    account.settle(300, 200, came_us)
    worker.holding.touch(account)
    worker.talk()
    assert worker.stands(daily) == (0, 10)
    assert store.states["team/t/day"].spent == {midnight_us - 86_400_000_000: 200}

from gateway.reconcile import Difference
from gateway.shared_check import certain
from policies.limits.limit import Limit, Scope, Window

LIMIT = Limit("l", Scope("team"), "money", 100, Window("total"))


def a_look(spent: int, ledger: int, member: str = "a") -> Difference:
    return Difference(LIMIT, member, LIMIT.counter(member, 0), spent, ledger)


def test_what_only_has_not_arrived_yet_is_no_difference() -> None:
    # Requests end all the time: the ledger is always a little behind, and never catches up.
    assert certain([a_look(spent=50, ledger=40)], [a_look(spent=90, ledger=80)]) == []
    assert certain([a_look(spent=40, ledger=50)], [a_look(spent=80, ledger=90)]) == []


def test_what_the_ledger_had_and_the_store_never_got_is_missing() -> None:
    (found,) = certain([a_look(spent=40, ledger=60)], [a_look(spent=55, ledger=75)])
    assert found.missing == 5


def test_what_the_store_had_and_the_ledger_never_got_is_too_much() -> None:
    (found,) = certain([a_look(spent=90, ledger=60)], [a_look(spent=95, ledger=70)])
    assert found.missing == -20


def test_a_counter_of_another_period_says_nothing() -> None:
    day = Limit("d", Scope("team"), "money", 100, Window("day"))
    before = Difference(day, "a", day.counter("a", 0), 90, 10)
    after = Difference(day, "a", day.counter("a", 86_400_000_000), 0, 0)
    assert certain([before], [after]) == []
    assert certain([], [a_look(spent=5, ledger=0)]) == []

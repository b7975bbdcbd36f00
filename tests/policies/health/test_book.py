import pytest

from backends.load import EndpointLoad
from policies.health.book import HealthBook
from policies.health.settings import HealthSettings


def endpoints(count=4) -> list[EndpointLoad]:
    return [EndpointLoad(f"gpu/{n}", b"address %d" % n) for n in range(count)]


def a_book(members, **settings) -> HealthBook:
    book = HealthBook()
    book.declare([("gpu", HealthSettings(**settings), members)])
    return book


def out(book, endpoint, now=0.0):
    book.of(endpoint).attempt(now, 1.0).failed(now, "connect")


def answers(book, endpoint, now, took_s, times=10):
    for _ in range(times):
        attempt = book.of(endpoint).attempt(now, 1.0)
        attempt.heard(now + took_s)
        attempt.succeeded(now + took_s)


def test_while_all_are_well_the_list_is_handed_back_as_it_is():
    members = endpoints()
    assert a_book(members).usable(members, 0.0) is members


def test_one_that_is_out_leaves_the_candidates():
    members = endpoints()
    book = a_book(members)
    out(book, members[2])
    assert book.usable(members, 1.0) == [members[0], members[1], members[3]]


@pytest.mark.parametrize(
    ("size", "broken", "left"), [(1, 1, 1), (2, 1, 1), (2, 2, 2), (3, 2, 3), (4, 2, 2), (4, 3, 4)]
)
def test_the_last_half_is_never_ejected(size, broken, left):
    members = endpoints(size)
    book = a_book(members)
    for endpoint in members[:broken]:
        out(book, endpoint)
    assert len(book.usable(members, 1.0)) == left


def test_in_a_panic_an_answer_is_enough_to_come_back():
    members = endpoints()
    book = a_book(members)
    for endpoint in members:
        out(book, endpoint)
    assert book.usable(members, 1.0) == members
    answers(book, members[0], 1.0, 0.1, times=1)
    assert book.of(members[0]).state == "warming"


def test_a_second_attempt_is_not_made_where_nothing_is_hoped_for():
    members = endpoints()
    book = a_book(members)
    out(book, members[0])
    book.of(members[1]).cool(0.0, 5.0)
    assert [book.may_retry_at(e, 1.0) for e in members] == [False, False, True, True]


def test_half_open_lets_a_single_request_through():
    members = endpoints()
    book = a_book(members)
    out(book, members[0])
    assert members[0] in book.usable(members, 10.0)
    book.of(members[0]).attempt(10.0, 1.0)
    assert members[0] not in book.usable(members, 10.0)


def test_a_cooling_endpoint_is_passed_over_while_there_is_another():
    members = endpoints(2)
    book = a_book(members)
    book.of(members[0]).cool(0.0, 5.0)
    assert book.usable(members, 1.0) == [members[1]]
    assert not book.is_down(members, 1.0)
    book.of(members[1]).cool(0.0, 5.0)
    assert book.usable(members, 1.0) == members
    assert book.is_down(members, 1.0)
    book.check(5.0)
    assert book.usable(members, 5.0) is members


def test_the_share_of_one_that_warms_up_grows_and_sessions_that_came_home_stay():
    members = endpoints()
    book = a_book(members)
    out(book, members[0])
    answers(book, members[0], 10.0, 0.0, times=1)
    sessions = [n * 2654435761 % 2**64 for n in range(1, 1000)]
    home: set[int] = set()
    for now, share in ((11.0, 0.19), (15.0, 0.55), (19.0, 0.91)):
        here = {s for s in sessions if members[0] in book.usable(members, now, s)}
        assert home <= here
        assert abs(len(here) / len(sessions) - share) < 0.03
        home = here
        anonymous = sum(members[0] in book.usable(members, now) for _ in range(1000))
        assert abs(anonymous / 1000 - share) < 0.03
    book.check(20.0)
    assert book.usable(members, 20.0) is members


def test_ten_times_as_slow_as_the_others_is_out():
    members = endpoints()
    book = a_book(members)
    for endpoint in members:
        answers(book, endpoint, 0.0, 0.1)
    book.check(0.25)
    answers(book, members[3], 1.0, 1.0, times=5)
    answers(book, members[2], 1.0, 0.3, times=5)
    assert [book.of(e).state for e in members] == ["up", "up", "up", "out"]


def test_a_pool_that_is_slow_as_a_whole_stays():
    members = endpoints()
    book = a_book(members)
    for round_s, took_s in ((0.0, 0.1), (5.0, 0.3), (10.0, 0.9)):
        for endpoint in members:
            book.check(round_s)
            answers(book, endpoint, round_s, took_s, times=20)
    assert {book.of(e).state for e in members} == {"up"}


def stalled(book, members, count=3):
    for endpoint in members:
        answers(book, endpoint, 0.0, 0.05)
    for _ in range(count):
        book.of(members[0]).attempt(1.0, 1.0)


def test_an_endpoint_that_is_silent_while_others_talk_is_out():
    members = endpoints()
    book = a_book(members)
    stalled(book, members)
    answers(book, members[1], 1.8, 0.05, times=1)
    book.check(1.9)
    assert book.of(members[0]).state == "up"
    book.check(2.1)
    assert (book.of(members[0]).state, book.of(members[0]).reason) == ("out", "stalled")


def test_when_all_are_silent_nobody_is_out():
    members = endpoints()
    book = a_book(members)
    stalled(book, members)
    book.check(30.0)
    assert book.of(members[0]).state == "up"


def test_a_single_long_prompt_is_not_a_stall():
    members = endpoints()
    book = a_book(members)
    stalled(book, members, count=2)
    answers(book, members[1], 20.0, 0.05, times=1)
    book.check(30.0)
    assert book.of(members[0]).state == "up"


def test_state_survives_a_new_configuration_with_other_settings_and_another_order():
    before, after = endpoints(), list(reversed(endpoints()))
    book = a_book(before)
    out(book, before[1])
    book.of(before[2]).cool(0.0, 60.0)
    book.declare([("gpu", HealthSettings(failures=3), after), ("other", HealthSettings(), endpoints(1))])
    assert [e.name for e in book.usable(after, 1.0)] == ["gpu/3", "gpu/0"]
    assert book.find("gpu/1").settings.failures == 3
    assert book.find("gpu/1").endpoint is after[2]


def test_an_address_that_left_the_configuration_is_forgotten():
    members = endpoints()
    book = a_book(members)
    out(book, members[0])
    book.declare([("gpu", HealthSettings(), members[1:])])
    assert book.of(members[0]) is None
    assert book.usable(members[1:], 1.0) == members[1:]


def test_changes_are_told():
    told = []
    members = endpoints()
    book = HealthBook(lambda health: told.append((health.endpoint.name, health.state)))
    book.declare([("gpu", HealthSettings(), members)])
    out(book, members[0])
    answers(book, members[0], 10.0, 0.0, times=1)
    book.check(20.0)
    assert told == [("gpu/0", "out"), ("gpu/0", "warming"), ("gpu/0", "up")]

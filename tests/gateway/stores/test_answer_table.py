"""Claims on idempotency keys, on a real database, with the time injected."""

import threading

import pytest

from gateway.stores import answer_table
from gateway.stores.answer_table import LEASE_S, Asked, KeptAnswer
from gateway.stores.sqlite import DATABASE_NAME, open_database

ANSWER = KeptAnswer("req_1", 200, b"[]", b"hello", is_stream=False)


def asked(owner: str = "req_1", scope: bytes = b"scope", body: bytes = b"body", tenant: str = "k1") -> Asked:
    return Asked(scope, body, tenant, owner)


@pytest.fixture
def connection(tmp_path):
    connection = open_database(tmp_path / DATABASE_NAME)
    yield connection
    connection.close()


def test_the_first_claim_wins_and_the_others_are_told_that_it_runs(connection):
    assert answer_table.claim(connection, asked(), 1000.0, 60.0).state == "mine"
    assert answer_table.claim(connection, asked("req_2"), 1000.0, 60.0).state == "running"
    assert answer_table.claim(connection, asked("req_2", body=b"other"), 1000.0, 60.0).state == "other_body"


def test_a_kept_answer_is_given_until_it_expires(connection):
    answer_table.claim(connection, asked(), 1000.0, 60.0)
    assert answer_table.finish(connection, b"scope", "req_1", ANSWER)
    again = answer_table.claim(connection, asked("req_2"), 1059.0, 60.0)
    assert (again.state, again.answer) == ("done", ANSWER)
    assert answer_table.claim(connection, asked("req_3"), 1060.0, 60.0).state == "mine"
    assert answer_table.claim(connection, asked("req_4"), 1060.0, 60.0).state == "running"


def test_what_is_given_back_may_be_claimed_at_once(connection):
    answer_table.claim(connection, asked(), 1000.0, 60.0)
    answer_table.release(connection, b"scope", "req_1")
    assert answer_table.claim(connection, asked("req_2", body=b"other"), 1000.0, 60.0).state == "mine"


def test_a_dead_owners_claim_is_taken_over_and_cannot_be_ended_by_it_any_more(connection):
    answer_table.claim(connection, asked(), 1000.0, 600.0)
    answer_table.renew(connection, ["req_1"], 1020.0)
    assert answer_table.claim(connection, asked("req_2"), 1000.0 + LEASE_S, 600.0).state == "running"
    assert answer_table.claim(connection, asked("req_2"), 1020.0 + LEASE_S, 600.0).state == "mine"
    assert not answer_table.finish(connection, b"scope", "req_1", ANSWER)
    answer_table.release(connection, b"scope", "req_1")
    assert answer_table.claim(connection, asked("req_3"), 1021.0 + LEASE_S, 600.0).state == "running"


def test_beyond_the_total_the_oldest_of_whoever_keeps_most_go(connection):
    for number in range(40):
        tenant = "small" if number == 0 else "large"
        scope = b"%d" % number
        answer_table.claim(connection, asked(f"req_{number}", scope, tenant=tenant), 1000.0 + number, 600.0)
        answer = KeptAnswer(f"req_{number}", 200, b"[]", b"x" * 1000, is_stream=False)
        answer_table.finish(connection, scope, f"req_{number}", answer)
    answer_table.forget(connection, 1100.0, 20_000)
    left = [scope for (scope,) in connection.execute("SELECT scope FROM kept_answer ORDER BY expires_time")]
    assert len(left) <= 20
    assert left[0] == b"0"  # not the large one's
    assert left[-1] == b"39"
    answer_table.forget(connection, 5000.0, 20_000)
    assert connection.execute("SELECT count(*) FROM kept_answer").get == 0


def test_of_many_claims_at_once_one_wins(tmp_path):
    states: list[str] = []
    start = threading.Barrier(8)

    def claim(number: int) -> None:
        connection = open_database(tmp_path / DATABASE_NAME)
        start.wait()
        claims = (answer_table.claim(connection, asked(f"{number}", b"%d" % n), 1.0, 60.0) for n in range(10))
        states.extend(claim.state for claim in claims)
        connection.close()

    open_database(tmp_path / DATABASE_NAME).close()
    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(states) == ["mine"] * 10 + ["running"] * 70

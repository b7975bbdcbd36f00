import pytest

from gateway.key_lifecycle import UnknownKeyError, described, find_one, listed, replace_key, state_of
from gateway.keys import NewKey, create_key
from gateway.stores import key_table
from gateway.stores.sqlite import DATABASE_NAME, database

PEPPER = b"0123456789abcdef0123456789abcdef"
NOW = 1_793_059_200
DAY = 86_400


@pytest.fixture
def connection(tmp_path):
    with database(tmp_path / DATABASE_NAME) as connection:
        yield connection


def made(connection, name, **settings):
    return create_key(connection, PEPPER, NewKey(name, **settings), NOW)[1]


def test_of_two_keys_with_a_name_the_one_that_is_not_revoked_is_meant(connection):
    old = made(connection, "ci")
    key_table.revoke(connection, old.id, NOW)
    assert find_one(connection, "ci").id == old.id
    new = made(connection, "ci")
    assert find_one(connection, "ci").id == new.id
    assert find_one(connection, old.id).id == old.id


def test_a_name_that_means_two_keys_is_answered_with_their_ids(connection):
    caller, operator = made(connection, "ci"), made(connection, "ci", kind="operator")
    with pytest.raises(ValueError, match="give the id, one of") as refused:
        find_one(connection, "ci")
    assert caller.id in str(refused.value)
    assert operator.id in str(refused.value)
    with pytest.raises(UnknownKeyError):
        find_one(connection, "nobody")


def test_a_key_is_over_from_the_second_on_that_it_expires(connection):
    record = made(connection, "ci", expires_time=NOW)
    assert (state_of(record, NOW - 1), state_of(record, NOW)) == ("active", "expired")
    assert listed(connection, NOW, is_all=False) == []
    assert [r.name for r in listed(connection, NOW, is_all=True)] == ["ci"]
    assert described(record, NOW)["expires"] == "2026-10-27T00:00:00Z"


@pytest.mark.parametrize(
    ("was", "asked", "becomes"),
    [
        (None, None, None),
        (NOW + DAY, None, NOW + 90 * DAY),
        (None, "1d", NOW + DAY),
        (NOW + DAY, "never", None),
    ],
)
def test_a_replaced_key_lasts_as_long_as_a_new_one_unless_told_otherwise(connection, was, asked, becomes):
    old = made(connection, "ci", expires_time=was)
    _, record = replace_key(connection, PEPPER, "ci", "24h", asked, NOW)
    assert (record.id, record.expires_time) == (old.id, becomes)
    assert record.hash != old.hash

from policies.session import cache_salt, session_hash
from tests.support.builders import a_caller


def test_tenants_with_the_same_session_id_have_different_hashes():
    mine, theirs = a_caller(key_id="a"), a_caller(key_id="b")
    assert session_hash(b"k", mine, b"s1") != session_hash(b"k", theirs, b"s1")
    assert session_hash(b"k", mine, b"s1") != session_hash(b"other secret", mine, b"s1")


def test_keys_of_one_team_share_their_sessions():
    assert session_hash(b"k", a_caller(key_id="a", team="t"), b"s") == session_hash(
        b"k", a_caller(key_id="b", team="t"), b"s"
    )


def test_a_cache_salt_is_the_tenants_whatever_the_client_asks_for():
    mine, theirs = a_caller(key_id="a"), a_caller(key_id="b")
    assert cache_salt(b"k", mine, b"x") != cache_salt(b"k", theirs, b"x")
    assert cache_salt(b"k", mine, b"x") != cache_salt(b"k", mine, b"")
    # What vLLM takes: not empty, at most 128 characters, none of @ / \\ NUL.
    assert cache_salt(b"k", mine, b"").isalnum()

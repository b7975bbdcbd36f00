from tests.support.builders import an_endpoint


def with_keys(*keys: str):
    endpoint = an_endpoint(key=keys[0])
    endpoint.take_keys(keys[1:])
    return endpoint


def test_a_refused_key_rests_and_the_next_is_used():
    endpoint = with_keys("a", "b", "c")
    endpoint.heads["/chat"] = b"with the key in it"
    assert endpoint.rotate("a", 0.0, 60.0)
    assert (endpoint.api_key, endpoint.heads) == ("b", {})
    assert endpoint.rotate("b", 1.0, 60.0)
    assert endpoint.api_key == "c"


def test_of_many_requests_that_one_key_was_refused_for_only_the_first_changes_it():
    endpoint = with_keys("a", "b", "c")
    assert [endpoint.rotate("a", 0.0, 60.0) for _ in range(5)] == [True] * 5
    assert endpoint.api_key == "b"


def test_when_all_rest_there_is_none_until_one_has_rested():
    endpoint = with_keys("a", "b")
    assert endpoint.rotate("a", 0.0, 60.0)
    assert not endpoint.rotate("b", 1.0, 60.0)
    assert endpoint.rotate("b", 60.0, 60.0)
    assert endpoint.api_key == "a"


def test_a_single_key_or_none_is_never_changed():
    for endpoint in (with_keys("a"), an_endpoint()):
        before = endpoint.api_key
        assert not endpoint.rotate(before, 0.0, 60.0)
        assert endpoint.api_key == before

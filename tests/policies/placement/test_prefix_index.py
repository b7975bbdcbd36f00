from backends.load import EndpointLoad
from policies.placement.ask import Ask
from policies.placement.prefix_index import ApproximateIndex

A, B = EndpointLoad("a", b"a"), EndpointLoad("b", b"b")


def an_ask(*prefixes):
    return Ask(prefixes=prefixes, prefix_bytes=tuple(100 * (n + 1) for n in range(len(prefixes))))


def test_the_longest_beginning_of_each_endpoint_counts():
    index = ApproximateIndex(100)
    index.add(A, an_ask(1, 2, 3))
    index.add(B, an_ask(1, 9))
    assert index.match(an_ask(1, 2, 3, 4)) == {b"a": 300, b"b": 100}
    assert index.match(an_ask(7)) == {}


def test_an_endpoint_remembers_no_more_than_its_capacity_the_oldest_forgotten_first():
    index = ApproximateIndex(4)
    index.add(A, an_ask(1, 2))
    index.add(A, an_ask(3, 4))
    index.add(A, an_ask(1, 2))  # used again
    index.add(A, an_ask(5, 6))
    assert index.match(an_ask(1, 2)) == {b"a": 200}
    assert index.match(an_ask(3, 4)) == {}


def test_of_a_prompt_the_end_is_forgotten_before_the_beginning():
    index = ApproximateIndex(3)
    index.add(A, an_ask(1, 2, 3))
    index.add(A, an_ask(9))
    assert index.match(an_ask(1, 2, 3)) == {b"a": 200}


def test_endpoints_that_are_gone_leave_nothing_behind():
    index = ApproximateIndex(100)
    for endpoint in (A, B):
        index.add(endpoint, an_ask(1, 2))
    index.keep_only([B])
    assert index.match(an_ask(1, 2)) == {b"b": 200}
    index.forget(b"b")
    index.forget(b"never seen")
    assert index.match(an_ask(1, 2)) == {}
    assert not index._holders

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.pool import Pool
from policies.routing import Target
from policies.rules.split import Split
from tests.support.builders import a_free_price
from tests.support.properties import STEADY

REQUESTS = 20_000


def a_target(name: str) -> Target:
    return Target(name, Pool(name, ()), "m", a_free_price())


def a_split(**weights: float) -> Split:
    return Split([a_target(name) for name in weights], list(weights.values()), "session")


def keys(count: int = REQUESTS) -> list[int]:
    draw = random.Random(7)
    return [draw.getrandbits(64) for _ in range(count)]


def firsts(split: Split) -> list[str]:
    return [split.draw(key)[0].name for key in keys()]


@pytest.mark.parametrize("weights", [{"a": 95, "b": 5}, {"a": 1, "b": 1, "c": 2}, {"a": 0.3, "b": 0.7}])
def test_requests_divide_as_the_weights_say(weights):
    split, drawn = a_split(**weights), firsts(a_split(**weights))
    for name, weight in weights.items():
        share = weight / sum(weights.values())
        assert drawn.count(name) / REQUESTS == pytest.approx(share, abs=0.012)
        assert split.shares()[f"{name}/m"] == pytest.approx(share)


def test_a_canary_that_grows_keeps_everyone_it_had():
    before, after = firsts(a_split(stable=95, canary=5)), firsts(a_split(stable=90, canary=10))
    assert all(b == "canary" for a, b in zip(before, after, strict=True) if a == "canary")
    assert sum(a != b for a, b in zip(before, after, strict=True)) / REQUESTS == pytest.approx(0.05, abs=0.01)


def test_the_order_of_the_list_changes_nothing():
    assert firsts(a_split(a=3, b=1)) == firsts(a_split(b=1, a=3))


def test_what_has_no_weight_comes_last_in_its_order():
    split = a_split(spare=0, a=1, other=0, b=1)
    for key in keys(100):
        drawn = [target.name for target in split.draw(key)]
        assert set(drawn[:2]) == {"a", "b"}
        assert drawn[2:] == ["spare", "other"]


@STEADY
@given(st.integers(0, 2**64 - 1), st.lists(st.floats(0.01, 1000), min_size=1, max_size=6))
def test_a_key_always_draws_the_same_and_nothing_is_lost(key, weights):
    split = a_split(**{f"t{n}": weight for n, weight in enumerate(weights)})
    drawn = split.draw(key)
    assert drawn == split.draw(key)
    assert len({target.name for target in drawn}) == len(weights)

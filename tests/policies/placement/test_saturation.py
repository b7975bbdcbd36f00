import pytest

from backends.load import EndpointLoad
from policies.placement.saturation import has_room, pool_saturation, saturation


def test_nothing_is_full_of_which_no_limit_is_known():
    endpoint = EndpointLoad("e", b"e")
    endpoint.in_flight = 10_000
    assert saturation(endpoint, 0.0) == 0.0


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"in_flight": 5}, 0.5),
        ({"in_flight": 10}, 1.0),
        ({"waiting": 5}, 1.0),
        ({"waiting": 1, "kv_usage": 0.4}, 0.5),
        ({"kv_usage": 0.8}, 1.0),
        ({"in_flight": 3, "in_flight_at_scrape": 3, "waiting": 2, "kv_usage": 0.1}, 0.4),
        ({"running": 20}, 2.0),  # others send there, too
    ],
)
def test_item_12_saturation_is_the_worst_of_what_is_known(figures, expected):
    endpoint = EndpointLoad("e", b"e", max_in_flight=10, max_waiting=5)
    endpoint.fresh_until = 1.0
    for name, value in figures.items():
        setattr(endpoint, name, value)
    assert saturation(endpoint, 0.0) == pytest.approx(expected)
    assert has_room(endpoint, 0.0) is (expected < 1.0)


def test_stale_figures_fill_nobody():
    endpoint = EndpointLoad("e", b"e", max_in_flight=10, max_waiting=5)
    endpoint.waiting, endpoint.kv_usage, endpoint.fresh_until = 50, 1.0, 1.0
    assert saturation(endpoint, 1.0) == 0.0


def test_a_pool_is_as_full_as_its_endpoints_are_on_average_and_full_without_any():
    pool = [EndpointLoad(name, b"", max_in_flight=10) for name in "ab"]
    pool[0].in_flight = 10
    assert pool_saturation(pool, 0.0) == 0.5
    assert pool_saturation([], 0.0) == 1.0

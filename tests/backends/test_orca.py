"""An engine's load on the head of its answers."""

import pytest

from backends.load import EndpointLoad
from backends.orca import Orca, read

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n\r\n"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (
            b"TEXT named_metrics.num_requests_waiting=3.0, named_metrics.kv_cache_usage_perc=0.25",
            {"num_requests_waiting": 3.0, "kv_cache_usage_perc": 0.25},
        ),
        (
            b"text named_metrics.num_requests_waiting=1, named_metrics.num_requests_waiting=4",
            {"num_requests_waiting": 4.0},
        ),
        (b'JSON {"named_metrics": {"num_requests_waiting": 2.0}}', {"num_requests_waiting": 2.0}),
        (b'JSON {"cpu_utilization": 0.3}', {}),
        (b"JSON {", {}),
        (b'JSON {"named_metrics": {"num_requests_waiting": "many"}}', {}),
        (b"TEXT named_metrics.num_requests_waiting=1.2.3", {}),
        (b"TEXT named_metrics.num_requests_waiting=-5", {"num_requests_waiting": 0.0}),
        (b"TEXT named_metrics.num_requests_waiting=1e999", {}),
        (b"BIN CgQ=", {}),
        (b"", {}),
    ],
)
def test_both_forms_are_read_and_nothing_else(value, told):
    assert read(value) == told


def test_only_some_requests_ask():
    orca = Orca("text", 0.25)
    asked = [b"endpoint-load-metrics-format: TEXT\r\n" in orca.ask(HEAD, n * 0.05) for n in range(20)]
    assert asked.count(True) == 4
    assert Orca("json", 1.0).ask(HEAD, 5.0) == HEAD[:-2] + b"endpoint-load-metrics-format: JSON\r\n\r\n"


def test_what_is_told_counts_as_load_for_a_while():
    orca, load = Orca("text", 0.25), EndpointLoad("gpu/0", b"a")
    orca.heed(
        load, b"TEXT named_metrics.num_requests_waiting=7.0, named_metrics.kv_cache_usage_perc=0.5", 100.0
    )
    assert (load.waiting, load.kv_usage, load.requests(100.5)) == (7, 0.5, 7)
    assert load.requests(101.0) == 0


def test_an_answer_that_says_nothing_changes_nothing():
    orca, load = Orca("text", 0.25), EndpointLoad("gpu/0", b"a")
    for value in (None, b"", b"TEXT named_metrics.cpu=1.0"):
        orca.heed(load, value, 100.0)
    assert (load.scraped_at, load.fresh_until) == (0.0, 0.0)


def test_what_was_scraped_and_is_fresh_stays_and_what_is_old_goes():
    orca, load = Orca("text", 0.25), EndpointLoad("gpu/0", b"a")
    load.running, load.fresh_until = 5, 103.0
    orca.heed(load, b"TEXT named_metrics.num_requests_waiting=1.0", 101.0)
    assert (load.requests(102.0), load.fresh_until) == (6, 103.0)
    orca.heed(load, b"TEXT named_metrics.num_requests_waiting=1.0", 110.0)
    assert load.requests(110.1) == 1

from prometheus_client.parser import text_string_to_metric_families

from gateway.control import Samples, Snapshot
from gateway.exposition import Page


def a_snapshot(requests: int, connections: int, counts: list[int], **money: int) -> Snapshot:
    return {
        "headgate_requests_total": Samples("counter", "Requests.", ["dialect"], [(["chat"], requests)]),
        "headgate_connections": Samples("gauge", "Open.", [], [([], connections)]),
        "headgate_stage_seconds": Samples(
            "histogram", "Time.", ["stage"], [(["read"], [*counts, 1.5])], [0.5, 1.0]
        ),
        **{
            f"headgate_{name}_total": Samples(
                "counter", "Money.", ["provider", "model"], [(["p", "m"], value)]
            )
            for name, value in money.items()
        },
    }


def parsed(page: Page) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page.render().decode())
        for sample in family.samples
    }


CHAT = (("dialect", "chat"),)


def test_counters_gauges_and_histograms_of_all_workers_are_added_up():
    page = Page("1.2.3")
    page.totals.update("w1", a_snapshot(10, 3, [1, 2, 3]))
    page.totals.update("w2", a_snapshot(5, 4, [1, 0, 0]))
    values = parsed(page)
    assert values["headgate_requests_total", CHAT] == 15
    assert values["headgate_connections", ()] == 7
    bucket = "headgate_stage_seconds_bucket"
    assert values[bucket, (("le", "0.5"), ("stage", "read"))] == 2
    assert values[bucket, (("le", "1"), ("stage", "read"))] == 4
    assert values[bucket, (("le", "+Inf"), ("stage", "read"))] == 7
    assert values["headgate_stage_seconds_count", (("stage", "read"),)] == 7
    assert values["headgate_stage_seconds_sum", (("stage", "read"),)] == 3.0
    assert values["headgate_build_info", (("version", "1.2.3"),)] == 1


def test_counters_never_go_backwards_when_a_worker_is_replaced():
    page = Page("1")
    page.totals.update("w1", a_snapshot(10, 3, [1, 2, 3]))
    page.totals.retire("w1")
    page.totals.update("w2", a_snapshot(1, 1, [0, 0, 1]))
    page.totals.retire("w3")  # died before it had counted anything
    values = parsed(page)
    assert values["headgate_requests_total", CHAT] == 11
    assert values["headgate_stage_seconds_count", (("stage", "read"),)] == 7
    assert values["headgate_connections", ()] == 1, "a gauge of a worker that is gone means nothing"


def test_a_newer_snapshot_replaces_the_older_one_of_the_same_worker():
    page = Page("1")
    page.totals.update("w1", a_snapshot(10, 3, [1, 2, 3]))
    page.totals.update("w1", a_snapshot(12, 2, [1, 2, 4]))
    assert parsed(page)["headgate_requests_total", CHAT] == 12
    assert parsed(page)["headgate_requests_total", CHAT] == 12, "rendering changes nothing"


def test_dollars_and_the_share_of_known_spend_are_derived():
    page = Page("1")
    assert parsed(page)["headgate_spend_capture_ratio", ()] == 1
    page.totals.update(
        "w1", a_snapshot(4, 0, [0, 0, 0], cost_nanousd=1_500_000_000, billed_requests=4, priced_requests=3)
    )
    values = parsed(page)
    assert values["headgate_cost_usd_total", (("model", "m"), ("provider", "p"))] == 1.5
    assert values["headgate_cost_nanousd_total", (("model", "m"), ("provider", "p"))] == 1_500_000_000
    assert values["headgate_spend_capture_ratio", ()] == 0.75


def test_label_values_are_escaped():
    page = Page("1")
    page.totals.update("w1", {"x_total": Samples("counter", "X.", ["model"], [(['a"b\n\\'], 1)])})
    assert parsed(page)["x_total", (("model", 'a"b\n\\'),)] == 1


def test_the_parents_counters_stand_at_zero_from_the_first_scrape():
    text = Page("1").render().decode()
    for result in ("applied", "refused", "failed"):
        assert f'headgate_config_reloads_total{{result="{result}"}} 0.0' in text
    for reason in ("crashed", "hung", "rotated"):
        assert f'headgate_worker_restarts_total{{reason="{reason}"}} 0.0' in text
    assert "_created" not in text

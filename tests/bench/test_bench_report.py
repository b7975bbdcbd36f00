"""The report: what its figures are made of, and that goals can be missed."""

from bench import report
from bench.scenarios import SCENARIOS, Run

JSON2K = next(scenario for scenario in SCENARIOS if scenario.name == "json2k")
PACED = next(scenario for scenario in SCENARIOS if scenario.name == "paced")
OPEN = next(scenario for scenario in SCENARIOS if scenario.name == "open")


def run(scenario: str, target: str, number: int, **figures: object) -> Run:
    given = {
        "completed": 100,
        "chunks": 0,
        "reads": 0,
        "seconds": 1.0,
        "worker_cpu_us": 2000.0,
        "parent_cpu_us": 0.0,
        "rss_mb": 50.0,
        "parent_rss_mb": 0.0,
        "other_cores": 0.0,
    }
    return Run(scenario, target, number, **(given | figures))  # type: ignore[arg-type]  # a mapping of mixed figures


def test_the_ratio_is_that_of_the_medians_over_the_rounds() -> None:
    runs = [run("json2k", "nginx", i, worker_cpu_us=cpu) for i, cpu in enumerate((1900.0, 2000.0, 9000.0))]
    runs += [run("json2k", "headgate", i, worker_cpu_us=cpu) for i, cpu in enumerate((6000.0, 100.0, 7000.0))]
    assert report.cpu_ratio([JSON2K], runs, "json2k", "headgate") == 3.0
    assert report.cpu_ratio([JSON2K], runs, "json2k", "litellm") is None
    assert report.cpu_ratio([JSON2K], runs, "paced", "headgate") is None


def test_a_parents_cpu_counts_and_streams_are_divided_by_chunks() -> None:
    assert report.cpu_us(run("json2k", "headgate", 0, parent_cpu_us=1000.0), JSON2K) == 30.0
    assert report.cpu_us(run("paced", "headgate", 0, chunks=1000), PACED) == 2.0


def test_added_latency_is_taken_round_by_round() -> None:
    runs = [
        run("open", name, i, latency={"p50": p50})
        for name, figures in (
            ("direct", (20_000.0, 30_000.0, 21_000.0)),
            ("headgate", (20_400.0, 30_300.0, 21_900.0)),
        )
        for i, p50 in enumerate(figures)
    ]
    assert report.added(runs, "headgate", "latency", "p50") == 400.0
    assert report.added(runs, "direct", "latency", "p50") == 0.0
    assert report.added(runs, "nginx", "latency", "p50") is None


def test_goals_say_missed_met_or_aim_reached() -> None:
    runs = [run("json2k", "nginx", 0)]
    for cpu_us, verdict in ((9000.0, "MISSED"), (7000.0, "met"), (5000.0, "aim reached")):
        found = report.goals(
            [JSON2K], [*runs, run("json2k", "headgate", 0, worker_cpu_us=cpu_us)], [], "headgate"
        )
        rows = {goal.text: goal.row() for goal in found}
        assert rows["JSON 2 KB, CPU x nginx"][-1] == verdict
        assert rows["JSON 1 KB, CPU x nginx"][1] == "not measured"


def test_merged_chunks_and_wrong_answers_are_reported_for_judged_targets_only() -> None:
    runs = [
        run("paced", "headgate", 0, chunks=1000, reads=500),
        run("paced", "nginx", 0, chunks=1000, reads=990),
        run("json2k", "litellm", 0, faults={"short": 3}),
    ]
    assert len(report.faults_of(runs, ["nginx", "headgate"])) == 1
    assert "merged" in report.faults_of(runs, ["nginx", "headgate"])[0]
    assert len(report.faults_of(runs, ["litellm"])) == 1


def test_the_same_runs_give_the_same_report() -> None:
    runs = [run("json2k", name, i) for i in range(3) for name in ("nginx", "headgate")]
    runs += [
        run("open", name, 0, latency={"p50": 1.0, "p90": 2.0, "p99": 3.0}) for name in ("direct", "headgate")
    ]
    standings = [report.Standing("headgate", "abc", 40.0, 30.0, 1.5, 41.0, 0.9)]
    text = report.results([JSON2K, OPEN], runs, standings, {"date": "2025-11-20"})
    assert text == report.results([JSON2K, OPEN], runs, standings, {"date": "2025-11-20"})
    assert "| headgate | 20.0 (20.0-20.0) | - " in text
    assert "MISSED" not in text

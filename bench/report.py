"""Medians, ranges, ratios to nginx, the goals, and RESULTS.md made of them.

Pure functions of the runs and of what is known about the machine: the same measurements give the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from bench.scenarios import Run, Scenario

REFERENCE = "nginx"
PRODUCTS = ("headgate", "headgate-compiled")  # what the goals are for
MERGED_BAR = 0.8  # reads per chunk; below it, with nothing saturated, chunks were held back


class Standing(NamedTuple):
    """What a target takes without being asked anything: memory in MB of its largest worker and of its parent, idle CPU in ms/s, seconds
    from its launch to its first answer."""

    target: str
    version: str
    idle_rss_mb: float
    parent_rss_mb: float
    idle_cpu_ms_per_s: float
    after_rss_mb: float
    start_s: float


@dataclass(frozen=True)
class Goal:
    text: str
    figure: float | None
    must: float
    aim: float | None = None
    is_at_least: bool = False

    def row(self) -> list[str]:
        sign = ">=" if self.is_at_least else "<="
        aim = "-" if self.aim is None else f"{sign} {self.aim:g}"
        if self.figure is None:
            return [self.text, "not measured", f"{sign} {self.must:g}", aim, "-"]
        return [
            self.text,
            f"{self.figure:.2f}",
            f"{sign} {self.must:g}",
            aim,
            self.verdict(round(self.figure, 2)),
        ]

    def verdict(self, figure: float) -> str:
        if self.aim is not None and self._reaches(figure, self.aim):
            return "aim reached"
        return "met" if self._reaches(figure, self.must) else "MISSED"

    def _reaches(self, figure: float, bar: float) -> bool:
        return figure >= bar if self.is_at_least else figure <= bar


def units(run: Run, scenario: Scenario) -> int:
    return run.chunks if scenario.unit == "chunk" else run.completed


def cpu_us(run: Run, scenario: Scenario) -> float:
    """CPU per unit, all of the target's processes together."""
    return (run.worker_cpu_us + run.parent_cpu_us) / max(1, units(run, scenario))


def faults_of(runs: Sequence[Run], judged: Sequence[str]) -> list[str]:
    """What was wrong with the answers of the judged targets, merged chunks at an easy pace included."""
    wrong = [
        f"{r.scenario}, {r.target}, round {r.round + 1}: {r.faults} {r.notes}"
        for r in runs
        if r.faults and r.target in judged
    ]
    for name in judged:
        for scenario in ("paced", "spread"):
            shares = [r.reads / max(1, r.chunks) for r in runs if r.target == name and r.scenario == scenario]
            if shares and median(shares) < MERGED_BAR:
                wrong.append(f"{scenario}, {name}: chunks came merged, {median(shares):.2f} reads per chunk")
    return wrong


def targets_of(runs: Sequence[Run]) -> list[str]:
    """In the order of the first round, the mock first."""
    names = dict.fromkeys(run.target for run in runs)
    return sorted(names, key=lambda name: name != "direct")


def tables(chosen: Sequence[Scenario], runs: Sequence[Run], *, quick: bool) -> str:
    lines = []
    for scenario in chosen:
        mine = [run for run in runs if run.scenario == scenario.name]
        lines += [
            f"### {scenario.name}: {scenario.title}",
            "",
            *scenario_table(scenario, mine, quick=quick),
            "",
        ]
    return "\n".join(lines)


def scenario_table(scenario: Scenario, runs: Sequence[Run], *, quick: bool) -> list[str]:
    reference = [cpu_us(run, scenario) for run in runs if run.target == REFERENCE]
    is_stream = scenario.shape(quick=quick)[1] > 0
    is_open = scenario.is_open_loop
    head = ["target", f"CPU us/{scenario.unit}", "of it parent", "x nginx", f"{scenario.unit}s/s"]
    head += ["first p50", "relay p50", "relay p99", "reads/chunk"] if is_stream else ["p50", "p99"]
    head += ["added p50", "added p90", "added p99"] if is_open else []
    head.append("other load")
    rows = []
    for name in targets_of(runs):
        mine = [run for run in runs if run.target == name]
        row = [name, *cpu_cells(scenario, mine, reference)]
        row.append(f"{max(units(run, scenario) / run.seconds for run in mine):,.0f}")
        if is_stream:
            row += [best(mine, "first", "p50"), best(mine, "relay", "p50"), best(mine, "relay", "p99")]
            row.append(f"{median([run.reads / max(1, run.chunks) for run in mine]):.3f}")
        else:
            row += [best(mine, "latency", "p50"), best(mine, "latency", "p99")]
        if is_open:
            kind = "first" if is_stream else "latency"
            row += [number(added(runs, name, kind, share)) for share in ("p50", "p90", "p99")]
        row.append(f"{median([run.other_cores for run in mine]):.1f}")
        rows.append(row)
    return aligned([head, *rows])


def cpu_cells(scenario: Scenario, runs: Sequence[Run], reference: Sequence[float]) -> list[str]:
    figures = [cpu_us(run, scenario) for run in runs]
    parents = [run.parent_cpu_us / max(1, units(run, scenario)) for run in runs]
    ratio = f"{median(figures) / median(reference):.2f}" if reference else "-"
    return [spread(figures), f"{median(parents):.1f}" if any(parents) else "-", ratio]


def ratio_table(chosen: Sequence[Scenario], runs: Sequence[Run]) -> list[str]:
    """CPU as a multiple of nginx's, one line for each scenario, one column for each target."""
    names = [name for name in targets_of(runs) if name != "direct"]
    rows = [["CPU, x nginx", *names]]
    for scenario in chosen:
        ratios = [cpu_ratio(chosen, runs, scenario.name, name) for name in names]
        rows.append([scenario.name, *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    return aligned(rows)


def cpu_ratio(
    chosen: Sequence[Scenario], runs: Sequence[Run], scenario_name: str, target: str
) -> float | None:
    """The ratio of the medians over the rounds; None when one of the two was not run."""
    scenario = next((s for s in chosen if s.name == scenario_name), None)
    if scenario is None:
        return None
    mine, reference = (
        [cpu_us(run, scenario) for run in runs if run.scenario == scenario_name and run.target == name]
        for name in (target, REFERENCE)
    )
    return median(mine) / median(reference) if mine and reference else None


def added(runs: Sequence[Run], target: str, kind: str, share: str) -> float | None:
    """Latency in us over the mock hit directly, each round against its own direct run; the median of the rounds."""
    direct = {
        run.round: getattr(run, kind)[share] for run in runs if run.target == "direct" and getattr(run, kind)
    }
    found = [
        getattr(run, kind)[share] - direct[run.round]
        for run in runs
        if run.target == target and run.round in direct and getattr(run, kind)
    ]
    return median(found) if found else None


def goals(
    chosen: Sequence[Scenario], runs: Sequence[Run], standings: Sequence[Standing], target: str
) -> list[Goal]:
    ratio = {s.name: cpu_ratio(chosen, runs, s.name, target) for s in chosen}
    many = [run for run in runs if run.scenario == "streams1000" and run.target == target]
    opened = [run for run in runs if run.scenario == "open"]
    mine, theirs = (added(opened, name, "latency", "p50") for name in (target, REFERENCE))
    standing = next((s for s in standings if s.target == target), None)
    wrong = [sum(run.faults.values()) for run in runs if run.target == target]
    relays = [run.relay["p50"] / 1000 for run in many if run.relay]
    return [
        Goal("JSON 1 KB, CPU x nginx", ratio.get("json1k"), 4, 3),
        Goal("JSON 2 KB, CPU x nginx", ratio.get("json2k"), 4, 3),
        Goal("paced SSE, CPU per chunk x nginx", ratio.get("paced"), 2, 1.6),
        Goal("200 KB body, CPU x nginx", ratio.get("body200k"), 2.5),
        Goal("1 MB body, CPU x nginx", ratio.get("body1m"), 2.5),
        Goal("1,000 streams: relayed whole, share", whole_share(many), 1, None, is_at_least=True),
        Goal(
            "1,000 streams: reads per chunk",
            mid([r.reads / max(1, r.chunks) for r in many]),
            0.95,
            None,
            is_at_least=True,
        ),
        Goal("1,000 streams: relay p50, ms", min(relays) if relays else None, 2, 0.5),
        Goal("added p50 at 40 requests/s, x nginx's", mine / theirs if mine and theirs else None, 2, 1),
        Goal("JSON 2 KB, us more with three levels of limits", limits_us(chosen, runs, target), 12),
        Goal("RSS of a worker idle, MB", standing.idle_rss_mb if standing else None, 80),
        Goal("RSS of a worker with 1,000 streams, MB", max((r.rss_mb for r in many), default=None), 120),
        Goal("wrong answers in all runs", float(sum(wrong)) if wrong else None, 0),
    ]


def limits_us(chosen: Sequence[Scenario], runs: Sequence[Run], target: str) -> float | None:
    """CPU per request of the target with limits less that without, medians of one run over both."""
    scenario = next((s for s in chosen if s.name == "json2k"), None)
    if scenario is None:
        return None
    medians = [
        mid([cpu_us(r, scenario) for r in runs if r.scenario == "json2k" and r.target == name])
        for name in (target, f"{target}-limits")
    ]
    without, limited = medians
    return limited - without if limited is not None and without is not None else None


def whole_share(runs: Sequence[Run]) -> float | None:
    wanted = sum(run.completed + sum(run.faults.values()) for run in runs)
    return sum(run.completed for run in runs) / wanted if wanted else None


def mid(figures: Sequence[float]) -> float | None:
    return median(figures) if figures else None


def goal_tables(chosen: Sequence[Scenario], runs: Sequence[Run], standings: Sequence[Standing]) -> list[str]:
    """One for each build of the product that was measured."""
    measured = {run.target for run in runs}
    lines = []
    for target in PRODUCTS:
        if target in measured:
            lines += [f"{target}:", "", *goal_table(goals(chosen, runs, standings, target)), ""]
    return lines


def goal_table(reached: Sequence[Goal]) -> list[str]:
    return aligned([["goal", "measured", "must", "aim", ""], *(goal.row() for goal in reached)])


def standing_table(standings: Sequence[Standing], runs: Sequence[Run]) -> list[str]:
    rows = [
        [
            "target",
            "RSS MB idle",
            "with 1,000 streams",
            "after all runs",
            "parent",
            "idle CPU ms/s",
            "start s",
        ]
    ]
    for one in standings:
        many = [run.rss_mb for run in runs if run.scenario == "streams1000" and run.target == one.target]
        rows.append(
            [
                one.target,
                f"{one.idle_rss_mb:.0f}",
                f"{max(many):.0f}" if many else "-",
                f"{one.after_rss_mb:.0f}",
                f"{one.parent_rss_mb:.0f}" if one.parent_rss_mb else "-",
                f"{one.idle_cpu_ms_per_s:.1f}",
                f"{one.start_s:.1f}",
            ]
        )
    return aligned(rows)


def results(
    chosen: Sequence[Scenario], runs: Sequence[Run], standings: Sequence[Standing], about: Mapping[str, str]
) -> str:
    """The whole of RESULTS.md."""
    others = [run.other_cores for run in runs]
    rounds = max(run.round for run in runs) + 1
    lines = [
        "# Bench results",
        "",
        "Written by `python -m bench`; the method is in [README.md](README.md). CPU: median over the rounds (range), all processes of",
        "the target. Requests per second and latencies (us): the best round. Added latency: over the mock hit directly in the same",
        f"round, median. Other load: cores used by other programs. Rounds: {rounds}; other programs used {median(others):.1f} cores in the median run, {max(others):.1f} at most.",
        "",
        "- **headgate**: accounting on (key, limits, affinity, price, ledger row, metrics). **headgate-off**: the same program with",
        "  what can be switched off switched off. **headgate-compiled**: accounting on, the compiled wheel (`make compiled`).",
        "",
        *aligned([["", ""], *([name, value] for name, value in about.items())]),
        "",
        "## Goals",
        "",
        *goal_tables(chosen, runs, standings),
        "## CPU against nginx",
        "",
        *ratio_table(chosen, runs),
        "",
        "## Memory and rest",
        "",
        *standing_table(standings, runs),
        "",
        "## Scenarios",
        "",
        tables(chosen, runs, quick=False).rstrip(),
    ]
    wrong = faults_of(runs, targets_of(runs))
    lines += ["", "## Wrong answers", "", *(f"- {line}" for line in wrong)] if wrong else []
    return "\n".join(lines) + "\n"


def number(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:,.0f}"


def spread(figures: Sequence[float]) -> str:
    if len(figures) == 1:
        return f"{figures[0]:.1f}"
    return f"{median(figures):.1f} ({min(figures):.1f}-{max(figures):.1f})"


def best(runs: Sequence[Run], kind: str, share: str) -> str:
    """The lowest of the rounds: other load on the machine only ever makes a latency worse."""
    found = [getattr(run, kind)[share] for run in runs if getattr(run, kind)]
    return number(min(found) if found else None)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A markdown table, padded so that it reads in a terminal too."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return lines

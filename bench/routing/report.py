"""RESULTS.md out of figures: tables, goals met or missed, and two pictures. Measures nothing itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.routing import plots
from bench.routing.figures import Figures
from bench.routing.scenarios import PRICED_AS, SLO_S, Change, Flood, Scaled, at_slo

Series = Sequence[tuple[int, Figures]]
Row = Sequence[object]


@dataclass(slots=True)
class Findings:
    """All that a run found out, by policy (or by a situation's name). What was not run is empty."""

    about: dict[str, str] = field(default_factory=dict)
    working_set: float = 0.0
    agents: dict[str, Figures] = field(default_factory=dict)
    load: dict[str, Series] = field(default_factory=dict)
    decode: dict[str, Figures] = field(default_factory=dict)
    flood: dict[str, Flood] = field(default_factory=dict)
    change: dict[str, Change] = field(default_factory=dict)
    keys_moved: dict[str, tuple[float, float]] = field(default_factory=dict)
    prices: dict[str, tuple[float, float]] = field(default_factory=dict)  # dollars in all, and for answers
    recorded: dict[str, Figures] = field(default_factory=dict)
    scaled: list[Scaled] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Goal:
    text: str
    figure: float
    bound: float
    is_floor: bool = True

    def row(self) -> Row:
        is_met = self.figure >= self.bound if self.is_floor else self.figure <= self.bound
        sign = "at least" if self.is_floor else "at most"
        return (self.text, f"{self.figure:.3g}", f"{sign} {self.bound:g}", "met" if is_met else "MISSED")


def goals(found: Findings) -> list[Goal]:
    """Of issue 4; only those whose situation was run."""
    made: list[Goal] = []
    turns, pure = found.agents.get("round-robin"), found.agents.get("pure-affinity")
    for policy in ("session", "prefix"):
        own = found.agents.get(policy)
        if own and turns:
            made.append(Goal(f"{policy}: hit rate x round-robin's", own.hit_rate / turns.hit_rate, 2.5))
            made.append(Goal(f"{policy}: first token p50, times better", turns.ttft_p50 / own.ttft_p50, 2.0))
            made.append(Goal(f"{policy}: max/mean load", own.balance, 1.25, is_floor=False))
        if own and pure:
            points = 100 * (pure.hit_rate - own.hit_rate)
            made.append(
                Goal(f"{policy}: points of hit rate below pure affinity", points, 2.0, is_floor=False)
            )
        if policy in found.decode and "round-robin" in found.decode:
            ratio = found.decode[policy].output_per_s / found.decode["round-robin"].output_per_s
            made.append(Goal(f"{policy}: decode-bound output x round-robin's", ratio, 0.97))
        if policy in found.flood:
            made.append(
                Goal(
                    f"{policy}: the worst replica's hit rate in a flood",
                    found.flood[policy].worst_replica,
                    0.5,
                )
            )
    return made


def markdown(found: Findings, folder: Path) -> str:
    """The whole report; pictures are written to `folder`/plots."""
    parts = [
        "# Results of the proving ground",
        "",
        "Written by `python -m bench.routing`; what is measured and how: [README.md](README.md).",
        "",
    ]
    parts += [f"{name}: {value}" + "  " for name, value in found.about.items()]
    made = goals(found)
    if made:
        parts += [
            "",
            "## Goals (issue 4)",
            "",
            *table(("goal", "figure", "bound", ""), [goal.row() for goal in made]),
        ]
    if found.agents:
        parts += [
            "",
            "## Agents",
            "",
            f"Contexts under way are {found.working_set:.0%} of the pool's KV memory, on average.",
            "",
        ]
        parts += figures_table(found.agents)
    if found.load:
        path = plots.against_load(found.load, SLO_S, folder / "plots")
        rows = [
            (policy, f"{at_slo(series):.1f}", f"{max(f.per_s for _, f in series):.1f}")
            for policy, series in found.load.items()
        ]
        parts += ["", "## Against load", "", f"![load](plots/{path.name})", ""]
        parts += table(
            ("policy", f"requests/s at first token p90 <= {SLO_S:g} s", "most requests/s seen"), rows
        )
    if found.decode:
        parts += ["", "## Decode-bound", "", *figures_table(found.decode, outputs=True)]
    if found.flood:
        rows = [
            (
                policy,
                *(
                    f"{100 * rate:.1f} %"
                    for rate in (f.before, f.during, f.after, f.worst_replica, f.flood_hit_rate)
                ),
                f"{f.ttft_p90:.2f}",
                f"{f.flood_ttft_p90:.2f}",
                f.preemptions,
            )
            for policy, f in found.flood.items()
        ]
        head = (
            "policy",
            "others before",
            "during",
            "after",
            "worst replica, all",
            "flood",
            "others p90 s",
            "flood p90 s",
            "pre-empted",
        )
        parts += ["", "## A flood by one session (hit rates, first tokens)", "", *table(head, rows)]
    if found.change:
        rows = [
            (policy, *(f"{100 * share:.1f} %" for share in asdict(c).values()))
            for policy, c in found.change.items()
        ]
        head = (
            "policy",
            "moved, one of ten leaves",
            "of them bystanders",
            "moved, it returns",
            "hit rate before",
            "without it",
            "after",
        )
        parts += ["", "## A replica leaves and comes back", "", *table(head, rows), ""]
        rows = [
            (policy, f"{100 * left:.1f} %", f"{100 * joined:.1f} %")
            for policy, (left, joined) in found.keys_moved.items()
        ]
        parts += table(("keys moved", "one of ten leaves", "one joins ten"), rows)
    if found.prices:
        parts += ["", "## The same conversations, priced", "", *_prices(found.prices, folder)]
    if found.recorded:
        parts += ["", "## A recorded trace", "", *figures_table(found.recorded)]
    if found.scaled:
        rows = [
            (
                s.replicas,
                f"{s.requests:,}",
                f"{s.simulated_s:,.0f}",
                f"{s.cpu_s:,.0f}",
                f"{s.requests / s.cpu_s:,.0f}",
                f"{s.simulated_s / s.cpu_s:.1f}",
                f"{100 * s.hit_rate:.1f} %",
                f"{s.balance:.2f}",
            )
            for s in found.scaled
        ]
        head = (
            "replicas",
            "requests",
            "simulated s",
            "CPU s",
            "requests per CPU s",
            "x real time",
            "hit rate",
            "max/mean",
        )
        parts += ["", "## The simulation's own speed (`session`, one core)", "", *table(head, rows)]
    return "\n".join(parts) + "\n"


def _prices(prices: Mapping[str, tuple[float, float]], folder: Path) -> list[str]:
    path = plots.prices(prices, folder / "plots")
    dearest = prices.get("round-robin", next(iter(prices.values())))[0]
    rows = [
        (
            policy,
            f"{total:.2f}",
            f"{answers:.2f}",
            f"{100 * (1 - total / dearest):.1f} %",
            f"{100 * (1 - (total - answers) / (dearest - answers)):.1f} %",
        )
        for policy, (total, answers) in prices.items()
    ]
    head = ("policy", "dollars", "of which answers", "less than round-robin", "of prompts alone")
    return [
        f"At the list price of {PRICED_AS[1]}, by the gateway's own rate cards; the replicas' own hits.",
        "",
        f"![price](plots/{path.name})",
        "",
        *table(head, rows),
    ]


def figures_table(by_policy: Mapping[str, Figures], *, outputs: bool = False) -> list[str]:
    head = (
        "policy",
        "hit rate",
        "first token p50 s",
        "p90",
        "p99",
        "requests/s",
        "max/mean load",
        "momentary p50",
        "moved",
        "pre-empted",
    )
    rows = []
    for policy, f in by_policy.items():
        row = [
            policy,
            f"{100 * f.hit_rate:.1f} %",
            f"{f.ttft_p50:.3f}",
            f"{f.ttft_p90:.3f}",
            f"{f.ttft_p99:.3f}",
            f"{f.per_s:.1f}",
            f"{f.balance:.2f}",
            f"{f.momentary_p50:.2f}",
            f"{100 * f.moved:.1f} %",
            f.preemptions,
        ]
        rows.append([*row, f"{f.output_per_s:,.0f}"] if outputs else row)
    return table((*head, "output tokens/s") if outputs else head, rows)


def table(head: Sequence[str], rows: Sequence[Row]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def to_json(found: Findings) -> str:
    return json.dumps(asdict(found), indent=1)

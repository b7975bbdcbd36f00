"""The proving ground's command line: which situations, which policies, how long.

A full run writes RESULTS.md and its plots; every run prints its tables. Exit status: 0, or 1 if a goal of issue 4 is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import native
from bench.machine import processor
from bench.routing import report, scenarios
from bench.routing.baselines import NAMES
from bench.routing.report import Findings
from bench.routing.scenarios import FULL, QUICK, Length

HERE = Path(__file__).resolve().parent
POPULATIONS = (20, 50, 80, 110, 150)
COMPARED = ("session", "prefix", "round-robin", "pure-affinity")
SITUATIONS = ("agents", "load", "decode", "flood", "change", "price", "recorded", "scale")


def main() -> int:
    options = parse()
    length = QUICK if options.quick else FULL
    found = Findings(about=about(length), working_set=scenarios.working_set())
    folder = HERE if options.results is None else options.results.parent
    if options.results is None and (options.quick or options.only):
        folder = native.BUILD / "routing"
        folder.mkdir(parents=True, exist_ok=True)
    native.BUILD.mkdir(exist_ok=True)
    text = ""
    for name in options.only or SITUATIONS:
        if name != "recorded" or options.trace:
            print(f"{name} ...", file=sys.stderr, flush=True)
            RUNS[name](found, length, options)
            # After each, so that a run that is broken off was not for nothing.
            text = report.markdown(found, folder)
            (options.results or folder / "RESULTS.md").write_text(text)
            (native.BUILD / "routing.json").write_text(report.to_json(found))
    print(text)
    return 1 if any(goal.row()[-1] == "MISSED" for goal in report.goals(found)) else 0


def parse() -> argparse.Namespace:
    words = argparse.ArgumentParser(prog="python -m bench.routing", description=__doc__)
    words.add_argument("--only", type=lambda text: text.split(","), help=f"by comma: {', '.join(SITUATIONS)}")
    words.add_argument(
        "--quick", action="store_true", help="one seed, short runs; nothing is written beside this file"
    )
    words.add_argument("--trace", type=Path, help="a file in Mooncake's trace format, for `recorded`")
    words.add_argument("--trace-speed", type=float, default=1.0, help="2 plays it twice as fast")
    words.add_argument("--trace-replicas", type=int, default=16)
    words.add_argument("--million", action="store_true", help="`scale`: a million requests at 100 replicas")
    words.add_argument("--results", type=Path, help="write the report here")
    options = words.parse_args()
    for name in options.only or ():
        if name not in SITUATIONS:
            words.error(f"--only: {name!r} is not one of {', '.join(SITUATIONS)}")
    return options


def about(length: Length) -> dict[str, str]:
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": native.version("git", "-C", str(HERE.parent), "describe", "--always", "--dirty"),
        "processor": processor(),
        "seeds": f"{len(length.seeds)}, each {length.until_s - length.from_s:.0f} s of simulated time after {length.from_s:.0f} s",
    }


def run_agents(found: Findings, length: Length, _: argparse.Namespace) -> None:
    for policy in NAMES:
        found.agents[policy] = scenarios.agents(policy, length)
    for policy in ("session", "prefix"):
        found.agents[f"{policy}, no session named"] = scenarios.agents(policy, length, named=False)
        found.agents[f"{policy}, 4 processes"] = scenarios.agents(policy, length, processes=4)


def run_load(found: Findings, length: Length, _: argparse.Namespace) -> None:
    short = Length(length.seeds[:1], 150.0, 350.0)
    for policy in COMPARED:
        found.load[policy] = scenarios.throughput(policy, short, POPULATIONS)


def run_decode(found: Findings, length: Length, _: argparse.Namespace) -> None:
    short = Length(length.seeds[:1], 60.0, 240.0)
    for policy in COMPARED:
        found.decode[policy] = scenarios.decode_bound(policy, short)


def run_flood(found: Findings, length: Length, _: argparse.Namespace) -> None:
    for policy in COMPARED:
        found.flood[policy] = scenarios.flood(policy, length)


def run_change(found: Findings, length: Length, _: argparse.Namespace) -> None:
    for policy in COMPARED:
        found.change[policy] = scenarios.change(policy, length)
    for policy in ("session", "pure-affinity"):
        found.keys_moved[policy] = scenarios.keys_moved(policy)


def run_price(found: Findings, length: Length, _: argparse.Namespace) -> None:
    for policy in COMPARED:
        found.prices[policy] = scenarios.priced(policy, length)[1:]


def run_recorded(found: Findings, _: Length, options: argparse.Namespace) -> None:
    for policy in NAMES:
        found.recorded[policy] = scenarios.recorded(
            policy, options.trace, options.trace_replicas, options.trace_speed
        )


def run_scale(found: Findings, length: Length, options: argparse.Namespace) -> None:
    sizes = [(100, 50_000), (1000, 50_000)]
    if length is QUICK:
        sizes = [(100, 10_000)]
    if options.million:
        sizes = [(100, 1_000_000)]
    for replicas, requests in sizes:
        found.scaled.append(scenarios.scaled("session", replicas, requests))


RUNS: dict[str, Callable[[Findings, Length, argparse.Namespace], None]] = {
    "agents": run_agents,
    "load": run_load,
    "decode": run_decode,
    "flood": run_flood,
    "change": run_change,
    "price": run_price,
    "recorded": run_recorded,
    "scale": run_scale,
}


if __name__ == "__main__":
    sys.exit(main())

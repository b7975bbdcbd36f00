"""The bench's command line: which scenarios, which targets, how many rounds.

A full run (no --only, no --quick) writes RESULTS.md; every run prints its tables. Exit status: 0 all answers right, 1 wrong answers
of nginx or of ours, 2 something needed is missing. Speed never fails a run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import native, peers, processes, report, targets
from bench.machine import describe
from bench.scenarios import SCENARIOS, Run, Scenario, measure, warm_up
from bench.targets import Mock, Place, Target

FULL_ROUNDS, QUICK_ROUNDS = 3, 1
IDLE_S = 2.0


def main() -> int:
    options = parse()
    chosen = [s for s in SCENARIOS if not options.only or s.name in options.only]
    target_core, load_core = processes.cores()
    if target_core == load_core:
        print("one core only: target and load share it, so only CPU figures mean anything", file=sys.stderr)
    directory = Path(tempfile.mkdtemp(prefix="headgate-bench-"))
    started: list[Target] = []
    mock = None
    try:
        mock = targets.start_mock(load_core)
        start_targets(options, directory, mock, target_core, started)
        standings = [observe(target) for target in started]
        runs = run_rounds(chosen, started, mock, load_core, options)
        standings = [after(standing, target) for standing, target in zip(standings, started, strict=True)]
    except native.BenchError as problem:
        print(problem, file=sys.stderr)
        return 2
    finally:
        for process in [t.process for t in started] + [mock.process if mock else None]:
            if process is not None:
                processes.stop(process)
        if not options.keep:
            shutil.rmtree(directory, ignore_errors=True)
    return conclude(options, chosen, runs, standings)


def parse() -> argparse.Namespace:
    words = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    names = [s.name for s in SCENARIOS]

    def listed(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    words.add_argument("--only", type=listed, default=[], help=f"scenarios, by comma: {', '.join(names)}")
    words.add_argument("--targets", type=listed, help=f"by comma: {', '.join([*targets.STARTERS, 'direct'])}")
    words.add_argument(
        "--with", dest="peers", type=listed, default=[], help=f"peers, by comma: {', '.join(peers.PEERS)}"
    )
    words.add_argument(
        "--peers-dir", type=Path, default=native.BUILD / "peers", help="where peers are installed"
    )
    words.add_argument("--target-cmd", help="measure this command too; {port} and {upstream} are filled in")
    words.add_argument("--rounds", type=int, help=f"{FULL_ROUNDS}; with --quick {QUICK_ROUNDS}")
    words.add_argument("--quick", action="store_true", help="short runs, for CI")
    words.add_argument("--results", type=Path, help="write the report here (a full run: bench/RESULTS.md)")
    words.add_argument(
        "--keep", action="store_true", help="keep the targets' configurations and logs in /tmp"
    )
    options = words.parse_args()
    known = {"--only": names, "--targets": [*targets.STARTERS, "direct"], "--with": [*peers.PEERS]}
    for option, given in (
        ("--only", options.only),
        ("--targets", options.targets or []),
        ("--with", options.peers),
    ):
        for name in given:
            if name not in known[option]:
                words.error(f"{option}: {name!r} is not one of {', '.join(known[option])}")
    if options.results is None and not (
        options.only or options.quick or options.targets or options.target_cmd
    ):
        options.results = native.HERE / "RESULTS.md"
    options.targets = options.targets or list(targets.DEFAULT)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else FULL_ROUNDS)
    return options


def start_targets(
    options: argparse.Namespace, directory: Path, mock: Mock, core: int, started: list[Target]
) -> None:
    """Appends to `started` one by one, so that the caller can stop what did start when one does not."""
    installed = {name: peers.install(name, options.peers_dir) for name in options.peers}
    for name in options.targets:
        if name != "direct":
            print(f"starting {name}", file=sys.stderr)
            started.append(targets.STARTERS[name](Place(directory / name, mock.port, core)))
    for name, home in installed.items():
        print(f"starting {name}", file=sys.stderr)
        started.append(peers.start(name, home, Place(directory / name, mock.port, core)))
    if options.target_cmd:
        started.append(targets.start_command(Place(directory / "cmd", mock.port, core), options.target_cmd))


def observe(target: Target) -> report.Standing:
    """The target at rest, before any load but its warm-up."""
    pids = target.workers() + target.parents()
    cpu_s, from_at = processes.cpu_s(pids), time.monotonic()
    time.sleep(IDLE_S)
    idle = (processes.cpu_s(pids) - cpu_s) * 1000 / (time.monotonic() - from_at)
    rss_mb = processes.rss_mb(target.workers())
    return report.Standing(
        target.name, target.version, rss_mb, processes.rss_mb(target.parents()), idle, rss_mb, target.start_s
    )


def after(standing: report.Standing, target: Target) -> report.Standing:
    return standing._replace(after_rss_mb=processes.rss_mb(target.workers()))


def run_rounds(
    chosen: Sequence[Scenario], started: Sequence[Target], mock: Mock, core: int, options: argparse.Namespace
) -> list[Run]:
    """Every round visits every target, forwards and backwards in turn, so that a drift of the machine meets all alike."""
    direct = targets.start_direct(mock)
    for target in started:
        warm_up(target, core)
    runs = []
    for number in range(options.rounds):
        for scenario in chosen:
            visited = list(started)
            if scenario.with_direct or "direct" in options.targets:
                visited.insert(0, direct)
            for target in visited[:: -1 if number % 2 else 1]:
                run = measure(scenario, target, mock, core, number, quick=options.quick)
                print(progress(run, scenario), file=sys.stderr)
                runs.append(run)
    return runs


def progress(run: Run, scenario: Scenario) -> str:
    text = f"round {run.round + 1} {scenario.name:12} {run.target:14} {report.cpu_us(run, scenario):8.1f} us/{scenario.unit}"
    text += f" {report.units(run, scenario) / run.seconds:10,.0f}/s  other load {run.other_cores:.1f} cores"
    return text + (f"  WRONG {run.faults} {run.notes}" if run.faults else "")


def conclude(
    options: argparse.Namespace,
    chosen: Sequence[Scenario],
    runs: Sequence[Run],
    standings: Sequence[report.Standing],
) -> int:
    print(report.tables(chosen, runs, quick=options.quick))
    print("\n".join(report.ratio_table(chosen, runs)), end="\n\n")
    print("\n".join(report.standing_table(standings, runs)), end="\n\n")
    print("\n".join(report.goal_tables(chosen, runs, standings)), end="\n\n")
    (native.BUILD / "runs.jsonl").write_text("".join(run.to_json() + "\n" for run in runs))
    if options.results:
        about = describe({standing.target: standing.version for standing in standings})
        options.results.write_text(report.results(chosen, runs, standings, about))
        print(f"written: {options.results}")
    judged = [name for name in report.targets_of(runs) if name not in peers.PEERS]
    wrong = report.faults_of(runs, judged)
    print("\n".join(wrong) if wrong else "every answer was right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

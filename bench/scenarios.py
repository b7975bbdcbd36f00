"""What is asked of a target, and one measured run of it.

A run starts the load generator on its core, samples CPU clocks around it and memory in the middle of it, and counts what was wrong.
It judges answers, never speed.
"""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import bodies, native, processes
from bench.targets import KEY, Mock, Target

SETTLE_S = 0.3  # after the last answer, so that work done behind it (a ledger commit) is counted


@dataclass(frozen=True)
class Scenario:
    name: str
    title: str
    model: str
    options: tuple[str, ...]
    quick_options: tuple[str, ...]
    body_bytes: int = 2000
    stream: int = 0  # content chunks of an answer, 0: JSON
    quick_model: str = ""
    quick_stream: int = 0
    unit: str = "request"  # what CPU is divided by
    with_direct: bool = False  # the mock is hit directly too, in every round
    program: str = "load"

    @property
    def is_open_loop(self) -> bool:
        return "--rate" in self.options

    def shape(self, *, quick: bool) -> tuple[str, int, tuple[str, ...]]:
        """(model, chunks, options) of the full or the quick form."""
        if not quick:
            return self.model, self.stream, self.options
        return self.quick_model or self.model, self.quick_stream or self.stream, self.quick_options


def closed(connections: int, seconds: float) -> tuple[str, ...]:
    return ("--connections", str(connections), "--seconds", str(seconds))


def streams(count: int, repeat: int, ramp_ms: int) -> tuple[str, ...]:
    return ("--connections", str(count), "--repeat", str(repeat), "--ramp-ms", str(ramp_ms))


def arrivals(rate: int, seconds: float) -> tuple[str, ...]:
    return ("--connections", "64", "--rate", str(rate), "--seconds", str(seconds))


SCENARIOS = (
    Scenario(
        "json1k", "JSON, 1 KB body, 32 connections", "bench", closed(32, 4), closed(32, 1.5), body_bytes=1000
    ),
    Scenario("json2k", "JSON, 2 KB body, 32 connections", "bench", closed(32, 4), closed(32, 1.5)),
    Scenario(
        "wrk2k",
        "JSON, 2 KB body, 32 connections, by wrk",
        "bench",
        closed(32, 4),
        closed(32, 1.5),
        program="wrk",
    ),
    Scenario(
        "paced",
        "SSE, 100 streams of 64 chunks, one per 20 ms, in step as an engine's batch is",
        "paced-64-20",
        streams(100, 3, 0),
        streams(100, 1, 0),
        stream=64,
        unit="chunk",
        with_direct=True,
    ),
    Scenario(
        "spread",
        "SSE, 100 streams of 64 chunks, one per 20 ms, evenly spread",
        "paced-64-20",
        streams(100, 3, 20),
        streams(100, 1, 20),
        stream=64,
        unit="chunk",
        with_direct=True,
    ),
    Scenario(
        "burst",
        "SSE, 32 streams of 64 chunks without a pause",
        "burst-64",
        closed(32, 4),
        closed(32, 1.5),
        stream=64,
        unit="chunk",
    ),
    Scenario(
        "body200k",
        "JSON, 200 KB body, 8 connections",
        "bench",
        closed(8, 4),
        closed(8, 1.5),
        body_bytes=200_000,
    ),
    Scenario(
        "body1m",
        "JSON, 1 MB body, 4 connections",
        "bench",
        closed(4, 5),
        closed(4, 1.5),
        body_bytes=1_000_000,
    ),
    Scenario(
        "streams1000",
        "SSE, 1,000 streams of 50 chunks/s",
        "paced-500-20",
        streams(1000, 1, 1000),
        streams(1000, 1, 1000),
        stream=500,
        quick_model="paced-150-20",
        quick_stream=150,
        unit="chunk",
        with_direct=True,
    ),
    Scenario(
        "open",
        "JSON, 2 KB body, 40 requests/s, upstream takes 20 ms",
        "delay-20",
        arrivals(40, 10),
        arrivals(40, 2),
        with_direct=True,
    ),
    Scenario(
        "first",
        "SSE, 16 chunks, 40 requests/s, upstream takes 20 ms",
        "delay-20.burst-16",
        arrivals(40, 6),
        arrivals(40, 2),
        stream=16,
        with_direct=True,
    ),
)


@dataclass
class Run:
    """One measurement. Times in us, memory in MB; `other_cores` is what the rest of the machine used meanwhile."""

    scenario: str
    target: str
    round: int
    completed: int
    chunks: int
    reads: int
    seconds: float
    worker_cpu_us: float
    parent_cpu_us: float
    rss_mb: float
    parent_rss_mb: float
    other_cores: float
    latency: dict[str, float] | None = None
    first: dict[str, float] | None = None
    relay: dict[str, float] | None = None
    lateness: dict[str, float] | None = None
    faults: dict[str, int] = field(default_factory=dict)
    notes: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def warm_up(target: Target, core: int) -> None:
    """Half a second of each kind of answer, uncounted: connections are open, code is specialised, lazy imports are done."""
    for scenario in SCENARIOS:
        if scenario.name in ("json2k", "burst"):
            command = load_command(scenario, target, quick=True)
            command[command.index("--seconds") + 1] = "0.5"
            processes.start(command, core, log=subprocess.DEVNULL).wait()


def measure(scenario: Scenario, target: Target, mock: Mock, core: int, number: int, *, quick: bool) -> Run:
    command = load_command(scenario, target, number, quick=quick)
    workers, parents = target.workers(), target.parents()
    before = mock.stats()
    busy_s, started_at = processes.machine_busy_s(), time.monotonic()
    worker_s, parent_s, mock_s = (processes.cpu_s(pids) for pids in (workers, parents, [mock.process.pid]))
    load = processes.start(command, core, log=subprocess.PIPE, stdout=subprocess.PIPE)
    time.sleep(expected_s(scenario, quick=quick) * 0.6)
    rss_mb, parent_rss_mb = processes.rss_mb(workers), processes.rss_mb(parents)
    out, complaints = load.communicate()
    time.sleep(SETTLE_S)
    elapsed_s = time.monotonic() - started_at
    worker_s, parent_s = processes.cpu_s(workers) - worker_s, processes.cpu_s(parents) - parent_s
    mock_s = processes.cpu_s([mock.process.pid]) - mock_s
    processes.wait_idle(workers)
    if load.returncode:
        raise native.BenchError(f"the load generator failed: {complaints.decode(errors='replace')}")
    result = read_wrk(out.decode()) if scenario.program == "wrk" else json.loads(out)
    own_s = worker_s + parent_s + (0 if target.process is None else mock_s) + result.get("cpu_s", 0.0)
    faults = {name: count for name, count in result["faults"].items() if count}
    after = mock.stats()
    if (
        scenario.program == "load"
        and not faults
        and after["requests"] - before["requests"] != result["completed"]
    ):
        faults["answered_twice_or_never"] = after["requests"] - before["requests"] - result["completed"]
    if target.workers() != workers:
        faults["workers_changed"] = 1
    return Run(
        scenario.name,
        target.name,
        number,
        result["completed"],
        result["chunks"],
        result["reads"],
        result["seconds"],
        worker_s * 1e6,
        parent_s * 1e6,
        rss_mb,
        parent_rss_mb,
        max(0.0, processes.machine_busy_s() - busy_s - own_s) / elapsed_s,
        result["latency_us"],
        result["first_us"],
        result["relay_us"],
        result["lateness_us"],
        faults,
        complaints.decode(errors="replace").strip(),
    )


def expected_s(scenario: Scenario, *, quick: bool) -> float:
    """About how long the load runs."""
    model, _, options = scenario.shape(quick=quick)
    given = dict(zip(options[::2], options[1::2], strict=True))
    if "--seconds" in given:
        return float(given["--seconds"])
    _, count, pace_ms = model.split("-")
    return (int(count) * int(pace_ms) * int(given["--repeat"]) + int(given["--ramp-ms"])) / 1000


def load_command(scenario: Scenario, target: Target, number: int = 0, *, quick: bool) -> list[str]:
    model, chunks, options = scenario.shape(quick=quick)
    native.BUILD.mkdir(exist_ok=True)
    body = native.BUILD / f"body-{model}-{scenario.body_bytes}-{'sse' if chunks else 'json'}.json"
    body.write_bytes(bodies.request_body(model, scenario.body_bytes, stream=chunks > 0))
    if scenario.program == "wrk":
        return wrk_command(body, target, dict(zip(options[::2], options[1::2], strict=True)))
    command = [str(native.compile_program("load")), "--port", str(target.port), "--body", str(body), *options]
    if scenario.is_open_loop:
        command += ["--seed", str(number + 1)]
    for header in target.headers:
        command += ["--header", header]
    return [*command, "--stream", str(chunks)] if chunks else command


WRK_SCRIPT = """\
local file = io.open({body!r}, "rb"); wrk.body = file:read("*a"); file:close()
wrk.method = "POST"; wrk.headers["content-type"] = "application/json"; wrk.headers["authorization"] = "Bearer {key}"
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("RESULT %d %d %d %d %.1f %.1f %.1f %.1f\\n", summary.requests, summary.duration, e.status,
    e.connect + e.read + e.write + e.timeout, latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max))
end
"""


def wrk_command(body: Path, target: Target, options: dict[str, str]) -> list[str]:
    script = body.with_suffix(".lua")
    script.write_text(WRK_SCRIPT.format(body=str(body), key=KEY))
    url = f"http://127.0.0.1:{target.port}/v1/chat/completions"
    seconds = max(1, round(float(options["--seconds"])))
    return [
        native.find("wrk", "wrk"),
        "-t1",
        f"-c{options['--connections']}",
        f"-d{seconds}s",
        "-s",
        str(script),
        url,
    ]


def read_wrk(out: str) -> dict[str, Any]:
    words = next(line for line in out.splitlines() if line.startswith("RESULT")).split()[1:]
    requests, duration_us, wrong, broken = (int(word) for word in words[:4])
    names = ("p50", "p90", "p99", "max")
    latency = dict(zip(names, (float(word) for word in words[4:]), strict=True))
    return {
        "completed": requests - wrong,
        "seconds": duration_us / 1e6,
        "chunks": 0,
        "reads": 0,
        "faults": {"wrong_status": wrong, "broken": broken},
        "latency_us": latency,
        "first_us": None,
        "relay_us": None,
        "lateness_us": None,
    }

"""What the queue does to those who wait, and what it does under overload: `python -m bench.queue_load interactive|overload`.

`interactive`: streams of a steady arrival (Poisson, the same moments in every round) while a backlog of jobs is drawn, and
while it is not (`headgate jobs drain`), in turns. Bars: time to the first token at p99 at most 1.1 times, with jobs in at
least 90 % of the slots that interactive requests leave idle.

`overload`: what the engine does when it is saturated, then five times that for a minute, part of it asking for the queue. Bars:
goodput at least 90 % of saturation; nothing but 200, 202, 429 and 503; every job that was accepted ends.

The engine is the simulator, a real process behind a real gateway. Slots are what is scarce: a decode step takes the same
however many share it, as on a GPU that is bound by memory bandwidth. `--vllm FOLDER` takes a real vLLM with that model instead, the one in
.venv-engine: at small size, on the CPU, where a step does take longer the more share it:

    python -m bench.queue_load interactive --vllm .venv-engine/models/tiny --slots 32 --rate 0.3 --seconds 120

Prints a table; speed fails nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from bench.machine import describe
from bench.processes import free_port
from local_engine.installed import look

KEY, OPERATOR_KEY = "sk-bench-3f9c1d7a5e204b86", "op-bench-7d21c0f4a98e6b35"
MODEL = "demo"
ENVIRONMENT = Path(__file__).parents[1] / ".venv-engine"
FINAL = {"succeeded", "failed", "dead", "cancelled", "expired"}


def main() -> int:
    words = argparse.ArgumentParser(prog="python -m bench.queue_load", description=__doc__)
    words.add_argument("what", choices=("interactive", "overload"))
    words.add_argument("--workers", type=int, default=1)
    words.add_argument("--slots", type=int, default=96)
    words.add_argument("--rate", type=float, default=4.0, help="interactive requests a second")
    words.add_argument("--seconds", type=float, default=20.0, help="of each round; of the overload 60")
    words.add_argument("--rounds", type=int, default=3, help="with and without jobs, each")
    words.add_argument("--backlog", type=int, default=10_000)
    words.add_argument("--times", type=float, default=5.0, help="saturation, for overload")
    words.add_argument(
        "--asking", type=float, default=0.3, help="share of the overload that asks for the queue"
    )
    words.add_argument("--vllm", type=Path, metavar="FOLDER", help="a model for a real engine, on the CPU")
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--directory", type=Path, help="where the data and the log are kept")
    words.add_argument("--json", action="store_true")
    options = words.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        told = asyncio.run(run(options, options.directory or Path(temporary)))
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        print(", ".join(describe({}).values()))
        for name, value in told.items():
            print(f"{name:<36} {value}")
    return 0


async def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    gateway = Gateway(options, directory)
    try:
        await gateway.start()
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)
        ) as session:
            load = Load(gateway, session, options)
            return await (load.interactive() if options.what == "interactive" else load.overload())
    finally:
        await gateway.stop()


class Gateway:
    """The gateway and its engine, as one child."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        port, plane = free_port(), free_port()
        self.url, self.plane = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{plane}"
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        config = {
            "server": {"port": port, "workers": options.workers},
            "management": {
                "port": plane,
                "open_metrics": True,
                "keys": [{"name": "op", "key": OPERATOR_KEY}],
            },
            "storage": {"directory": str(directory / "data")},
            "logging": {"access": False},
            "keys": [{"name": "bench", "key": KEY}],
            "pools": {
                "engines": {
                    **(a_simulator(options.slots) if options.vllm is None else a_vllm(options)),
                    "placement": {"max_in_flight": options.slots},
                }
            },
            "models": {
                MODEL: {"targets": [{"pool": "engines", "model": MODEL}], "price": {"input": 1, "output": 2}}
            },
            "overload": {"default": {"wait_s": 5 if options.vllm is None else 120, "waiting": 64}},
            "queue": {"enabled": True},
        }
        (directory / "config.yaml").write_text(yaml.safe_dump(config))

    async def start(self) -> None:
        with (self._directory / "log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gateway", "serve", "--config", str(self._directory / "config.yaml")),
                stdout=log,
                stderr=log,
            )
        async with aiohttp.ClientSession() as session:
            for _ in range(2400):  # a real engine takes half a minute, and ten on a machine that is busy
                try:
                    if await self._is_up(session):
                        return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.5)
        raise SystemExit((self._directory / "log").read_text())

    async def _is_up(self, session: aiohttp.ClientSession) -> bool:
        """The gateway, and its engine."""
        headers = {"authorization": f"Bearer {OPERATOR_KEY}"}
        async with session.get(f"{self.plane}/api/status", headers=headers) as answer:
            states = [endpoint["state"] for endpoint in (await answer.json())["endpoints"]]
        async with session.get(f"{self.url}/readyz") as answer:
            return answer.status == 200 and states == ["up"]

    async def stop(self) -> None:
        """An engine outlives a gateway that is killed."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()


def a_simulator(slots: int) -> dict[str, Any]:
    timing = {
        "decode_us_per_token": 50_000,
        "load_factor": 1.0,
        "prefill_overhead_us": 1_000,
        "prefill_us_per_token": 100,
    }
    return {"simulator": {"model": MODEL, "max_num_seqs": slots, **timing}}


def a_vllm(options: argparse.Namespace) -> dict[str, Any]:
    found = look(ENVIRONMENT)
    if found is None:
        raise SystemExit("There is no vLLM in .venv-engine: make engine-cpu")
    return {
        "vllm": {
            "model": str(options.vllm.resolve()),
            "name": MODEL,
            "command": list(found.command),
            "gpus": "none",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 256 << 20,
            "max_model_len": 4096,
            "max_num_seqs": options.slots,
            "start_timeout_s": 1200,
            "env": {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        }
    }


class Load:
    """Requests, and what became of them."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession, options: argparse.Namespace) -> None:
        self.gateway, self.session, self.options = gateway, session, options
        self.in_flight = 0

    # what it costs those who wait

    async def interactive(self) -> dict[str, Any]:
        options = self.options
        await self.draw(is_on=False)
        await self.fill(options.backlog)
        without: list[float] = []
        beside: list[float] = []
        used: list[float] = []
        waited = 0.0
        for number in range(options.rounds):
            seed = options.seed + number
            without += await self.arrivals(seed, options.seconds)
            await self.draw(is_on=True)
            await asyncio.sleep(8)  # until it is in full swing
            watching = asyncio.create_task(self.watch_slots(used))
            before = await self.waited()
            beside += await self.arrivals(seed, options.seconds)
            waited += await self.waited() - before
            watching.cancel()
            await self.draw(is_on=False)
            await self.until_quiet()
        p99 = (quantile(without, 0.99), quantile(beside, 0.99))
        p50 = (quantile(without, 0.5), quantile(beside, 0.5))
        return {
            "streams": f"{len(without)} + {len(beside)}",
            "first token p50, without / beside ms": f"{p50[0] * 1e3:.1f} / {p50[1] * 1e3:.1f}",
            "first token p99, without / beside ms": f"{p99[0] * 1e3:.1f} / {p99[1] * 1e3:.1f}",
            "p99 ratio (bar 1.1)": round(p99[1] / p99[0], 3),
            "beside, waited for room in the gateway": int(waited),
            "idle slots used (bar 0.9)": round(statistics.mean(used), 3),
        }

    async def arrivals(self, seed: int, seconds: float) -> list[float]:
        """Times to the first token, of streams that come at random moments."""
        draw = random.Random(seed)
        words = (200, 600) if self.options.vllm is None else (20, 60)  # a CPU computes prompts slowly
        tasks, until_at = [], time.perf_counter() + seconds
        due_at = time.perf_counter()
        while due_at < until_at:
            due_at += draw.expovariate(self.options.rate)
            await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
            tasks.append(asyncio.create_task(self.stream(draw.randint(*words))))
        return await asyncio.gather(*tasks)

    async def stream(self, words: int) -> float:
        body = chat(words, 20, stream=True)
        began_at, first_s = time.perf_counter(), 0.0
        self.in_flight += 1
        try:
            async with self.post("/v1/chat/completions", body) as answer:
                assert answer.status == 200, await answer.text()
                async for piece in answer.content.iter_any():
                    if piece and not first_s:
                        first_s = time.perf_counter() - began_at
        finally:
            self.in_flight -= 1
        return first_s

    async def waited(self) -> float:
        """Requests that found the pool full. Unlike times, it does not depend on how busy the machine is."""
        metrics = await self.metrics()
        names = ("served", "timed_out", "left", "turned_away")
        return sum(metrics.get(f'headgate_waited_requests_total{{outcome="{name}"}}', 0.0) for name in names)

    async def watch_slots(self, used: list[float]) -> None:
        """Of the slots that interactive requests leave, the share that jobs have."""
        while True:
            metrics = await self.metrics()
            jobs = metrics.get('headgate_queue_running{pool="engines"}', 0.0)
            idle = self.options.slots - self.in_flight
            if idle > 0:
                used.append(jobs / idle)
            await asyncio.sleep(0.25)

    # five times too much

    async def overload(self) -> dict[str, Any]:
        options = self.options
        saturation = await self.saturated(10.0)
        draw = random.Random(options.seed)
        statuses: Counter[tuple[str, int]] = Counter()
        jobs: list[str] = []
        before = await self.done()
        began_at = time.perf_counter()
        tasks: set[asyncio.Task[None]] = set()
        due_at, until_at = began_at, began_at + max(options.seconds, 60.0)
        while due_at < until_at:
            due_at += draw.expovariate(saturation * options.times)
            await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
            asks = draw.random() < options.asking
            task = asyncio.create_task(self.one(statuses, jobs, asks=asks))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        took_s = time.perf_counter() - began_at
        goodput = (await self.done() - before) / took_s
        await asyncio.gather(*tasks)
        ended = await self.ended(jobs)
        allowed = {200, 202, 429, 503}
        return {
            "saturation, answers/s": round(saturation, 1),
            "offered, requests/s": round(saturation * options.times, 1),
            "goodput, answers/s": round(goodput, 1),
            "goodput of saturation (bar 0.9)": round(goodput / saturation, 3),
            "statuses, not asking": {s: n for (w, s), n in sorted(statuses.items()) if w == "plain"},
            "statuses, asking for the queue": {s: n for (w, s), n in sorted(statuses.items()) if w == "asks"},
            "anything else (bar 0)": sum(n for (_, s), n in statuses.items() if s not in allowed),
            "jobs accepted": len(jobs),
            "jobs by their end": dict(ended),
        }

    async def saturated(self, seconds: float) -> float:
        """Answers a second while every slot is always taken."""
        statuses: Counter[tuple[str, int]] = Counter()
        until_at = time.perf_counter() + seconds

        async def again() -> None:
            while time.perf_counter() < until_at:
                await self.one(statuses, [], asks=False)

        began_at = time.perf_counter()
        await asyncio.gather(*(again() for _ in range(self.options.slots)))
        return statuses["plain", 200] / (time.perf_counter() - began_at)

    async def one(self, statuses: Counter[tuple[str, int]], jobs: list[str], *, asks: bool) -> None:
        headers = {"x-headgate-on-full": "queue"} if asks else {}
        async with self.post("/v1/chat/completions", chat(40, 20), headers) as answer:
            told = await answer.read()
            statuses["asks" if asks else "plain", answer.status] += 1
            if answer.status == 202:
                jobs.append(json.loads(told)["id"])

    async def done(self) -> float:
        """Answers that the engine has finished."""
        metrics = await self.metrics()
        return sum(
            value for name, value in metrics.items() if name.startswith("headgate_billed_requests_total")
        )

    async def ended(self, jobs: list[str]) -> Counter[str]:
        """What became of each, once it has."""
        found: Counter[str] = Counter()
        waiting = set(jobs)
        deadline_at = time.perf_counter() + 900
        while waiting and time.perf_counter() < deadline_at:
            for job_id in list(waiting)[:200]:
                async with self.session.get(f"{self.gateway.url}/v1/jobs/{job_id}", headers=auth()) as answer:
                    state = (await answer.json())["status"]
                if state in FINAL:
                    waiting.discard(job_id)
                    found[state] += 1
            await asyncio.sleep(1.0)
        if waiting:
            found["never"] = len(waiting)
        return found

    # the service

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> Any:
        return self.session.post(f"{self.gateway.url}{path}", data=body, headers=auth() | (headers or {}))

    async def fill(self, count: int) -> None:
        """Jobs of all lengths: those of one length that began together would end together."""
        draw = random.Random(self.options.seed)
        bodies = iter([chat(5, draw.randint(20, 160), ignore_eos=True) for _ in range(count)])

        async def hand_in() -> None:
            for body in bodies:
                job = {"endpoint": "/v1/chat/completions", "body": json.loads(body), "class": "batch"}
                async with self.post("/v1/jobs", json.dumps(job).encode()) as answer:
                    assert answer.status == 202, await answer.text()

        await asyncio.gather(*(hand_in() for _ in range(32)))

    async def draw(self, *, is_on: bool) -> None:
        method = self.session.delete if is_on else self.session.post
        url, headers = f"{self.gateway.plane}/api/jobs/drain", {"authorization": f"Bearer {OPERATOR_KEY}"}
        async with method(url, headers=headers) as answer:
            assert answer.status == 200, await answer.text()

    async def until_quiet(self) -> None:
        while (await self.metrics()).get('headgate_queue_running{pool="engines"}', 0.0):
            await asyncio.sleep(0.2)

    async def metrics(self) -> dict[str, float]:
        async with self.session.get(f"{self.gateway.plane}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


def chat(words: int, tokens: int, **fields: Any) -> bytes:
    content = " ".join(f"w{random.randrange(1000)}" for _ in range(words))
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": tokens}
    return json.dumps(body | fields).encode()


def auth() -> dict[str, str]:
    return {"authorization": f"Bearer {KEY}", "content-type": "application/json"}


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    sys.exit(main())

"""Jobs through every door of the queue, at a steady rate, and what a gateway has in memory, descriptors, files and Redis meanwhile.

The gateway is one whose days are a minute (`tests.mutants.queue.hurries`), so that what is kept for a month comes and goes
while it is watched: after the first minutes nothing may grow but the ledger.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.gateway_process import KEY, Gateway
from tests.support.journal_upstream import Plan
from tests.support.nodes import quantile, worker_pids
from tests.support.recordings import Tokens
from tests.support.redis_server import RedisServer

CHAT, NATIVE = "/v1/chat/completions", "/client/v4/accounts/soak/ai/run/m"
QUEUED, NARROW = {"x-headgate-on-full": "queue"}, "narrow"
FILES = (
    "queue.db",
    "queue.db-wal",
    "queue-journal.db",
    "queue-journal.db-wal",
    "headgate.db",
    "headgate.db-wal",
)
AT_MOST = 400  # of our own requests under way; what comes above is left out, and counted
BATCH_LINES = 10
MIB = 1024 * 1024
FINAL = {"succeeded", "failed", "dead", "cancelled", "expired", "completed", "incomplete"}


@dataclass
class Sample:
    """At one moment."""

    at_s: float  # since the beginning
    rss_mib: dict[str, float]  # by process: parent, then workers in order
    descriptors: dict[str, int]
    files_mib: dict[str, float]
    redis: dict[str, float]


@dataclass
class Soak:
    """Who hands in; `run` for so many seconds. `samples` are taken every `every_s`."""

    gateway: Gateway
    rate: float
    seed: int
    redis: RedisServer | None = None
    webhook: str = ""
    every_s: float = 10.0
    samples: list[Sample] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    submits: list[tuple[float, float]] = field(default_factory=list)  # when, and how long it took
    left_out: int = 0

    async def run(self, seconds: float) -> None:
        chance, begun = random.Random(self.seed), 0
        doors = (
            self._job,
            self._stream,
            self._spill,
            self._hold,
            self._background,
            self._native,
            self._batch,
        )
        shares = (50, 8, 10, 6, 8, 6, 1)
        headers = {"authorization": f"Bearer {KEY}"}
        timeout = aiohttp.ClientTimeout(total=600)
        connector = aiohttp.TCPConnector(limit=0)
        tasks: set[asyncio.Task[None]] = set()
        self._began_at = sampled_at = time.monotonic()
        async with aiohttp.ClientSession(
            self.gateway.url, headers=headers, timeout=timeout, connector=connector
        ) as session:
            while (now := time.monotonic()) < self._began_at + seconds:
                if now >= sampled_at:
                    self.samples.append(await asyncio.to_thread(self.sample))
                    sampled_at = now + self.every_s
                while begun < (now - self._began_at) * self.rate:
                    begun += 1
                    if len(tasks) >= AT_MOST:
                        self.left_out += 1
                        continue
                    (door,) = chance.choices(doors, shares)
                    task = asyncio.create_task(
                        self._one(door, session, Plan(begun, Tokens(50, 20, 10), 0), chance)
                    )
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                await asyncio.sleep(0.02)
            await asyncio.gather(*tasks)

    def sample(self) -> Sample:
        assert self.gateway.process is not None
        pids = dict(
            zip(
                ("parent", "worker 0", "worker 1"),
                [self.gateway.process.pid, *worker_pids(self.gateway)],
                strict=False,
            )
        )
        data = self.gateway.directory / "data"
        found: dict[str, float] = {}
        if self.redis is not None:
            found = {
                "keys": self.redis.command("DBSIZE"),
                "memory": self.redis.command("INFO", "memory")["used_memory"] / MIB,
            }
        return Sample(
            time.monotonic() - self._began_at,
            {
                name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / MIB
                for name, pid in pids.items()
            },
            {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()},
            {name: (data / name).stat().st_size / MIB for name in FILES if (data / name).exists()},
            found,
        )

    # -- doors

    async def _one(
        self, door: Any, session: aiohttp.ClientSession, plan: Plan, chance: random.Random
    ) -> None:
        try:
            await door(session, plan, chance)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.answers[f"{door.__name__} {type(error).__name__}"] += 1

    async def _ask(
        self, session: aiohttp.ClientSession, method: str, path: str, **more: Any
    ) -> tuple[int, Any]:
        began_at = time.monotonic()
        async with session.request(method, path, **more) as answer:
            body = await answer.read()
        if path == "/v1/jobs":
            self.submits.append((began_at - self._began_at, time.monotonic() - began_at))
        self.answers[f"{method} {path.split('/')[2]} {answer.status}"] += 1
        is_document = answer.content_type == "application/json"
        return answer.status, json.loads(body) if is_document else body

    async def _job(self, session: aiohttp.ClientSession, plan: Plan, chance: random.Random) -> None:
        """Read to its end, cancelled, deleted, left alone, or expiring before there is room."""
        body = {"endpoint": CHAT, "body": _chat(plan)}
        headers = {"x-headgate-webhook": self.webhook} if self.webhook and chance.random() < 0.25 else {}
        if chance.random() < 0.3:
            headers["idempotency-key"] = f"key-{chance.randrange(1 << 40)}"
        if chance.random() < 0.02:
            body |= {"expires_in_s": 60, "body": _chat(plan, "nowhere")}
        status, told = await self._ask(session, "POST", "/v1/jobs", json=body, headers=headers)
        if status != 202:
            return
        what = chance.random()
        if what < 0.1:
            await self._ask(session, "POST", f"/v1/jobs/{told['id']}/cancel")
        elif what < 0.5:
            await self._ended(session, f"/v1/jobs/{told['id']}?wait=20")
            await self._ask(session, "GET", f"/v1/jobs/{told['id']}/result")
            if what < 0.2:
                await self._ask(session, "DELETE", f"/v1/jobs/{told['id']}")

    async def _stream(self, session: aiohttp.ClientSession, plan: Plan, _: random.Random) -> None:
        body = {"endpoint": CHAT, "body": _chat(plan) | {"stream": True}}
        status, told = await self._ask(session, "POST", "/v1/jobs", json=body)
        if status == 202:
            for _ in range(2):
                await self._ask(session, "GET", f"/v1/jobs/{told['id']}/stream")

    async def _spill(self, session: aiohttp.ClientSession, plan: Plan, _: random.Random) -> None:
        status, told = await self._ask(session, "POST", CHAT, json=_chat(plan, NARROW), headers=QUEUED)
        if status == 202:
            await self._ended(session, f"/v1/jobs/{told['id']}?wait=20")

    async def _hold(self, session: aiohttp.ClientSession, plan: Plan, chance: random.Random) -> None:
        await self._ask(session, "POST", CHAT, json=_chat(plan, "held") | {"stream": chance.random() < 0.3})

    async def _background(self, session: aiohttp.ClientSession, plan: Plan, chance: random.Random) -> None:
        body = {"model": "m", "input": plan.text, "background": True}
        if chance.random() < 0.3:
            await self._ask(session, "POST", "/v1/responses", json=body | {"stream": True})
            return
        status, told = await self._ask(session, "POST", "/v1/responses", json=body)
        if status == 200:
            await self._ended(session, f"/v1/responses/{told['id']}")
            if chance.random() < 0.5:
                await self._ask(session, "DELETE", f"/v1/responses/{told['id']}")

    async def _native(self, session: aiohttp.ClientSession, plan: Plan, _: random.Random) -> None:
        body = {"requests": [{"prompt": plan.text}, {"prompt": plan.text}]}
        status, told = await self._ask(session, "POST", f"{NATIVE}?queueRequest=true", json=body)
        if status == 200:
            polled = {"request_id": told["result"]["request_id"]}
            while status == 200 and "responses" not in told["result"]:
                await asyncio.sleep(1)
                status, told = await self._ask(session, "POST", f"{NATIVE}?queueRequest=true", json=polled)

    async def _batch(self, session: aiohttp.ClientSession, plan: Plan, _: random.Random) -> None:
        lines = [
            {"custom_id": str(n), "method": "POST", "url": CHAT, "body": _chat(plan)}
            for n in range(BATCH_LINES)
        ]
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", "\n".join(map(json.dumps, lines)).encode(), filename="in.jsonl")
        status, file = await self._ask(session, "POST", "/v1/files", data=form)
        if status != 200:
            return
        asked = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "5m"}
        status, batch = await self._ask(session, "POST", "/v1/batches", json=asked)
        if status == 200:
            batch = await self._ended(session, f"/v1/batches/{batch['id']}")
        for name in ("input_file_id", "output_file_id", "error_file_id"):
            if batch and batch.get(name):
                await self._ask(session, "DELETE", f"/v1/files/{batch[name]}")

    async def _ended(self, session: aiohttp.ClientSession, path: str) -> Any:
        """What it came to; None: it was not there."""
        while True:
            status, told = await self._ask(session, "GET", path)
            if status != 200:
                return None
            if told["status"] in FINAL:
                self.ends[told["status"]] += 1
                return told
            await asyncio.sleep(0.5)

    # -- what it came to

    def slope(self, values: list[float], after_s: float) -> float:
        """Per minute, by least squares, from then on."""
        points = [
            (each.at_s / 60, value)
            for each, value in zip(self.samples, values, strict=True)
            if each.at_s >= after_s
        ]
        if len(points) < 3:
            return 0.0
        mean_x = sum(x for x, _ in points) / len(points)
        mean_y = sum(y for _, y in points) / len(points)
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread

    def told(self, after_s: float) -> str:
        """Where each figure began, was at most, ended, and its slope."""
        lines = [
            f"{len(self.submits)} handed in, {self.left_out} left out; ends {dict(self.ends)}; answers {dict(sorted(self.answers.items()))}"
        ]
        for kind in ("rss_mib", "descriptors", "files_mib", "redis"):
            for name in getattr(self.samples[-1], kind):
                values = [float(getattr(each, kind).get(name, 0)) for each in self.samples]
                lines.append(
                    f"  {kind} {name}: {values[0]:.1f} first, {max(values):.1f} at most, {values[-1]:.1f} last, "
                    f"{self.slope(values, after_s):+.3f}/min after {after_s:.0f} s"
                )
        last_s = max(at for at, _ in self.submits)
        for part in range(4):
            took = [s * 1000 for at, s in self.submits if last_s * part / 4 <= at <= last_s * (part + 1) / 4]
            lines.append(
                f"  submit, quarter {part + 1}: {len(took)}, p50 {quantile(took, 0.5):.1f} ms, p99 {quantile(took, 0.99):.1f} ms"
            )
        return "\n".join(lines)


def _chat(plan: Plan, model: str = "m") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": plan.text}], "max_tokens": 20}

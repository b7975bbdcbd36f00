"""Batches over a real store of each kind, with time and crashes in the test's hand: nothing twice, nothing missing."""

import asyncio
import contextlib
import json
from collections import Counter

import pytest

from gateway.overflow import batches
from gateway.overflow.batches import Batches, BatchesConfig, NewBatch, shown
from gateway.overflow.bodies import Bodies
from gateway.overflow.files import Files
from gateway.overflow.job import LEASE_S, JobFilter, Outcome, Result, TenantLimits
from gateway.overflow.shelf import FilesConfig, Shelf, new_file_id
from gateway.overflow.submit import Admitted, Submitter
from policies.exchange import Caller
from policies.verdict import Denial
from tests.mutants import batches as mutants
from tests.support.queue_stores import STORES, opened

CALLER = Caller("key-1", "k", team="acme")
ENDPOINT = "/v1/chat/completions"
LANE = "m"
CHUNK, LINES = 10, 30  # three appends


def request_lines(count=LINES, size=10):
    for number in range(count):
        body = {"model": "m", "messages": [{"role": "user", "content": "x" * size}], "seed": number}
        yield json.dumps({"custom_id": f"r{number}", "method": "POST", "url": ENDPOINT, "body": body})


class Admission:
    """Lets everything in, but for what a test says."""

    def __init__(self) -> None:
        self.limits = TenantLimits()
        self.denial: Denial | None = None

    async def admit(self, wish):
        if self.denial is not None:
            return self.denial
        return Admitted(
            lane=LANE,
            model="m",
            estimate=1,
            limits=self.limits,
            expires_in_s=wish.expires_in_s,
            keep_s=wish.keep_s,
            max_attempts=5,
            caller=b"",
        )

    def give_back(self, admitted):
        del admitted


class Killed(BaseException):
    """The process is gone: nothing after this happens."""


class Mortal:
    """A store as one process sees it; the process dies after so many calls of a method."""

    def __init__(self, store) -> None:
        self._store = store
        self.dies = {}  # by method: before or after its n-th call

    def __getattr__(self, name):
        method = getattr(self._store, name)

        async def call(*arguments, **options):
            moment, left = self.dies.get(name, ("", 0))
            if left:
                self.dies[name] = (moment, left - 1)
            if left == 1 and moment == "before":
                raise Killed
            answer = await method(*arguments, **options)
            if left == 1 and moment == "after":
                raise Killed
            return answer

        return call


class Process:
    """One worker's door."""

    def __init__(self, world, owner: str) -> None:
        self.store = Mortal(world.queue.store)
        self.admission = Admission()
        clock = lambda: world.queue.clock.time_s
        self.files = Files(Shelf(world.directory / "files", Bodies()), FilesConfig, clock)
        self.door = Batches(
            self.store, Submitter(self.store, self.admission), self.files, owner, BatchesConfig, clock
        )

    async def work(self) -> None:
        """What the door would do by itself: takes up what there is, until there is nothing or it is killed."""
        with contextlib.suppress(Killed):
            while claimed := await self.store.claim_parent("p", "batch"):
                await self.door._work.carry_out(*claimed)


class World:
    def __init__(self, queue, directory) -> None:
        self.queue, self.directory = queue, directory
        self.processes: list[Process] = []

    def process(self) -> Process:
        process = Process(self, f"p{len(self.processes)}")
        self.processes.append(process)
        return process

    async def upload(self, data: bytes):
        files = self.processes[0].files
        draft = files.begin(CALLER.tenant, new_file_id(self.queue.clock.time_s))
        draft.write(data)
        return draft.publish("in.jsonl", "batch", self.queue.clock.time_s, 1e6)

    async def batch(self, lines=LINES, window_s=86_400.0, data: bytes | None = None):
        """Opened by a process that died at once."""
        first = self.process()
        file = await self.upload(data if data is not None else "\n".join(request_lines(lines)).encode())
        asked = NewBatch(endpoint=ENDPOINT, input_file_id=file.id, completion_window="24h", window_s=window_s)
        parent = await first.door.create(CALLER, asked)
        await first.door.stop()
        self.queue.clock.forward(LEASE_S + 1)
        return parent.id

    async def run(self, most: int = 1_000_000) -> int:
        """As the runner would: so many of the jobs that are ready, answered with their seed."""
        done = 0
        while done < most and (claimed := await self.queue.store.claim(LANE, "runner")):
            body = json.dumps({"seed": json.loads(claimed.body)["seed"]}).encode()
            usage = b'{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}'
            result = Result(status=200, headers=b"[]", body=body)
            await self.queue.store.finish(
                claimed.lease, Outcome(state="succeeded", result=result, usage=usage)
            )
            done += 1
        return done

    async def shown(self, batch_id):
        return shown(await self.queue.store.get_parent(CALLER.tenant, batch_id))

    async def content(self, file_id):
        files = self.processes[0].files
        record = await files.find(CALLER.tenant, file_id)
        data = b"".join([frame async for frame in files.content(CALLER.tenant, record)])
        return [json.loads(line) for line in data.splitlines()]

    async def children(self, batch_id):
        found, cursor = [], None
        while True:
            page = await self.queue.store.list_jobs(JobFilter(parent=batch_id), cursor, 200)
            found += page.jobs
            cursor = page.cursor
            if cursor is None:
                return found

    async def close(self):
        for process in self.processes:
            await process.door.stop()
            process.files.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("batches")) as servers:
        yield servers


@pytest.fixture(params=STORES)
async def world(request, tmp_path, servers):
    queue = await servers.queue(request.param, tmp_path)
    world = World(queue, tmp_path)
    yield world
    await world.close()
    await queue.close()


@pytest.fixture(autouse=True)
def _few_at_a_time(monkeypatch):
    monkeypatch.setattr(batches, "_CHUNK_LINES", CHUNK)
    monkeypatch.setattr(batches, "_PATIENCE_S", 0.02)


@pytest.fixture
def broken():
    """Applies a mutant for one test."""
    saved = {
        (mutants.batches, "_file_id"): mutants.batches._file_id,
        (mutants.BatchInput, "requests"): mutants.BatchInput.requests,
        (mutants.BatchInput, "check"): mutants.BatchInput.check,
    }
    yield lambda name: mutants.MUTANTS[name]()
    for (place, name), value in saved.items():
        setattr(place, name, value)


async def whole(world, batch_id, count=LINES):
    """What a completed batch must be."""
    batch = await world.shown(batch_id)
    assert batch["status"] == "completed", batch
    assert batch["request_counts"] == {"total": count, "completed": count, "failed": 0}
    assert batch["usage"]["total_tokens"] == 5 * count
    lines = await world.content(batch["output_file_id"])
    assert [line["custom_id"] for line in lines] == [f"r{number}" for number in range(count)]
    assert [line["response"]["body"]["seed"] for line in lines] == list(range(count))
    files, _ = await world.processes[0].files.page(CALLER.tenant, purpose="batch_output", limit=10)
    assert [file.id for file in files] == [batch["output_file_id"]]


async def carried_out(world, batch_id):
    for _ in range(4):
        await world.process().work()
        await world.run()
        world.queue.clock.forward(LEASE_S + 1)
    await whole(world, batch_id)


CRASHES = {
    "before the first line": {"append_children": ("before", 1)},
    "after some lines": {"append_children": ("after", 2)},
    "before the last lines": {"append_children": ("before", 3)},
    "before the release": {"release_parent": ("before", 1)},
    "in the release": {"release_parent": ("after", 1)},
    "before the end is stored": {"finish_parent": ("before", 1)},
    "after the end was stored": {"finish_parent": ("after", 1)},
}


@pytest.mark.parametrize("crash", CRASHES)
async def test_a_crash_anywhere_loses_nothing_and_does_nothing_twice(world, crash):
    batch_id = await world.batch()
    victim = world.process()
    victim.store.dies = dict(CRASHES[crash])
    await victim.work()
    await world.run()
    world.queue.clock.forward(LEASE_S + 1)
    await victim.work()
    world.queue.clock.forward(LEASE_S + 1)
    await carried_out(world, batch_id)


@pytest.mark.parametrize(
    ("mutant", "crash"),
    [
        ("goes_on_from_the_first_line", "after some lines"),
        ("names_its_files_anew", "before the end is stored"),
    ],
)
async def test_a_build_that_is_broken_there_is_caught(world, broken, mutant, crash):
    broken(mutant)
    batch_id = await world.batch()
    victim = world.process()
    victim.store.dies = dict(CRASHES[crash])
    await victim.work()
    await world.run()
    world.queue.clock.forward(LEASE_S + 1)
    await victim.work()
    world.queue.clock.forward(LEASE_S + 1)
    with pytest.raises(AssertionError):
        await carried_out(world, batch_id)


async def bad_last_line(world):
    data = "\n".join([*request_lines(2 * CHUNK), "{]"]).encode()
    batch_id = await world.batch(data=data)
    victim = world.process()
    victim.store.dies = {"append_children": ("after", 1)}
    await victim.work()
    world.queue.clock.forward(LEASE_S + 1)
    await world.process().work()
    batch = await world.shown(batch_id)
    assert (batch["status"], batch["request_counts"]["total"]) == ("failed", 0)
    assert [(error["code"], error["line"]) for error in batch["errors"]["data"]] == [
        ("invalid_json_line", 2 * CHUNK + 1)
    ]
    assert await world.children(batch_id) == []


async def test_no_line_is_handed_in_before_the_last_one_was_looked_at(world):
    await bad_last_line(world)


async def test_a_build_that_hands_in_while_it_checks_is_caught(world, broken):
    broken("hands_in_while_it_checks")
    with pytest.raises(AssertionError):
        await bad_last_line(world)


async def test_a_worker_that_was_given_up_changes_nothing(world):
    batch_id = await world.batch()
    zombie = world.process()
    claimed = await zombie.store.claim_parent("zombie", "batch")
    world.queue.clock.forward(LEASE_S + 1)
    await world.process().work()
    with contextlib.suppress(Exception):
        await zombie.door._work.carry_out(*claimed)
    assert len(await world.children(batch_id)) == LINES
    await carried_out(world, batch_id)


async def test_what_is_not_done_in_time_expires_and_what_is_done_is_kept(world):
    batch_id = await world.batch(lines=10, window_s=600.0)
    await world.process().work()
    assert await world.run(most=4) == 4
    world.queue.clock.forward(700)
    while not (await world.queue.store.sweep()).is_all:
        pass
    await world.process().work()
    batch = await world.shown(batch_id)
    assert (batch["status"], batch["request_counts"]) == (
        "expired",
        {"total": 10, "completed": 4, "failed": 6},
    )
    assert batch["expired_at"]
    assert len(await world.content(batch["output_file_id"])) == 4
    left = await world.content(batch["error_file_id"])
    assert Counter(line["error"]["code"] for line in left) == {"batch_expired": 6}
    assert {line["response"] for line in left} == {None}


async def test_a_full_queue_is_waited_for(world):
    batch_id = await world.batch(lines=30)
    process = world.process()
    process.admission.limits = TenantLimits(queued_jobs=15)
    working = asyncio.create_task(process.work())
    async with asyncio.timeout(60):
        while not await world.children(batch_id):
            await asyncio.sleep(0.01)
    process.admission.limits = TenantLimits()
    async with asyncio.timeout(120):
        await working
    await carried_out_with(world, batch_id, 30)


async def carried_out_with(world, batch_id, count):
    await world.run()
    world.queue.clock.forward(LEASE_S + 1)
    await world.process().work()
    await whole(world, batch_id, count)


async def test_what_is_refused_for_good_fails_the_batch_and_names_the_line(world):
    batch_id = await world.batch(lines=2)
    process = world.process()
    process.admission.denial = Denial(403, "model_not_allowed", "no", param="model")
    await process.work()
    batch = await world.shown(batch_id)
    assert batch["status"] == "failed"
    assert [(e["code"], e["line"], e["param"]) for e in batch["errors"]["data"]] == [
        ("model_not_allowed", 1, "body.model"),
        ("model_not_allowed", 2, "body.model"),
    ]


async def test_a_file_that_was_deleted_before_it_was_read_fails_the_batch(world):
    batch_id = await world.batch(lines=2)
    parent = await world.shown(batch_id)
    assert await world.processes[0].files.delete(CALLER.tenant, parent["input_file_id"])
    await world.process().work()
    batch = await world.shown(batch_id)
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "file_not_found")

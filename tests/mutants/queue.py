"""Broken builds of the queue that its tests must catch."""

import asyncio
import time

from msgspec.structs import replace

import gateway.overflow.submit
import gateway.stores.queue_jobs
import gateway.stores.queue_moves
import gateway.stores.queue_node
import gateway.stores.queue_sweep
import gateway.stores.queue_turns
from gateway.overflow.settled_flow import SettledFlow
from gateway.overflow.store import QueueStoreError
from gateway.stores.queue_schema import job_rows
from gateway.stores.queue_thread import StoreThread
from gateway.stores.redis_connection import Script


def fences_nobody() -> None:
    """What most queues do: whoever once had a job may end it."""

    def is_held(row, lease) -> bool:
        return row.is_leased

    gateway.stores.queue_moves.is_held = gateway.stores.queue_jobs.is_held = is_held


def fences_nobody_in_redis() -> None:
    """The same."""
    text, fence = (
        gateway.stores.queue_node._SCRIPT.text,
        " and row.fence == lease[2] and row.owner == lease[3]\nend",
    )
    assert fence in text
    gateway.stores.queue_node._SCRIPT = Script(text.replace(fence, "\nend"))


def acknowledges_before_the_commit() -> None:
    """What is fast: the answer goes out when the statements have run, and the disk follows."""

    def commit(self, connection, group):
        answers = [operation.otherwise for operation in group]
        now_time = self._now_time(connection)
        connection.execute("BEGIN IMMEDIATE")
        for at, operation in enumerate(group):
            if operation.is_needed is None or operation.is_needed(connection, now_time):
                connection.execute("SAVEPOINT operation")
                try:
                    answers[at] = operation.work(connection, now_time)
                except QueueStoreError as error:
                    connection.execute("ROLLBACK TO operation")
                    answers[at] = error
                connection.execute("RELEASE operation")
        self._answer(group, answers)
        time.sleep(0.05)  # the moment, drawn out so that a few kills hit it
        connection.execute("COMMIT")
        return answers

    StoreThread._commit = commit


def settles_twice() -> None:
    """What goes to the ledger is known by the try that takes it there, not by its job."""
    turn = SettledFlow.turn

    async def late(self) -> bool:
        enter = self._enter
        self._enter = slow = _Slow(self._store, enter)
        self._store.take_settled, take = slow.take_settled, self._store.take_settled
        slow.take = take
        try:
            return await turn(self)
        finally:
            self._enter = enter
            del self._store.take_settled

    SettledFlow.turn = late


class _Slow:
    """Enters rows under an id of their try, and is a moment in coming back: drawn out so that a few kills hit it."""

    def __init__(self, store, enter) -> None:
        self._store, self._enter = store, enter
        self._tries = {}
        self.take = None

    async def take_settled(self, owner, most):
        taken = await self.take(owner, most)
        self._tries = {row.job_id: row.fence for row in taken}
        return taken

    async def __call__(self, rows):
        entered = await self._enter(
            [
                row
                if self._tries[row.request_id] == 1
                else replace(row, request_id=f"{row.request_id}+{self._tries[row.request_id]}")
                for row in rows
            ]
        )
        await asyncio.sleep(0.2)
        return entered


def claims_what_is_leased() -> None:
    """What a queue without leases does: the oldest job that has not ended is handed out, whoever has it."""

    def pick(connection, line, _):
        query = "SELECT * FROM job WHERE line = ? AND state IN ('queued', 'running') ORDER BY seq LIMIT 1"
        return next(iter(job_rows(connection, query, (line,))), None)

    gateway.stores.queue_turns.pick = pick
    gateway.stores.queue_turns.has_ready = lambda *_: True


def hurries() -> None:
    """Not broken, only short-lived: results are kept for a minute, and what is known of a job for another."""
    new_job = gateway.overflow.submit.NewJob
    gateway.overflow.submit.NewJob = lambda **fields: new_job(**(fields | {"keep_s": 60.0}))
    gateway.stores.queue_sweep.FORGET_S = 60.0
    text, kept = gateway.stores.queue_node._SCRIPT.text, "local FORGET_S = 30 * 86400\n"
    assert kept in text
    gateway.stores.queue_node._SCRIPT = Script(text.replace(kept, "local FORGET_S = 60\n"))


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (
        fences_nobody,
        fences_nobody_in_redis,
        acknowledges_before_the_commit,
        settles_twice,
        claims_what_is_leased,
        hurries,
    )
}

"""Broken builds of the queue that its tests must catch."""

import time

import gateway.stores.queue_jobs
import gateway.stores.queue_moves
from gateway.overflow.store import QueueStoreError
from gateway.stores.queue_thread import StoreThread


def fences_nobody() -> None:
    """What most queues do: whoever once had a job may end it."""

    def is_held(row, lease) -> bool:
        return row.is_leased

    gateway.stores.queue_moves.is_held = gateway.stores.queue_jobs.is_held = is_held


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
        time.sleep(0.01)  # the moment, drawn out so that a few kills hit it
        connection.execute("COMMIT")
        return answers

    StoreThread._commit = commit


MUTANTS = {mutant.__name__: mutant for mutant in (fences_nobody, acknowledges_before_the_commit)}

"""Bodies, results and events of jobs on their way into a store and out of it: compressed, sealed, or in files.

Knows places and sizes; refuses to know tables. A result that is too large for a database goes to a folder, on disk before
the transaction that names it, so that a crash may leave a file too many and never one too few.
"""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gateway.overflow.bodies import Bodies, BodyError
from gateway.overflow.job import Lease, NewJob, Result
from gateway.overflow.store import INLINE_BYTES, LARGEST_BYTES, ResultTooLargeError
from gateway.stores.queue_jobs import Answer, Stored
from gateway.stores.sqlite import StorageError, prepare_directory

_AT_ONCE_BYTES: Final = 65_536  # more than this is compressed on a thread


class Content:
    """One per store. `folder` None: no result goes to a file."""

    def __init__(self, bodies: Bodies | None = None, folder: Path | None = None) -> None:
        self._bodies = bodies or Bodies()
        self._folder = folder

    async def stored(self, jobs: Sequence[NewJob]) -> list[Stored]:
        """As they are to be stored."""
        if sum(len(job.body) for job in jobs) <= _AT_ONCE_BYTES:
            return [self._stored(job) for job in jobs]
        return await asyncio.to_thread(lambda: [self._stored(job) for job in jobs])

    def _stored(self, job: NewJob) -> Stored:
        return Stored(job, self.write(job.body, job.id, "body"), self.write(job.headers, job.id, "headers"))

    def write(self, body: bytes, job_id: str, part: str) -> bytes:
        return self._bodies.write(body, f"{job_id}/{part}")

    def read(self, stored: bytes, job_id: str, part: str) -> bytes:
        """StorageError when it cannot be read."""
        return self._bodies.read(stored, f"{job_id}/{part}")

    async def answer(self, lease: Lease, result: Result | None) -> Answer | None:
        """A result as it is to be stored. ResultTooLargeError when it is not to be."""
        if result is None:
            return None
        if len(result.body) <= _AT_ONCE_BYTES:
            return self._answer(lease, result)
        return await asyncio.to_thread(self._answer, lease, result)

    def _answer(self, lease: Lease, result: Result) -> Answer:
        size = len(result.body)
        if size > LARGEST_BYTES and self._folder is None:
            raise ResultTooLargeError(
                f"{size} bytes are more than the {LARGEST_BYTES} that are kept: set `queue.result_folder`"
            )
        headers = self.write(result.headers, lease.job_id, "result-headers")
        body = self.write(result.body, lease.job_id, "result")
        if len(body) <= INLINE_BYTES or self._folder is None:
            return Answer(result.status, size, headers, body)
        name = f"{lease.job_id}.{lease.fence}"
        try:
            self._keep(name, body)
        except OSError as error:
            raise StorageError(f"Cannot write a result to {self._folder}: {error.strerror}.") from error
        return Answer(result.status, size, headers, b"", name)

    def _keep(self, name: str, body: bytes) -> None:
        assert self._folder is not None
        prepare_directory(self._folder)
        descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        directory = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    async def result(self, job_id: str, answer: Answer) -> Result:
        """As the client gets it."""
        if len(answer.body) <= _AT_ONCE_BYTES and not answer.file:
            return self._result(job_id, answer)
        return await asyncio.to_thread(self._result, job_id, answer)

    def _result(self, job_id: str, answer: Answer) -> Result:
        body = answer.body
        if answer.file:
            if self._folder is None:
                raise BodyError("A result is in a folder: set `queue.result_folder` to where it was.")
            try:
                body = (self._folder / answer.file).read_bytes()
            except OSError as error:
                raise BodyError(f"Cannot read a result in {self._folder}: {error.strerror}.") from error
        return Result(
            status=answer.status,
            headers=self.read(answer.headers, job_id, "result-headers"),
            body=self.read(body, job_id, "result"),
        )

    def remove(self, files: Sequence[str]) -> None:
        """Of results that are no longer kept, or never were."""
        for name in files:
            if name and self._folder is not None:
                (self._folder / name).unlink(missing_ok=True)

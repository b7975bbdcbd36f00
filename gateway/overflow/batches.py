"""Batches: a file of requests taken into the queue, and files of answers made of what became of them.

Owns the door's record of a batch, its checks, and the work on it: read the file, hand its lines in, and when all have
ended write the output and the error file. Any worker takes that work up where another left it: the store says how many
lines it has, and the files of a batch have names that follow from its own. Refuses to know how lines are run.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Final

import msgspec
from pydantic import Field

from gateway.http_rules import Refusal
from gateway.overflow.batch_input import BatchInput, ChangedFileError, InputLine, LineError
from gateway.overflow.batch_output import OutputLines, add_usage
from gateway.overflow.bodies import BodyError
from gateway.overflow.files import OUTPUT_PURPOSE, PURPOSE, Files
from gateway.overflow.job import (
    RENEW_S,
    Job,
    JobFilter,
    NewParent,
    Parent,
    ParentLease,
    ParentState,
    Result,
    new_id,
)
from gateway.overflow.shelf import FileRecord
from gateway.overflow.store import LeaseLostError, OutOfOrderError, QueueStore, StoreAwayError
from gateway.overflow.submit import Submitter, Wish, idempotency_of
from gateway.stores.sqlite import StorageError
from local_engine.config import Section
from policies.exchange import Caller
from policies.verdict import Denial

_log = logging.getLogger(__name__)

DOOR: Final = "batch"
_POLL_S: Final = 1.0
_AT_ONCE: Final = 2  # batches that one worker takes in or writes out at a time
_CHUNK_LINES: Final = 250
_CHUNK_BYTES: Final = 2 * 1024 * 1024
_PAGE: Final = 200
_READ_BYTES: Final = 8 * 1024 * 1024  # of results held at once
_PATIENCE_S: Final = 5.0  # between tries to hand lines in
# Longer than any file is looked for: answers must be there when the last line has ended.
_KEEP_BEYOND_S: Final = 86_400.0
# Refusals that end by themselves, soon.
_WAITS: Final = frozenset({"queue_full", "queue_unavailable"})


class BatchesConfig(Section):
    """`/v1/batches`."""

    requests: int = Field(default=50_000, ge=1, le=1_000_000)
    """Lines of one file."""
    line_bytes: int = Field(default=4_194_304, ge=1024, le=67_108_864)
    """One line."""


class BatchRecord(msgspec.Struct, frozen=True):
    """What the door remembers of a batch (`Parent.details`). `output_keep_s` None: as files are kept."""

    endpoint: str
    input_file_id: str
    completion_window: str
    caller: Caller
    metadata: dict[str, str] | None = None
    output_keep_s: float | None = None
    errors: list[LineError] = []
    model: str = ""
    output_file_id: str | None = None
    error_file_id: str | None = None
    usage: dict[str, Any] | None = None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(BatchRecord).decode


class NewBatch(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asks for, checked as far as it can be without the file. Durations in seconds."""

    endpoint: str
    input_file_id: str
    completion_window: str
    window_s: float
    metadata: dict[str, str] | None = None
    output_keep_s: float | None = None


class Batches:
    """The door. One per worker; `owner` is the worker's name, by which the store knows whose leases died with it."""

    def __init__(
        self,
        store: QueueStore,
        submitter: Submitter,
        files: Files,
        owner: str,
        settings: Callable[[], BatchesConfig],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._files = files
        self._owner = owner
        self._work = BatchWork(store, submitter, files, settings, clock)
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._is_due = asyncio.Event()

    def start(self) -> None:
        """From now on what other workers leave behind is taken up here, too."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """Leaves what is under way to others."""
        tasks = [task for task in (self._watching, *self._tasks) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def create(
        self, caller: Caller, asked: NewBatch, idempotency_key: bytes = b"", webhook: str = ""
    ) -> Parent:
        """A batch that is being checked; the one from before when the key was used. Refusal when there is no such file."""
        record = await self._files.find(caller.tenant, asked.input_file_id)
        if record is None or record.purpose != PURPOSE:
            message = (
                f"there is no file `{asked.input_file_id[:80]}` for batches: upload it with `purpose=batch`"
            )
            raise Refusal(404, "file_not_found", message, "input_file_id")
        details = _encode(
            BatchRecord(
                asked.endpoint,
                asked.input_file_id,
                asked.completion_window,
                caller,
                asked.metadata,
                asked.output_keep_s,
            )
        )
        new = NewParent(
            id=new_id("batch"),
            tenant=caller.tenant,
            key_id=caller.key_id,
            door=DOOR,
            is_finalized=True,
            expires_in_s=asked.window_s,
            details=details,
            webhook=webhook,
            idempotency=idempotency_of(caller, "/v1/batches", idempotency_key, _encode(asked)),
        )
        parent, lease = await self._store.open_parent(new, self._owner)
        if lease is not None:
            self._take_up(parent, lease)
        return parent

    async def find(self, tenant: str, batch_id: str) -> Parent | None:
        parent = await self._store.get_parent(tenant, batch_id)
        return parent if parent is not None and parent.door == DOOR else None

    async def page(self, tenant: str, after: str, limit: int) -> tuple[list[Parent], bool]:
        return await self._store.list_parents(tenant, DOOR, after, limit)

    async def cancel(self, tenant: str, batch_id: str) -> Parent | None:
        """What has ended stays as it is. None: there is none."""
        if await self.find(tenant, batch_id) is None:
            return None
        parent = await self._store.cancel_parent(tenant, batch_id)
        self._is_due.set()
        return parent

    def _take_up(self, parent: Parent, lease: ParentLease) -> None:
        task = asyncio.get_running_loop().create_task(self._carry_out(parent, lease))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        """Looks for batches with work and nobody at it."""
        while True:
            try:
                while len(self._tasks) < _AT_ONCE:
                    claimed = await self._store.claim_parent(self._owner, DOOR)
                    if claimed is None:
                        break
                    self._take_up(*claimed)
            except StoreAwayError as error:
                _log.warning("batches: %s", error)
            self._is_due.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._is_due.wait()

    async def _carry_out(self, parent: Parent, lease: ParentLease) -> None:
        work = asyncio.ensure_future(self._work.carry_out(parent, lease))
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=RENEW_S)
                if not work.done():
                    await self._renew(lease)
            work.result()
        except LeaseLostError:
            _log.info("batch %s: somebody else has it now, or it has ended", parent.id)
        except (StoreAwayError, StorageError) as error:
            _log.error("batch %s: left for later: %s", parent.id, error)
        except Exception:  # noqa: BLE001 - a bug costs one batch its time, not the worker
            _log.exception("batch %s: a bug; it is tried again when its lease ends", parent.id)
        finally:
            work.cancel()
            self._is_due.set()

    async def _renew(self, lease: ParentLease) -> None:
        try:
            await self._store.renew_parent(lease)
        except StoreAwayError as error:
            _log.warning("batches: %s", error)


class BatchWork:
    """What is to be done with a batch whose lease one has. LeaseLostError ends it at any moment."""

    def __init__(
        self,
        store: QueueStore,
        submitter: Submitter,
        files: Files,
        settings: Callable[[], BatchesConfig],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._submitter = submitter
        self._files = files
        self._settings = settings
        self._clock = clock

    async def carry_out(self, parent: Parent, lease: ParentLease) -> None:
        record = _decode(parent.details)
        if parent.state == "validating":
            await self._take_in(parent, lease, record)
        elif parent.state == "finalizing":
            await self._write_out(parent, lease, record)

    async def _take_in(self, parent: Parent, lease: ParentLease, record: BatchRecord) -> None:
        """Checks all of the file before the first line is handed in, so that a batch is carried out whole or not at all."""
        file = await self._files.find(parent.tenant, record.input_file_id)
        if file is None:
            gone = LineError(
                "file_not_found", "the input file was deleted before it was read", "input_file_id"
            )
            await self._fail(lease, record, [gone])
            return
        settings = self._settings()
        rules = BatchInput(record.endpoint, most_lines=settings.requests, line_bytes=settings.line_bytes)
        try:
            if not parent.total:
                await self._files.run(rules.check, self._files.frames(parent.tenant, file))
                if rules.errors:
                    await self._fail(lease, record, rules.errors)
                    return
            errors = await self._hand_in(parent, lease, record, file, rules)
        except (BodyError, ChangedFileError) as error:
            _log.error("batch %s: its input file cannot be read: %s", parent.id, error)
            errors = [LineError("file_unreadable", "the input file cannot be read", "input_file_id")]
        if errors:
            await self._fail(lease, record, errors)
            return
        while await self._store.release_parent(lease):
            pass

    async def _hand_in(
        self, parent: Parent, lease: ParentLease, record: BatchRecord, file: FileRecord, rules: BatchInput
    ) -> list[LineError]:
        """Goes on behind the lines that the store has. What is refused for good; empty: nothing was."""
        position = parent.total
        lines = rules.requests(self._files.frames(parent.tenant, file), position)
        while chunk := await self._files.run(_take_chunk, lines):
            refused = await self._append(parent, lease, record, position, chunk)
            if refused:
                return refused
            position += len(chunk)
        return []

    async def _append(
        self,
        parent: Parent,
        lease: ParentLease,
        record: BatchRecord,
        first: int,
        chunk: Sequence[InputLine],
    ) -> list[LineError]:
        """Until they are in: a full queue, or a store that is away, is waited for as long as the batch has time."""
        while True:
            left_s = max(60.0, parent.expires_time - self._clock())
            wishes = [
                Wish(
                    caller=record.caller,
                    path=record.endpoint,
                    body=line.body,
                    door=DOOR,
                    job_class="batch",
                    expires_in_s=left_s,
                    keep_s=left_s + _KEEP_BEYOND_S,
                    reference=line.custom_id,
                )
                for line in chunk
            ]
            try:
                outcome = await self._submitter.append(lease, first, wishes)
            except OutOfOrderError as error:
                # An answer of the store's got lost, but not what it answered.
                chunk = chunk[max(0, error.expected - first) :]
                first = error.expected
                if not chunk:
                    return []
                continue
            if isinstance(outcome, Parent):
                return []
            denials = [denial for denial in outcome if denial is not None]
            final = [denial for denial in denials if denial.code not in _WAITS]
            if final:
                return [_line_error(*pair) for pair in zip(chunk, outcome, strict=True) if pair[1] in final]
            await asyncio.sleep(_PATIENCE_S)

    async def _fail(self, lease: ParentLease, record: BatchRecord, errors: list[LineError]) -> None:
        await self._store.fail_parent(lease, _encode(msgspec.structs.replace(record, errors=errors)))

    async def _write_out(self, parent: Parent, lease: ParentLease, record: BatchRecord) -> None:
        """Both files, then the end of the batch. Done again after a crash, it makes the same files again."""
        settled_time = parent.settled_time or self._clock()
        output_id, error_id = (_file_id(parent.id, kind, settled_time) for kind in ("output", "error"))
        lines = OutputLines(
            await self._files.run(self._files.begin, parent.tenant, output_id),
            await self._files.run(self._files.begin, parent.tenant, error_id),
        )
        usage: dict[str, Any] = {}
        model = ""
        try:
            cursor: str | None = None
            while True:
                page = await self._store.list_jobs(
                    JobFilter(tenant=parent.tenant, parent=parent.id), cursor, _PAGE
                )
                for jobs in _in_portions(page.jobs):
                    results = await asyncio.gather(*(self._result(job) for job in jobs))
                    await self._files.run(lines.add, list(zip(jobs, results, strict=True)))
                for job in page.jobs:
                    model = model or job.model
                    add_usage(usage, job.usage)
                cursor = page.cursor
                if cursor is None:
                    break
            keep_s = record.output_keep_s or self._files.settings().keep_s
            names = f"{parent.id}_output.jsonl", f"{parent.id}_error.jsonl"
            published = await self._files.run(lines.publish, names, OUTPUT_PURPOSE, self._clock(), keep_s)
        finally:
            await self._files.run(lines.close)
        record = msgspec.structs.replace(
            record,
            model=model,
            usage=usage or None,
            output_file_id=published[0],
            error_file_id=published[1],
        )
        await self._store.finish_parent(lease, _outcome(parent), _encode(record))

    async def _result(self, job: Job) -> Result | None:
        return await self._store.result(job.tenant, job.id) if job.status else None


def shown(parent: Parent) -> dict[str, Any]:
    """OpenAI's batch object."""
    record = _decode(parent.details)
    state = parent.state
    if state == "finalizing" and parent.cancelled_time is not None:
        state = "cancelling"  # its files are not there yet
    counts = parent.counts
    has_failed = state == "failed"
    failed = sum(counts.get(each, 0) for each in ("failed", "dead", "expired"))
    errors = [msgspec.to_builtins(error) for error in record.errors]
    return {
        "id": parent.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "model": record.model or None,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": record.input_file_id,
        "completion_window": record.completion_window,
        "status": state,
        "output_file_id": record.output_file_id,
        "error_file_id": record.error_file_id,
        "created_at": int(parent.created_time),
        "in_progress_at": _moment(parent.released_time),
        "expires_at": int(parent.expires_time),
        "finalizing_at": None if has_failed else _moment(parent.settled_time),
        "cancelling_at": _moment(parent.cancelled_time),
        **{f"{end}_at": None for end in ("completed", "failed", "expired", "cancelled")},
        **({f"{state}_at": _moment(parent.finished_time)} if parent.is_final else {}),
        "request_counts": {
            "total": 0 if has_failed else parent.total,
            "completed": counts.get("succeeded", 0),
            "failed": 0 if has_failed else failed,
        },
        "usage": record.usage,
        "metadata": record.metadata,
    }


def _outcome(parent: Parent) -> ParentState:
    if parent.cancelled_time is not None:
        return "cancelled"
    return "expired" if parent.counts.get("expired") else "completed"


def _moment(time_s: float | None) -> int | None:
    return None if time_s is None else int(time_s)


def _file_id(batch_id: str, kind: str, settled_time: float) -> str:
    """The same for everybody who writes it, and as hard to guess as the batch's."""
    digest = hashlib.blake2b(f"{batch_id}\0{kind}".encode(), digest_size=16).hexdigest()
    return f"file-{int(settled_time * 1000):012x}{digest}"


def _take_chunk(lines: Iterator[InputLine]) -> list[InputLine]:
    """The next of them, few enough and small enough for one transaction."""
    chunk: list[InputLine] = []
    size_bytes = 0
    for line in islice(lines, _CHUNK_LINES):
        chunk.append(line)
        size_bytes += len(line.body)
        if size_bytes >= _CHUNK_BYTES:
            break
    return chunk


def _in_portions(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """So many that their results may be in memory together."""
    portion: list[Job] = []
    size_bytes = 0
    for job in jobs:
        if portion and size_bytes + job.result_bytes > _READ_BYTES:
            yield portion
            portion, size_bytes = [], 0
        portion.append(job)
        size_bytes += job.result_bytes
    if portion:
        yield portion


def _line_error(line: InputLine, denial: Denial | None) -> LineError:
    assert denial is not None  # only such lines are asked about
    param = f"body.{denial.param}" if denial.param else None
    return LineError(denial.code, denial.message, param, line.number)

"""The shelf of files for the event loop: everything that touches the disk runs on threads of its own.

Owns uploads (a form whose file is written as it comes) and the way contents go out again. Knows no HTTP beyond the
bytes of a form and what is to be refused.
"""

import asyncio
import functools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from gateway.http_rules import Refusal
from gateway.overflow.multipart import FormReader, Part
from gateway.overflow.shelf import Draft, FileRecord, FilesConfig, Shelf, new_file_id

_T = TypeVar("_T")

PURPOSE: Final = "batch"
OUTPUT_PURPOSE: Final = "batch_output"
_FIELD_BYTES: Final = 4096
_LEAST_KEEP_S, _MOST_KEEP_S = 3600, 2_592_000  # as OpenAI has it
_MAX_FILENAME: Final = 255
_SWEEP_S: Final = 600.0

_log = logging.getLogger(__name__)


class Files:
    """One per worker. `clock` is wall clock, seconds."""

    def __init__(
        self, shelf: Shelf, settings: Callable[[], FilesConfig], clock: Callable[[], float] = time.time
    ) -> None:
        self.settings = settings
        self._shelf = shelf
        self._clock = clock
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="files")
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From now on what has expired is deleted, here or by another worker."""
        self._sweeping = asyncio.get_running_loop().create_task(self._sweep_on(), name="files")

    async def upload(
        self, tenant: str, content_type: bytes | None, pieces: AsyncIterator[bytes]
    ) -> FileRecord:
        """The file in a form, once all of it is on the disk. Refusal when form or file cannot be accepted."""
        settings = self.settings()
        if await self.run(self._shelf.stored_bytes, tenant) >= settings.tenant_bytes:
            raise Refusal(
                413,
                "storage_limit_exceeded",
                f"your files may take {settings.tenant_bytes} bytes together: delete some",
            )
        upload = _Upload(self._shelf, tenant, settings, content_type)
        try:
            async for piece in pieces:
                await self.run(upload.feed, piece)
            return await self.run(upload.finish, self._clock())
        finally:
            # Nobody waits for it: a client that has left is not there to be told.
            self._threads.submit(upload.close)

    async def find(self, tenant: str, file_id: str) -> FileRecord | None:
        return await self.run(self._shelf.find, tenant, file_id, self._clock())

    async def page(
        self, tenant: str, *, purpose: str = "", limit: int, after: str = "", is_ascending: bool = False
    ) -> tuple[list[FileRecord], bool]:
        """So many files, newest first, and whether there are more."""
        work = functools.partial(self._page, tenant, purpose, limit, after, is_ascending=is_ascending)
        return await self.run(work)

    async def delete(self, tenant: str, file_id: str) -> bool:
        """False: there is none."""
        if await self.find(tenant, file_id) is None:
            return False
        await self.run(self._shelf.delete, tenant, file_id)
        return True

    def frames(self, tenant: str, record: FileRecord) -> Iterator[bytes]:
        """The content, for work that runs on one of the threads."""
        return self._shelf.read(tenant, record)

    def begin(self, tenant: str, file_id: str) -> Draft:
        """A file of the gateway's own; nothing is written before its first `write`."""
        return self._shelf.begin(tenant, file_id)

    async def content(self, tenant: str, record: FileRecord) -> AsyncIterator[bytes]:
        """Frame by frame. StorageError when it is damaged, or was deleted a moment ago."""
        frames = self._shelf.read(tenant, record)
        while (frame := await self.run(_next, frames)) is not None:
            yield frame

    async def sweep(self) -> int:
        return await self.run(self._shelf.sweep, self._clock())

    async def run(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """On one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def stop(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait({self._sweeping})

    def close(self) -> None:
        """Blocks until what is under way has ended."""
        self._threads.shutdown(wait=True)

    async def _sweep_on(self) -> None:
        while True:
            try:
                await self.sweep()
            except OSError as error:
                _log.error("files cannot be swept: %s", error)
            await asyncio.sleep(_SWEEP_S)

    def _page(
        self, tenant: str, purpose: str, limit: int, after: str, *, is_ascending: bool
    ) -> tuple[list[FileRecord], bool]:
        found: list[FileRecord] = []
        ids = self._shelf.ids(tenant)
        for file_id in ids if is_ascending else reversed(ids):
            if after and (file_id <= after if is_ascending else file_id >= after):
                continue
            record = self._shelf.find(tenant, file_id, self._clock())
            if record is None or (purpose and record.purpose != purpose):
                continue
            if len(found) == limit:
                return found, True
            found.append(record)
        return found, False


def _next(frames: Iterator[bytes]) -> bytes | None:
    return next(frames, None)


class _Upload:
    """One upload, on whatever thread its next piece is fed."""

    def __init__(self, shelf: Shelf, tenant: str, settings: FilesConfig, content_type: bytes | None) -> None:
        self._shelf = shelf
        self._tenant = tenant
        self._settings = settings
        self._form = FormReader(content_type)
        self._lock = threading.Lock()  # `close` may come while a piece of a client that left is still written
        self._is_closed = False
        self._draft: Draft | None = None
        self._filename = ""
        self._fields: dict[str, bytes] = {}
        self._field: str | None = None  # the one being read; None: the file

    def feed(self, data: bytes) -> None:
        with self._lock:
            if self._is_closed:
                return
            for found in self._form.feed(data):
                if isinstance(found, Part):
                    self._begin(found)
                elif self._field is None:
                    self._add_to_file(found)
                else:
                    self._add_to_field(self._field, found)

    def finish(self, now_time: float) -> FileRecord:
        with self._lock:
            self._form.end()
            draft = self._draft
            if draft is None:
                raise Refusal(400, "missing_required_parameter", "the form has no `file`", "file")
            purpose = self._text("purpose")
            if purpose != PURPOSE:
                raise Refusal(
                    400,
                    "invalid_value" if purpose else "missing_required_parameter",
                    "`purpose` must be `batch`: files are taken for batches only",
                    "purpose",
                )
            keep_s = self._keep_s()
            if not draft.size_bytes:
                raise Refusal(400, "empty_file", "the file is empty", "file")
            self._draft = None
            try:
                return draft.publish(self._filename, purpose, now_time, keep_s)
            except BaseException:
                draft.abandon()
                raise

    def close(self) -> None:
        """Whatever was not finished is gone."""
        with self._lock:
            self._is_closed = True
            if self._draft is not None:
                self._draft.abandon()
                self._draft = None

    def _begin(self, part: Part) -> None:
        if part.name != "file":
            if part.name in self._fields:
                raise Refusal(400, "invalid_form", f"the form has `{part.name[:64]}` twice", part.name[:64])
            self._field = part.name
            self._fields[part.name] = b""
            return
        if self._draft is not None or part.filename is None:
            raise Refusal(400, "invalid_form", "the form must have one `file`, with a file name", "file")
        self._field = None
        self._filename = _plain_name(part.filename)
        self._draft = self._shelf.begin(self._tenant, new_file_id(time.time()))

    def _add_to_file(self, data: bytes) -> None:
        draft = self._draft
        assert draft is not None  # content follows its part
        draft.write(data)
        if draft.size_bytes > self._settings.file_bytes:
            raise Refusal(413, "file_too_large", f"a file may take {self._settings.file_bytes} bytes", "file")

    def _add_to_field(self, name: str, data: bytes) -> None:
        self._fields[name] += data
        if len(self._fields[name]) > _FIELD_BYTES:
            raise Refusal(400, "invalid_form", f"a field may take {_FIELD_BYTES} bytes", name[:64])

    def _text(self, name: str) -> str:
        return self._fields.get(name, b"").decode("utf-8", "replace").strip()

    def _keep_s(self) -> float:
        anchor, seconds = self._text("expires_after[anchor]"), self._text("expires_after[seconds]")
        if not anchor and not seconds:
            return self._settings.keep_s
        if anchor != "created_at":
            raise Refusal(
                400, "invalid_value", "`expires_after[anchor]` must be `created_at`", "expires_after.anchor"
            )
        if (
            not seconds.isascii()
            or not seconds.isdigit()
            or not _LEAST_KEEP_S <= int(seconds) <= _MOST_KEEP_S
        ):
            raise Refusal(
                400,
                "invalid_value",
                f"`expires_after[seconds]` must be an integer from {_LEAST_KEEP_S} to {_MOST_KEEP_S}",
                "expires_after.seconds",
            )
        return int(seconds)


def _plain_name(filename: str) -> str:
    """A name to show; it is never a path here."""
    plain = "".join(character for character in filename if character.isprintable())
    return plain.replace("\\", "/").rpartition("/")[2][:_MAX_FILENAME] or "file"

"""`Idempotency-Key`: a request sent twice is carried out once, and the second time answered with the first answer.

After the draft of the IETF's HTTPAPI group: 409 while the first is running, 422 for another body under the same key,
else the kept answer. A scope is caller, path and key: nobody meets another's answers. Kept is what an upstream
answered whole, but for answers that ask to be tried again (408, 409, 425, 429, 5xx); everything else, a client that
left included, gives the key back. Requests without the header never come here.
"""

import asyncio
import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol

from pydantic import Field

from gateway.errors import answer_headers
from gateway.http_rules import Refusal
from gateway.recording import Recording, read_headers
from gateway.request import Request
from gateway.stores import answer_table
from gateway.stores.answer_table import LEASE_S, Asked, Claim, KeptAnswer
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.sqlite import DATABASE_NAME, Connection, StorageError, explained, open_database
from local_engine.config import Section
from policies.exchange import Exchange
from policies.verdict import Denial

HEADER: Final = b"idempotency-key"
_KEY: Final = re.compile(rb"[\x21-\x7e]{1,255}")
_ASKS_AGAIN: Final = frozenset({408, 409, 425, 429})
_FORGET_S: Final = 60.0

_AWAY: Final = (StorageError, StoreAwayError)

_log = logging.getLogger(__name__)


class IdempotencyConfig(Section):
    """`Idempotency-Key` on POSTs: a repetition is answered with the first answer, which is kept in the database."""

    enabled: bool = True
    """False: the header is ignored."""
    keep_s: float = Field(default=86_400.0, ge=1, le=31_536_000)
    """How long an answer is kept."""
    answer_bytes: int = Field(default=1_048_576, ge=1024)
    """A larger answer is not kept: its repetition is refused with 409, not carried out again."""
    total_bytes: int = Field(default=268_435_456, ge=1_048_576)
    """All kept answers; beyond it the oldest of whoever has the most go first."""


class AnswerStore(Protocol):
    """Where answers are kept: one for all workers of a machine, or for all nodes. StorageError, or StoreAwayError, when
    it cannot be asked."""

    async def claim(self, asked: Asked, keep_s: float) -> Claim: ...

    async def finish(self, scope: bytes, owner: str, answer: KeptAnswer) -> None: ...

    async def release(self, scope: bytes, owner: str) -> None: ...

    async def renew(self, owners: list[str]) -> None: ...

    async def forget(self, total_bytes: int) -> None: ...

    async def close(self) -> None: ...


class SqliteAnswers:
    """The workers of one machine. A thread of its own, started and connected by the first request that needs it."""

    def __init__(self, storage: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = storage / DATABASE_NAME
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._connection: Connection | None = None

    async def claim(self, asked: Asked, keep_s: float) -> Claim:
        claim: Claim = await self._run(lambda c: answer_table.claim(c, asked, self._clock(), keep_s))
        return claim

    async def finish(self, scope: bytes, owner: str, answer: KeptAnswer) -> None:
        await self._run(lambda c: answer_table.finish(c, scope, owner, answer))

    async def release(self, scope: bytes, owner: str) -> None:
        await self._run(lambda c: answer_table.release(c, scope, owner))

    async def renew(self, owners: list[str]) -> None:
        await self._run(lambda c: answer_table.renew(c, owners, self._clock()))

    async def forget(self, total_bytes: int) -> None:
        await self._run(lambda c: answer_table.forget(c, self._clock(), total_bytes))

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)
        if self._connection is not None:
            self._connection.close()

    async def _run(self, work: Callable[[Connection], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do, work)

    def _do(self, work: Callable[[Connection], Any]) -> Any:
        try:
            if self._connection is None:
                self._connection = open_database(self._path)
            with explained(self._path):
                return work(self._connection)
        except StorageError:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            raise


class Idempotency:
    """The claims of one worker."""

    def __init__(self, store: AnswerStore) -> None:
        self._store = store
        self._claimed: dict[str, tuple[bytes, IdempotencyConfig]] = {}  # by request id, which is the owner
        self._ending: set[asyncio.Task[None]] = set()
        self._keeping: asyncio.Task[None] | None = None

    async def begin(
        self, exchange: Exchange, request: Request, settings: IdempotencyConfig, body: bytes
    ) -> Denial | None:
        """Claims the key, or answers with what is kept (`exchange.ended` is `replayed` then), or says why not.

        Refusal when the key is malformed.
        """
        caller = exchange.caller
        if not settings.enabled or request.method != "POST" or caller is None:
            return None
        key = request.headers[HEADER]
        if not _KEY.fullmatch(key):
            raise Refusal(
                400, "invalid_idempotency_key", "`Idempotency-Key` takes 1 to 255 visible ASCII characters"
            )
        place = f"{caller.key_id}\0{request.path}\0{request.query}\0".encode()
        scope = hashlib.blake2b(place + key, digest_size=32).digest()
        asked = Asked(
            scope, hashlib.blake2b(body, digest_size=32).digest(), caller.key_id, exchange.request_id
        )
        # Before the claim is made: should the client go meanwhile, what was taken is given back.
        self._claimed[exchange.request_id] = (scope, settings)
        try:
            claim = await self._store.claim(asked, settings.keep_s)
        except _AWAY as error:
            _log.error("a request with an idempotency key is refused: %s", error)
            claim = None
        if claim is not None and claim.state == "mine":
            request.recording = Recording(settings.answer_bytes)
            self._keep_alive(settings)
            return None
        del self._claimed[exchange.request_id]
        if claim is not None and claim.answer is not None and claim.answer.status:
            _replay(exchange, request, claim.answer)
            return None
        return _denial(claim)

    def end(self, exchange: Exchange, request: Request) -> None:
        """Once, after a request that `begin` was called for has ended: its answer is kept, or its key given back."""
        claimed = self._claimed.pop(exchange.request_id, None)
        if claimed is None:
            return
        scope, _ = claimed
        owner, recording = exchange.request_id, request.recording
        if recording is not None and exchange.ended == "completed" and _is_final(recording.status):
            answer = KeptAnswer(owner, 0, b"[]", b"", is_stream=False)
            if not recording.is_too_large:
                answer = KeptAnswer(
                    owner, recording.status, recording.headers(), recording.body, recording.is_stream
                )
            work = self._store.finish(scope, owner, answer)
        else:
            work = self._store.release(scope, owner)
        task = asyncio.get_running_loop().create_task(_logged(work))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """Once no request is left."""
        if self._keeping is not None:
            self._keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeping
        if self._ending:
            await asyncio.wait(self._ending)
        await self._store.close()

    def _keep_alive(self, settings: IdempotencyConfig) -> None:
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.get_running_loop().create_task(self._keep(settings))

    async def _keep(self, settings: IdempotencyConfig) -> None:
        """While requests are claimed: renews their leases, and now and then forgets what has expired."""
        forget_at = 0.0
        loop = asyncio.get_running_loop()
        while True:
            if loop.time() >= forget_at:
                await _logged(self._store.forget(settings.total_bytes))
                forget_at = loop.time() + _FORGET_S
            await asyncio.sleep(LEASE_S / 5)
            if not self._claimed:
                return
            await _logged(self._store.renew(list(self._claimed)))


def _replay(exchange: Exchange, request: Request, answer: KeptAnswer) -> None:
    headers = [
        *read_headers(answer.headers),
        *answer_headers(exchange.dialect.family, exchange.request_id),
        (b"idempotency-replayed", b"true"),
        (b"x-headgate-replay-of", answer.request_id.encode()),
    ]
    exchange.ended = "replayed"
    exchange.status = answer.status
    if answer.is_stream:
        request.start(answer.status, headers)
        request.write(answer.body)
        request.finish()
    else:
        request.respond(answer.status, headers, answer.body)


def _denial(claim: Claim | None) -> Denial:
    if claim is None:
        return Denial(
            503,
            "idempotency_unavailable",
            "it cannot be told whether this `Idempotency-Key` was used before; try again",
            retry_after_s=1.0,
        )
    if claim.state == "other_body":
        return Denial(
            422,
            "idempotency_key_reused",
            "this `Idempotency-Key` was used with another body: use a new one for a new request",
        )
    if claim.state == "running":
        return Denial(
            409,
            "idempotency_key_in_use",
            "the first request with this `Idempotency-Key` is still running",
            retry_after_s=1.0,
        )
    return Denial(
        409,
        "idempotency_answer_too_large",
        "the request with this `Idempotency-Key` was answered, and its answer is too large to be kept",
    )


def _is_final(status: int) -> bool:
    return 200 <= status < 500 and status not in _ASKS_AGAIN


async def _logged(work: Any) -> None:
    try:
        await work
    except _AWAY as error:
        _log.error("idempotency keys: %s", error)

"""A node's side of a queue in Redis: its connection, the epoch it knows, and what it says again after Redis lost something.

An epoch is one Redis that has lost nothing: a server that is new, was restarted or took over gets another one, and every
script is refused that names an old one. Whoever is refused learns the new epoch, says there what its journal has that
was not said in it yet, and repeats its call. So a flush or a failover loses nothing as long as the nodes' disks are there.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from gateway.overflow.job import Lease
from gateway.overflow.store import (
    IdempotencyConflictError,
    LeaseLostError,
    OutOfOrderError,
    QueueFullError,
    QueueStoreError,
)
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.queue_journal import Ending, Journal, Promise, Step
from gateway.stores.queue_records import ending_of
from gateway.stores.queue_reply import JOB_FIELDS, end_binary, end_words, job_row
from gateway.stores.queue_schema import JobRow
from gateway.stores.redis_connection import RedisConnection, Script

_PARTS: Final = ("core", "parents", "jobs", "sweep", "restore")
_SCRIPT: Final = Script("".join(Path(__file__).with_name(f"queue_{part}.lua").read_text() for part in _PARTS))
_ANY_EPOCH: Final = "*"
_TRIES: Final = 3
_AT_ONCE: Final = 200
_PAGES: Final = 10  # of so many promises, in one turn: more jobs may be accepted here than are run here
_GROUP: Final = 64  # calls in one trip
_RELEASED: Final = 500
_NOT_THERE: Final = -1
_WAIT_MS: Final = 1000

_log = logging.getLogger(__name__)
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder().decode
_FIELDS: Final = _encode(JOB_FIELDS)


class _Call(NamedTuple):
    epoch: str
    words: tuple[Any, ...]
    answer: "asyncio.Future[list[Any]]"
    is_promise: bool


class QueueNode:
    """One per process. `grace_s`: how long nothing is claimed in a new epoch, so that ends are said before what has not ended.
    `replicas`: how many of them must have a job before it counts as accepted. `now_us`: instead of the server's time."""

    def __init__(
        self,
        connection: RedisConnection,
        journal: Journal,
        *,
        grace_s: float = 5.0,
        replicas: int = 0,
        now_us: Callable[[], int] | None = None,
    ) -> None:
        self.journal = journal
        self._connection = connection
        self._key = connection.key("queue")
        self._turn = asyncio.Lock()
        self._waiting: deque[_Call] = deque()
        self._sending: asyncio.Task[None] | None = None
        self._grace_s, self._replicas, self._now_us = grace_s, replicas, now_us
        self._epoch = ""  # as far as known
        self._met = 0  # the latest one
        self._meeting = asyncio.Lock()
        self._checked = self._checked_end = ""  # the last promise and end that were looked at

    @property
    def epoch(self) -> int:
        """The one of the latest call."""
        return int(self._epoch or 0)

    async def ask(
        self, verb: str, arguments: dict[str, Any], binary: Sequence[bytes] = (), *, is_promise: bool = False
    ) -> list[Any]:
        """The script's answer. QueueStoreErrors as it says, StoreAwayError when it says nothing."""
        for _ in range(_TRIES):
            epoch = self._epoch or await self._meet()
            answer = await self._call(verb, epoch, arguments, binary, is_promise=is_promise)
            if answer[0] == b"ok":
                return answer[1:]
            if answer[0] != b"epoch":
                raise _refusal(answer)
            self._epoch = ""
        raise StoreAwayError("it loses its data again and again")

    async def tend(self) -> None:
        """Now and then: whether this is still the Redis it was, whether all was said, and what need not be kept any more."""
        self._epoch = ""
        await self._meet()
        for _ in range(_PAGES):
            await self._check_promises()
            if not self._checked:
                break
        ids = await self.journal.ends_after(self._checked_end, _AT_ONCE)
        self._checked_end = ids[-1] if len(ids) == _AT_ONCE else ""
        if purged := await self._those("purged", ids):
            await self.journal.purge(purged)
        await self.journal.forget()

    async def _check_promises(self) -> None:
        """The next ones: of those that ended elsewhere nothing need be kept."""
        ids = await self.journal.promised(self._checked, _AT_ONCE)
        self._checked = ids[-1] if len(ids) == _AT_ONCE else ""
        if ids:
            (ended,) = await self.ask("ended", {"ids": ids})
            for _, packed in ended:
                if packed:
                    await self._remember(job_row(packed))
            await self.journal.kept([each[0].decode() for each in ended])

    async def _remember(self, row: JobRow) -> None:
        """A sweep ended it, whoever's: it stays ended, whatever Redis loses."""
        lease = Lease(row.id, row.fence, row.owner)
        arguments = end_words(lease, None, row.error, None, row.cost_nanousd) | {"state": row.state}
        ending = ending_of(row, lease, (arguments, end_binary(None, b"", row.usage)), self.epoch)
        await self.journal.put_end(ending._replace(is_final=True))

    async def _those(self, verb: str, ids: list[str]) -> list[str]:
        if not ids:
            return []
        (found,) = await self.ask(verb, {"ids": ids})
        return [each.decode() for each in found]

    async def close(self) -> None:
        await self.journal.close()
        await self._connection.close()

    async def _call(
        self,
        verb: str,
        epoch: str,
        arguments: dict[str, Any],
        binary: Sequence[bytes] = (),
        *,
        is_promise: bool = False,
    ) -> list[Any]:
        """One call's answer. Calls that wait for the connection go together: one trip, one script."""
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        words = (verb, _encode(arguments), len(binary), *binary)
        self._waiting.append(_Call(epoch, words, answer, is_promise))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())
        return await answer

    async def _send(self) -> None:
        while self._waiting:
            epoch, group = self._waiting[0].epoch, list[_Call]()
            while self._waiting and len(group) < _GROUP and self._waiting[0].epoch == epoch:
                group.append(self._waiting.popleft())
            answers: list[Any]
            try:
                answers = await self._run(epoch, group)
            except StoreAwayError as error:
                self._epoch = ""  # it may be another one when it is back
                answers = [error] * len(group)
            except BaseException as error:
                answers = [StoreAwayError(f"it failed ({type(error).__name__})")] * len(group)
                raise
            finally:
                _deliver(group, answers)

    async def _run(self, epoch: str, group: Sequence["_Call"]) -> list[Any]:
        now = "" if self._now_us is None else repr(self._now_us() / 1e6)
        words = [now, epoch, _FIELDS, len(group), *(word for call in group for word in call.words)]
        async with self._turn:
            answers: list[Any] = await self._connection.run(_SCRIPT, (self._key,), words)
            if self._replicas and any(call.is_promise for call in group):
                found = await self._connection.call("WAIT", self._replicas, _WAIT_MS)
                if found < self._replicas:
                    raise StoreAwayError(f"only {found} of {self._replicas} replicas have it")
        return answers

    async def _meet(self) -> str:
        """Which epoch it is; what was not said in it is."""
        async with self._meeting:
            if self._epoch:
                return self._epoch
            try:
                server = await self._server()
            except StoreAwayError:
                server = await self._server()  # that may only have been a connection of before a restart
            asked = {"run_id": str(server["run_id"]), "grace_s": self._grace_s, "known": self._met}
            epoch = str((await self._call("begin", _ANY_EPOCH, asked))[1].decode())
            said = await self._say_again(epoch)
            # In the same one it was only away, and is told what was promised meanwhile.
            if said and int(epoch) != self._met:
                _log.warning(
                    "the queue's Redis lost data, or is another: it was told again what was promised",
                    extra={"epoch": epoch, "told": said},
                )
            self._epoch, self._met = epoch, int(epoch)
            return epoch

    async def _server(self) -> dict[str, Any]:
        async with self._turn:
            found: dict[str, Any] = await self._connection.call("INFO", "server")
        return found

    async def _say_again(self, epoch: str) -> int:
        """Ends first; then parents, what belongs to them, and what became of them. How many of all."""
        journal, number = self.journal, int(epoch)
        said = await self._say_all(epoch, lambda: journal.unsaid_ends(number, _AT_ONCE), self._say_end)
        said += await self._steps(epoch, "open")
        said += await self._say_all(
            epoch, lambda: journal.unsaid_promises(number, _AT_ONCE), self._say_promise
        )
        for name in ("release", "cancel", "end"):
            said += await self._steps(epoch, name)
        return said

    async def _steps(self, epoch: str, name: str) -> int:
        number = int(epoch)
        return await self._say_all(
            epoch, lambda: self.journal.unsaid_steps(number, name, _AT_ONCE), self._say_step
        )

    async def _say_all(self, epoch: str, unsaid: Callable[[], Any], say: Callable[[str, Any], Any]) -> int:
        count = 0
        while True:
            rows = await unsaid()
            said = [row for row in rows if await say(epoch, row)]
            if said:
                await self.journal.said(said, int(epoch))
            count += len(said)
            if len(rows) < _AT_ONCE or not said:
                return count

    async def _say(
        self, epoch: str, verb: str, arguments: dict[str, Any], binary: Sequence[bytes] = ()
    ) -> int:
        answer = await self._call(verb, epoch, arguments, binary)
        if answer[0] == b"epoch":
            raise StoreAwayError("it lost its data again")
        return int(answer[1])

    async def _say_end(self, epoch: str, row: Ending) -> bool:
        plain, arguments, binary = _decode(row.record)
        arguments = arguments | {"job": plain, "is_intent": not row.is_final}
        is_taken = bool(await self._say(epoch, "restore_end", arguments, binary))
        if not row.is_final or not is_taken:
            await self.journal.close_end(row.job_id, row.fence, row.owner, is_taken=is_taken)
        return True

    async def _say_promise(self, epoch: str, row: Promise) -> bool:
        plain, binary = _decode(row.record)
        await self._say(epoch, "restore_job", {"job": plain}, binary)
        return True

    async def _say_step(self, epoch: str, row: Step) -> bool:
        arguments, binary = _decode(row.record)
        if row.name == "open":
            await self._say(epoch, "restore_parent", arguments, binary)
            return True
        if row.name == "cancel":
            answer = await self._call("cancel_parent", epoch, arguments)
            return len(answer) > 1
        if row.name == "end":
            return await self._say(epoch, "restore_parent_end", arguments, binary) != _NOT_THERE
        while (left := await self._say(epoch, "restore_release", arguments | {"most": _RELEASED})) > 0:
            continue
        return left != _NOT_THERE


def _deliver(group: Sequence[_Call], answers: Sequence[Any]) -> None:
    for call, answer in zip(group, answers, strict=True):
        if call.answer.done():
            continue  # whoever asked was cancelled
        if isinstance(answer, StoreAwayError):
            call.answer.set_exception(answer)
        else:
            call.answer.set_result(answer)


def _refusal(answer: list[Any]) -> QueueStoreError:
    kind = answer[0]
    if kind == b"lost":
        return LeaseLostError("it is somebody else's, or has ended")
    if kind == b"conflict":
        return IdempotencyConflictError("the key was used with other content")
    if kind == b"full":
        return QueueFullError(int(answer[1]), int(answer[2]))
    return OutOfOrderError(int(answer[1]))

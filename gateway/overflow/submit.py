"""How a door hands work in: it says who asks for what; admission says whether and as what; the store commits it.

Doors know no limits and no lanes, admission knows no store. What is returned is committed to disk: a door may answer
202 with it. A Denial is a refusal in the caller's terms; nothing was stored, and what admission took is given back.
"""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import msgspec

from gateway.overflow.job import (
    Door,
    IdempotencyKey,
    Job,
    JobClass,
    NewJob,
    NewParent,
    Parent,
    ParentLease,
    TenantLimits,
    new_id,
)
from gateway.overflow.store import (
    IdempotencyConflictError,
    QueueFullError,
    QueueStore,
    QueueStoreError,
    StoreAwayError,
)
from policies.exchange import Caller
from policies.verdict import Denial

_RETRY_S: Final = 30.0
_AWAY_RETRY_S: Final = 2.0


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """One request to be run later. `path` and `body` are as an ordinary request's: `/v1/chat/completions` and its JSON.

    `expires_in_s` and `keep_s` None: as configured. `idempotency_key`: the header's value. `job_id`: for doors whose ids
    have another form (`resp_...`); "": made here."""

    caller: Caller
    path: str
    body: bytes
    headers: Sequence[tuple[bytes, bytes]] = ()
    door: Door = "job"
    job_class: JobClass = "flex"
    is_stream: bool = False
    expires_in_s: float | None = None
    keep_s: float | None = None
    idempotency_key: bytes = b""
    webhook: str = ""
    reference: str = ""
    details: bytes = b""
    job_id: str = ""


class Admitted(msgspec.Struct, frozen=True, kw_only=True):
    """What admission adds: the lane, the price of a turn, and what it reserved."""

    lane: str
    model: str
    estimate: int
    limits: TenantLimits
    expires_in_s: float
    keep_s: float
    max_attempts: int
    caller: bytes  # opaque, for the runner
    headers: bytes = b""
    reservation: bytes = b""


class Admission(Protocol):
    """Judges wishes. One per worker."""

    async def admit(self, wish: Wish) -> Admitted | Denial:
        """Whether the caller may have this run, with what is known now: model, access, limits, size."""
        ...

    def give_back(self, admitted: Admitted) -> None:
        """It was not stored after all, or had been before."""
        ...


class Submitter:
    """Hands work in. One per worker."""

    def __init__(self, store: QueueStore, admission: Admission) -> None:
        self._store = store
        self._admission = admission

    async def submit(self, wish: Wish) -> Job | Denial:
        """A job, committed; the one from before when the idempotency key was used with the same wish."""
        admitted = await self._admission.admit(wish)
        if isinstance(admitted, Denial):
            return admitted
        try:
            submitted = await self._store.submit(_new_job(wish, admitted), admitted.limits)
        except (QueueFullError, IdempotencyConflictError) as error:
            self._admission.give_back(admitted)
            return denial_of(error)
        except StoreAwayError as error:
            # It may be there all the same, and its end gives back what was taken; else that lapses with this worker.
            return denial_of(error)
        if not submitted.is_new:
            self._admission.give_back(admitted)
        return submitted.job

    async def submit_all(self, parent: NewParent, wishes: Sequence[Wish]) -> Parent | list[Denial | None]:
        """At most 1,000 wishes as one; all or none. The list says which were refused."""

        async def store(jobs: list[NewJob], limits: TenantLimits) -> tuple[Parent, bool]:
            return await self._store.submit_all(parent, jobs, limits)

        return await self._together(wishes, store)

    async def append(
        self, lease: ParentLease, first: int, wishes: Sequence[Wish]
    ) -> Parent | list[Denial | None]:
        """Children of a parent that is `validating`, staged; all or none. LeaseLostError and OutOfOrderError pass through."""

        async def store(jobs: list[NewJob], limits: TenantLimits) -> tuple[Parent, bool]:
            return await self._store.append_children(lease, first, jobs, limits), True

        return await self._together(wishes, store)

    async def _together(
        self,
        wishes: Sequence[Wish],
        store: Callable[[list[NewJob], TenantLimits], Awaitable[tuple[Parent, bool]]],
    ) -> Parent | list[Denial | None]:
        judged = [await self._admission.admit(wish) for wish in wishes]
        taken = [each for each in judged if not isinstance(each, Denial)]
        if len(taken) < len(judged) or not taken:
            self._give_back(taken)
            return [each if isinstance(each, Denial) else None for each in judged]
        jobs = [_new_job(wish, each) for wish, each in zip(wishes, taken, strict=True)]
        try:
            parent, is_kept = await store(jobs, taken[0].limits)
        except StoreAwayError as error:
            return [denial_of(error)] * len(wishes)  # as in `submit`
        except (QueueFullError, IdempotencyConflictError) as error:
            self._give_back(taken)
            return [denial_of(error)] * len(wishes)
        except QueueStoreError:
            self._give_back(taken)
            raise
        if not is_kept:
            self._give_back(taken)
        return parent

    def _give_back(self, taken: Sequence[Admitted]) -> None:
        for each in taken:
            self._admission.give_back(each)


def idempotency_of(caller: Caller, path: str, key: bytes, content: bytes) -> IdempotencyKey | None:
    """Scope and fingerprint; None without a key. Nobody meets another caller's."""
    if not key:
        return None
    place = f"{caller.key_id}\0{path}\0".encode()
    return IdempotencyKey(
        hashlib.blake2b(place + key, digest_size=32).digest(),
        hashlib.blake2b(content, digest_size=32).digest(),
    )


def _new_job(wish: Wish, admitted: Admitted) -> NewJob:
    caller = wish.caller
    return NewJob(
        id=wish.job_id or new_id("job"),
        tenant=caller.tenant,
        key_id=caller.key_id,
        lane=admitted.lane,
        model=admitted.model,
        path=wish.path,
        body=wish.body,
        headers=admitted.headers,
        caller=admitted.caller,
        door=wish.door,
        job_class=wish.job_class,
        is_stream=wish.is_stream,
        estimate=admitted.estimate,
        max_attempts=admitted.max_attempts,
        expires_in_s=admitted.expires_in_s,
        keep_s=admitted.keep_s,
        reference=wish.reference,
        webhook=wish.webhook,
        reservation=admitted.reservation,
        details=wish.details,
        idempotency=idempotency_of(caller, wish.path, wish.idempotency_key, wish.body),
    )


def denial_of(error: QueueFullError | IdempotencyConflictError | StoreAwayError) -> Denial:
    """What a caller is told of a store's no."""
    if isinstance(error, QueueFullError):
        return Denial(
            429,
            "queue_full",
            f"{error.depth} jobs of yours are waiting already ({error.depth_bytes} bytes): let some finish, or cancel some",
            retry_after_s=_RETRY_S,
        )
    if isinstance(error, IdempotencyConflictError):
        return Denial(
            422,
            "idempotency_key_reused",
            "this `Idempotency-Key` was used with another body: use a new one for a new request",
        )
    return Denial(
        503,
        "queue_unavailable",
        "the queue cannot store the request now, so it was not accepted; try again",
        retry_after_s=_AWAY_RETRY_S,
    )

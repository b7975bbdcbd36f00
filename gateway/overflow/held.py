"""Who waits on a connection for which job: so that whoever sends a request again takes up the job made of it before.

Owns the contract of the store of that, and how a request is recognised. A held job has an audience as long as somebody
renews it; without one it may be taken up by one who sends the same request, once, and after a while it is nobody's.
Knows no jobs but their ids.
"""

import hashlib
from typing import Protocol

import msgspec

from policies.exchange import Caller


class Held(msgspec.Struct, frozen=True):
    """A job and the requests it is the answer to."""

    job_id: str
    tenant: str
    scope: bytes


class HeldStore(Protocol):
    """All raise StoreAwayError. Time is the store's own."""

    async def hold(self, held: Held, for_s: float) -> None:
        """Somebody waits for it, for so long from now at least; renewed by calling it again."""
        ...

    async def leave(self, job_id: str) -> None:
        """Nobody does any more, and it was not answered."""
        ...

    async def forget(self, job_id: str) -> None:
        """It was answered: the same request again is a new one."""
        ...

    async def take_up(self, scope: bytes, for_s: float) -> Held | None:
        """The oldest job of this scope that nobody waits for, held by whoever asks from now on; of several that ask
        one gets it."""
        ...

    async def is_any(self) -> bool:
        """Whether there may be something to take up."""
        ...

    async def abandoned(self, after_s: float, most: int = 100) -> list[Held]:
        """Jobs that nobody has waited for in so long; they are forgotten here."""
        ...

    async def close(self) -> None: ...


def scope_of(caller: Caller, path: str, body: bytes, idempotency_key: bytes = b"") -> bytes:
    """The same for the same request of the same key, and for nothing else."""
    place = f"{caller.key_id}\0{path}\0".encode()
    digest = hashlib.blake2b(place, digest_size=32)
    digest.update(hashlib.blake2b(idempotency_key, digest_size=32).digest())
    digest.update(body)
    return digest.digest()

"""The table of answers kept for `Idempotency-Key`: claimed, finished, given back, forgotten.

Knows scopes, owners and bytes, not what an answer means. Invariants: of all that claim a scope at the same time one
gets it; only the owner of a claim may end it; a claim whose owner stopped renewing it is free again. Times are wall
clock seconds, passed in.
"""

from typing import Final, Literal, NamedTuple

from gateway.stores.sqlite import Connection

# A worker renews what it holds several times in this; one that died has its claims taken over after it.
LEASE_S: Final = 30.0
_FORGET_ROWS: Final = 200


class KeptAnswer(NamedTuple):
    """An answer as it was sent. `status` 0: it was given, but is too large to be kept."""

    request_id: str
    status: int
    headers: bytes  # a JSON list of pairs
    body: bytes
    is_stream: bool


class Claim(NamedTuple):
    """What became of a claim; `answer` is there when it is `done`."""

    state: Literal["mine", "running", "other_body", "done"]
    answer: KeptAnswer | None = None


class Asked(NamedTuple):
    """`scope` tells requests apart that may replay each other, `fingerprint` what they ask for."""

    scope: bytes
    fingerprint: bytes
    tenant: str
    owner: str


def claim(connection: Connection, asked: Asked, now_time: float, keep_s: float) -> Claim:
    """Takes the scope for `asked.owner`, or says why not."""
    with connection:
        taken = connection.execute(
            "INSERT INTO kept_answer (scope, fingerprint, tenant, owner, lease_until_time, expires_time) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (scope) DO UPDATE SET fingerprint = excluded.fingerprint, "
            "tenant = excluded.tenant, owner = excluded.owner, lease_until_time = excluded.lease_until_time, "
            "expires_time = excluded.expires_time, status = NULL, request_id = '', headers = x'', body = x'' "
            "WHERE kept_answer.expires_time <= ? OR (status IS NULL AND lease_until_time <= ?) RETURNING 1",
            (
                asked.scope,
                asked.fingerprint,
                asked.tenant,
                asked.owner,
                now_time + LEASE_S,
                now_time + keep_s,
                now_time,
                now_time,
            ),
        ).get
        if taken:
            return Claim("mine")
        fingerprint, *answer = next(
            iter(
                connection.execute(
                    "SELECT fingerprint, request_id, status, headers, body, is_stream FROM kept_answer "
                    "WHERE scope = ?",
                    (asked.scope,),
                )
            )
        )
    if fingerprint != asked.fingerprint:
        return Claim("other_body")
    if answer[1] is None:
        return Claim("running")
    request_id, status, headers, body, is_stream = answer
    return Claim("done", KeptAnswer(request_id, status, headers, body, bool(is_stream)))


def finish(connection: Connection, scope: bytes, owner: str, answer: KeptAnswer) -> bool:
    """Keeps the answer; False when the claim was lost to another owner meanwhile."""
    connection.execute(
        "UPDATE kept_answer SET request_id = ?, status = ?, headers = ?, body = ?, is_stream = ? "
        "WHERE scope = ? AND owner = ? AND status IS NULL",
        (*answer, scope, owner),
    )
    return connection.changes() == 1


def release(connection: Connection, scope: bytes, owner: str) -> None:
    """Nothing is kept: the next request with the key is carried out."""
    connection.execute(
        "DELETE FROM kept_answer WHERE scope = ? AND owner = ? AND status IS NULL", (scope, owner)
    )


def renew(connection: Connection, owners: list[str], now_time: float) -> None:
    """The owners are alive and still at it."""
    with connection:
        connection.executemany(
            "UPDATE kept_answer SET lease_until_time = ? WHERE owner = ? AND status IS NULL",
            [(now_time + LEASE_S, owner) for owner in owners],
        )


def forget(connection: Connection, now_time: float, total_bytes: int) -> None:
    """Removes what has expired; beyond `total_bytes` also the oldest of whoever has the most kept."""
    connection.execute(
        "DELETE FROM kept_answer WHERE scope IN "
        "(SELECT scope FROM kept_answer WHERE expires_time <= ? LIMIT ?)",
        (now_time, _FORGET_ROWS),
    )
    while (
        connection.execute("SELECT coalesce(sum(length(body)), 0) FROM kept_answer").get or 0
    ) > total_bytes:
        connection.execute(
            "DELETE FROM kept_answer WHERE scope IN (SELECT scope FROM kept_answer WHERE status IS NOT NULL "
            "AND tenant = (SELECT tenant FROM kept_answer GROUP BY tenant ORDER BY sum(length(body)) DESC LIMIT 1) "
            "ORDER BY expires_time LIMIT 16)"
        )

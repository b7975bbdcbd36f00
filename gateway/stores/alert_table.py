"""The tables of alerts: raised once per threshold and window, and delivered until a receiver has them.

Knows ids, times and bytes. Invariant: of all that raise the same alert, one is told that it is new. An alert and its
deliveries are made in one transaction, so that what is raised is delivered, whoever dies. Times are wall clock seconds.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from gateway.stores.sqlite import Connection

_KEPT_S: Final = 90 * 86_400


class Alert(NamedTuple):
    """`id` is the same wherever and however often it is raised: `alert_` and a hash of counter, window, threshold."""

    id: str
    payload: bytes
    raised_time: int


class Delivery(NamedTuple):
    """One alert on its way to one receiver; `attempts` that failed so far."""

    message_id: str
    receiver: str
    payload: bytes
    attempts: int


def put(connection: Connection, alert: Alert, receivers: Sequence[str]) -> bool:
    """True when nobody has raised it before."""
    with connection:
        is_new = bool(
            connection.execute(
                "INSERT INTO alert (id, payload, raised_time) VALUES (?, ?, ?) "
                "ON CONFLICT (id) DO NOTHING RETURNING 1",
                alert,
            ).get
        )
        if is_new:
            connection.executemany(
                "INSERT INTO alert_delivery (alert_id, receiver, next_time) VALUES (?, ?, ?)",
                [(alert.id, receiver, alert.raised_time) for receiver in receivers],
            )
    return is_new


def take(connection: Connection, now_time: float, most: int, lease_s: float) -> list[Delivery]:
    """Those whose time has come, the oldest first; their time comes again after the lease."""
    with connection:
        rows = connection.execute(
            "SELECT alert_id, receiver, payload, attempts FROM alert_delivery JOIN alert ON id = alert_id "
            "WHERE next_time <= ? ORDER BY next_time LIMIT ?",
            (now_time, most),
        )
        taken = [Delivery(*row) for row in rows]
        for delivery in taken:
            put_off(connection, delivery, now_time + lease_s)
    return taken


def put_off(connection: Connection, delivery: Delivery, next_time: float) -> None:
    """It was not tried."""
    connection.execute(
        "UPDATE alert_delivery SET next_time = ? WHERE alert_id = ? AND receiver = ?",
        (next_time, delivery.message_id, delivery.receiver),
    )


def retry(connection: Connection, delivery: Delivery, next_time: float, error: str) -> None:
    """It failed and will be tried again."""
    connection.execute(
        "UPDATE alert_delivery SET attempts = attempts + 1, next_time = ?, error = ? "
        "WHERE alert_id = ? AND receiver = ?",
        (next_time, error, delivery.message_id, delivery.receiver),
    )


def end(connection: Connection, delivery: Delivery, outcome: str) -> None:
    """It was delivered, or is given up: `outcome` says which."""
    connection.execute(
        "UPDATE alert_delivery SET attempts = attempts + 1, next_time = NULL, error = ? "
        "WHERE alert_id = ? AND receiver = ?",
        (outcome, delivery.message_id, delivery.receiver),
    )


def forget(connection: Connection, now_time: float) -> None:
    """Removes alerts so old that nobody asks whether they were raised."""
    connection.execute("DELETE FROM alert WHERE raised_time < ?", (now_time - _KEPT_S,))

"""The alert that an engine is given up, as receivers get it. What is raised and delivered is `alert_delivery`'s."""

import hashlib
from datetime import UTC, datetime
from typing import Final

import orjson

from gateway.stores.alert_table import Alert
from local_engine.surroundings import Event

EVENT: Final = "engine.crash_looped"


def alert_of(event: Event, now_time: float) -> Alert:
    """One for each time it happens. The cause may name paths of this machine, and holds no secret."""
    cause = event.cause
    identity = f"{EVENT}\0{event.replica}\0{now_time}"
    data = {
        "engine": event.replica,
        "pool": event.replica.partition("/")[0],
        "cause": cause.kind if cause is not None else "unknown",
        "text": cause.text if cause is not None else "",
    }
    when = datetime.fromtimestamp(now_time, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    payload = orjson.dumps({"type": EVENT, "timestamp": when, "data": data})
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    return Alert(f"alert_{digest}", payload, int(now_time))

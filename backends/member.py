"""One member of a pool, as whoever runs or finds the engines names it: an address, or one data-parallel rank behind it.

Owns what a worker must know of an endpoint beyond its pool's settings. A pool whose engines Headgate runs, or whose
addresses it looks up, gets its members from the parent process (`gateway/placed.py`); one with `endpoints` in the
configuration has them derived. Refuses to know how a member is started or found.
"""

from typing import Literal

from local_engine.config import Secret, Section

Role = Literal["both", "prefill", "decode"]


class Member(Section):
    """`name` is what sessions are hashed with, so that they find it again when its address changes.

    A member that is not open is known and gets nothing new: its engine is starting, draining, stopped or asleep.
    """

    name: str
    base_url: str
    rank: int | None = None  # named to the engine by `X-data-parallel-rank`
    engine: str = ""  # the label `engine` of its series on its address's metrics page; empty: all of them
    role: Role = "both"
    weight: float = 1.0
    is_open: bool = True
    api_key: Secret | None = None  # it was started with; None: the pool's
    kv_events: str | None = None  # ZMQ endpoint of its KV events
    kv_replay: str | None = None  # ZMQ endpoint that repeats what was missed

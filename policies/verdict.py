"""A policy's "no".

A Denial is returned, never raised: refusing is normal. It says what the caller can change.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refused:
    """Where a limit stood when it refused. Units are its measure's: requests, tokens, slots, nano-dollars."""

    limit: str  # the limit's name
    level: str  # org | team | key | user | model | tag
    scope: str  # whose, by the name at that level
    measure: str
    amount: int
    spent: int
    reserved: int  # by requests under way and by slices that workers hold
    requested: int  # what this request would have reserved
    resets_time: (
        float | None
    )  # wall clock seconds when this request would fit by waiting alone; None: unknown or never


@dataclass(frozen=True, slots=True)
class Denial:
    """`status` and `code` in the client's terms; `retry_after_s` only where waiting helps."""

    status: int
    code: str  # machine-readable, stable: programs branch on it
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    refused: Refused | None = None  # by a limit

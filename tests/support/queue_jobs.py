"""Jobs, outcomes and parents for tests of the queue's stores."""

from typing import Any

from gateway.overflow.job import (
    Failure,
    IdempotencyKey,
    NewJob,
    NewParent,
    Outcome,
    Result,
    TenantLimits,
    new_id,
)

NO_LIMITS = TenantLimits()
LANE = "m"


def a_job(job_id: str = "", tenant: str = "t1", **others: Any) -> NewJob:
    values: dict[str, Any] = {
        "id": job_id or new_id("job"),
        "tenant": tenant,
        "key_id": "k1",
        "lane": LANE,
        "model": "m",
        "path": "/v1/chat/completions",
        "body": b'{"model":"m"}',
    }
    return NewJob(**(values | others))


def a_parent(parent_id: str = "", tenant: str = "t1", **others: Any) -> NewParent:
    values: dict[str, Any] = {
        "id": parent_id or new_id("batch"),
        "tenant": tenant,
        "key_id": "k1",
        "door": "batch",
        "is_finalized": True,
    }
    return NewParent(**(values | others))


def an_answer(body: bytes = b'{"ok":true}', **others: Any) -> Outcome:
    values: dict[str, Any] = {
        "state": "succeeded",
        "result": Result(status=200, headers=b"[]", body=body),
        "ledger_row": b"row",
        "cost_nanousd": 7,
    }
    return Outcome(**(values | others))


def a_failure(**others: Any) -> Failure:
    return Failure(**({"error": "engine lost", "retry_in_s": 1.0} | others))


def a_key(name: bytes = b"key", content: bytes = b"content") -> IdempotencyKey:
    return IdempotencyKey(b"scope:" + name, b"print:" + content)

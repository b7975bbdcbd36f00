"""A job as its caller and operators see it: one JSON object, and the 202 that answers a request with it.

Nothing of owners, fences or leases is in it, and nothing of the request itself. Knows no store.
"""

from typing import Any, Final

import orjson

from backends.dialect import Family
from gateway.errors import Headers, answer_headers, denial_answer
from gateway.overflow.job import Job, Standing
from policies.verdict import Denial

Answer = tuple[int, Headers, bytes]

_SOONEST_S: Final = 1.0
_LATEST_S: Final = 30.0
# To its caller a run that is being cancelled is not over yet.
_ENDED_BADLY: Final = {
    "failed": "job_failed",
    "dead": "job_dead",
    "expired": "job_expired",
    "cancelled": "job_cancelled",
}


def job_document(job: Job, standing: Standing | None = None) -> dict[str, Any]:
    """Times are whole seconds since 1970, as in OpenAI's objects. `standing` while it waits."""
    eta_s = None if standing is None else eta_of(standing)
    code = _ENDED_BADLY.get(job.state)
    return {
        "id": job.id,
        "object": "job",
        "status": job.state,
        "model": job.model,
        "endpoint": job.path,
        "class": job.job_class,
        "stream": job.is_stream,
        "reference": job.reference or None,
        "created_at": int(job.submitted_time),
        "started_at": _whole(job.started_time),
        "finished_at": _whole(job.finished_time),
        "expires_at": int(job.expires_time),
        "attempts": job.attempts,
        "position": standing.ahead + 1 if standing is not None and job.state == "queued" else None,
        "eta_s": None if eta_s is None else round(eta_s, 1),
        "status_code": job.status or None,
        "cost_usd": None if job.cost_nanousd is None else job.cost_nanousd / 1e9,
        "error": {"code": code or "retrying", "message": job.error or f"it was {job.state}"}
        if job.error or code
        else None,
        "poll_url": f"/v1/jobs/{job.id}",
        "result_url": f"/v1/jobs/{job.id}/result",
        "is_purged": job.is_purged,
    }


def eta_of(standing: Standing) -> float | None:
    """Seconds until its turn; None: nothing has ended lately that would tell."""
    if standing.state != "queued":
        return 0.0
    rate = standing.lane.finished_per_s
    return standing.ahead / rate if rate > 0 else None


def poll_in_s(standing: Standing | None) -> float:
    """When it makes sense to ask for it."""
    eta_s = None if standing is None else eta_of(standing)
    return min(max(eta_s if eta_s is not None else 2.0, _SOONEST_S), _LATEST_S)


def accepted(job: Job, standing: Standing | None, family: Family, request_id: str) -> Answer:
    """202: it is on disk, and will be run."""
    headers = answer_headers(family, request_id)
    headers += [
        (b"content-type", b"application/json"),
        (b"location", f"/v1/jobs/{job.id}".encode()),
        (b"x-headgate-job", job.id.encode()),
        (b"retry-after", b"%d" % -int(-poll_in_s(standing) // 1)),
    ]
    return 202, headers, orjson.dumps(job_document(job, standing))


def still_held(job: Job, standing: Standing | None, family: Family, request_id: str) -> Answer:
    """503 to one who waited long enough on its connection and did not ask for a job."""
    denial = Denial(
        503,
        "held_too_long",
        f"the request is still in the queue: send the same request again to go on waiting for its answer ({job.id})",
        retry_after_s=poll_in_s(standing),
    )
    status, headers, body = denial_answer(denial, family, request_id)
    return status, [*headers, (b"x-headgate-job", job.id.encode())], body


def ended_badly(job: Job, family: Family, request_id: str) -> Answer:
    """The answer of a job that has none of its own: nobody could run it."""
    reason = f": {job.error}" if job.error else ""
    what = {
        "cancelled": Denial(409, "job_cancelled", "the request was cancelled"),
        "expired": Denial(504, "job_expired", f"nobody could run the request in time{reason}"),
    }.get(job.state, Denial(502, "job_failed", f"the request could not be answered{reason}"))
    status, headers, body = denial_answer(what, family, request_id)
    return status, [*headers, (b"x-headgate-job", job.id.encode())], body


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)

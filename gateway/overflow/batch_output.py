"""The files that a batch brings back: a line for each of its requests, in the output file if it was answered well, else
in the error file.

Owns the form of the lines (OpenAI's) and the sum of their usage. An answer's bytes go in as they are, so that no number
in it changes. Blocks: runs on a thread.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from gateway.overflow.job import Job, Result
from gateway.overflow.shelf import Draft

_encode = msgspec.json.Encoder().encode
_EXPIRED: Final = "This request could not be executed before the completion window expired."
_CANCELLED: Final = "This request was not executed because the batch was cancelled."


class OutputLines:
    """Both files of one batch."""

    def __init__(self, output: Draft, error: Draft) -> None:
        self._output = output
        self._error = error

    def add(self, ended: Sequence[tuple[Job, Result | None]]) -> None:
        """StorageError when the disk does not take it."""
        for job, result in ended:
            is_good = job.state == "succeeded" and result is not None and result.status < 400
            (self._output if is_good else self._error).write(line_of(job, result))

    def publish(
        self, names: tuple[str, str], purpose: str, now_time: float, keep_s: float
    ) -> tuple[str | None, str | None]:
        """Their ids; None for a file that would be empty."""
        ids: list[str | None] = []
        for draft, name in ((self._output, names[0]), (self._error, names[1])):
            if draft.size_bytes:
                ids.append(draft.publish(name, purpose, now_time, keep_s).id)
            else:
                ids.append(None)
        return ids[0], ids[1]

    def close(self) -> None:
        """What was not published is gone."""
        self._output.abandon()
        self._error.abandon()


def line_of(job: Job, result: Result | None) -> bytes:
    """One line, its end included. With an answer it has the answer, whatever its status; without, the reason."""
    response = error = b"null"
    if result is not None:
        response = b'{"status_code":%d,"request_id":%b,"body":%b}' % (
            result.status,
            _encode(job.id),
            _in_one_line(result.body),
        )
    else:
        error = _encode(_reason(job))
    return b'{"id":%b,"custom_id":%b,"response":%b,"error":%b}\n' % (
        _encode(f"batch_req_{job.id.partition('_')[2]}"),
        _encode(job.reference),
        response,
        error,
    )


def add_usage(total: dict[str, Any], usage: bytes) -> None:
    """Adds what an answer says of its usage, in whichever dialect, to a sum in the form of a batch object."""
    if not usage:
        return
    try:
        found = msgspec.json.decode(usage)
    except msgspec.DecodeError:
        return
    if not isinstance(found, dict):
        return

    def count(*names: str) -> int:
        value: Any = found
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value if isinstance(value, int) else 0

    read = count("input_tokens") or count("prompt_tokens")
    cached = count("input_tokens_details", "cached_tokens") or count("prompt_tokens_details", "cached_tokens")
    written = count("output_tokens") or count("completion_tokens")
    reasoned = count("output_tokens_details", "reasoning_tokens") or count(
        "completion_tokens_details", "reasoning_tokens"
    )
    if not total:
        total.update(
            input_tokens=0,
            input_tokens_details={"cached_tokens": 0},
            output_tokens=0,
            output_tokens_details={"reasoning_tokens": 0},
            total_tokens=0,
        )
    total["input_tokens"] += read
    total["input_tokens_details"]["cached_tokens"] += cached
    total["output_tokens"] += written
    total["output_tokens_details"]["reasoning_tokens"] += reasoned
    total["total_tokens"] += read + written


def _reason(job: Job) -> dict[str, str]:
    if job.state == "expired":
        return {"code": "batch_expired", "message": _EXPIRED}
    if job.state == "cancelled":
        return {"code": "batch_cancelled", "message": _CANCELLED}
    if job.state == "succeeded":
        return {"code": "answer_lost", "message": "The answer is not kept any more."}
    code = "request_failed" if job.state == "failed" else "upstream_failed"
    return {"code": code, "message": job.error or "The request could not be carried out."}


def _in_one_line(body: bytes) -> bytes:
    """JSON as it was written, but for the white space between its tokens; anything else as a string."""
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
        return msgspec.json.format(body, indent=-1) if b"\n" in body else body
    except msgspec.DecodeError:
        return _encode(body.decode("utf-8", "replace"))

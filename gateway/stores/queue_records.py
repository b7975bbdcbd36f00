"""What a node's journal writes of jobs and parents, so that a queue in Redis can be told of them again.

A record is the arguments and the binary parts of the script that says it: `restore_job`, `restore_end`, `restore_parent` and
the steps of a parent. Knows no connection.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from gateway.overflow.job import Lease, NewParent, Parent
from gateway.stores.queue_jobs import Stored
from gateway.stores.queue_journal import Ending, Promise, Step
from gateway.stores.queue_reply import job_binary, plain_again, plain_job, plain_parent
from gateway.stores.queue_schema import JobRow

# Arguments, and what goes beside them as it is.
Words = tuple[dict[str, Any], Sequence[bytes]]

_encode: Final = msgspec.msgpack.Encoder().encode


def promise_of(row: JobRow, binary: Sequence[bytes], epoch: int) -> Promise:
    """A job that was handed in; `binary` as it was."""
    record = _encode((plain_again(row), list(binary)))
    return Promise(row.id, epoch, record, row.expires_time + row.keep_s)


def children_of(parent: Parent, first: int, stored: Sequence[Stored], epoch: int) -> list[Promise]:
    """The parent's children from position `first` on."""
    found = []
    for position, each in enumerate(stored, first):
        plain = plain_job(each.job) | {
            "parent": parent.id,
            "position": position,
            "submitted_time": parent.created_time,
            "expires_time": min(parent.created_time + each.job.expires_in_s, parent.expires_time),
        }
        record = _encode((plain, list(job_binary(each))))
        found.append(Promise(each.job.id, epoch, record, parent.expires_time + each.job.keep_s))
    return found


def opening_of(new: NewParent, found: Parent, epoch: int) -> Step:
    """A parent that was made."""
    plain = plain_parent(new) | {"created_time": found.created_time, "expires_time": found.expires_time}
    arguments = {"parent": plain, "state": found.state, "total": found.total}
    return step_of(found, "open", (arguments, [new.details]), epoch)


def step_of(parent: Parent, name: str, words: Words, epoch: int) -> Step:
    """What was done with a parent."""
    arguments, binary = words
    record = _encode((arguments, list(binary)))
    return Step(parent.id, name, epoch, record, parent.expires_time + parent.keep_s)


def ending_of(row: JobRow, lease: Lease, words: Words, epoch: int) -> Ending:
    """How a job is to end, not said yet."""
    arguments, binary = words
    record = _encode((plain_again(row), arguments, list(binary)))
    due_time = row.expires_time + row.keep_s
    return Ending(lease.job_id, lease.fence, lease.owner, False, epoch, record, due_time)

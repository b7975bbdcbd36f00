"""What the queue leaves on the disk: nothing readable with a key, and nothing at all once a job is purged."""

import base64
import random
from pathlib import Path

import pytest

from gateway.overflow.bodies import EncryptionConfig, open_bodies
from gateway.overflow.store import StoreAwayError
from gateway.stores.queue_sqlite import SqliteQueueStore
from tests.support.queue_clock import QueueClock
from tests.support.queue_jobs import LANE, NO_LIMITS, a_job, an_answer

KEY = base64.b64encode(bytes(range(32))).decode()
# Not to be found by chance, nor kept as such by the compression of what is around it.
PROMPT, ANSWER, PIECE = b"QVXJ-prompt-7Z", b"QVXJ-answer-8Z", b"QVXJ-event-9Z"
DAY_S = 86_400.0


def on_disk(directory: Path) -> bytes:
    """Every file there is, the log and what was left of it included."""
    return b"\0".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


class Life:
    """A few jobs, and the disk they lived on."""

    def __init__(self, directory: Path, *keys: str) -> None:
        self.directory = directory
        self.clock = QueueClock()
        self.store = SqliteQueueStore(
            directory,
            bodies=open_bodies(EncryptionConfig(keys=keys)),
            result_folder=directory / "results",
            clocks=self.clock.clocks,
        )

    async def finish(self, job_id: str) -> None:
        await self.store.submit(a_job(job_id, body=PROMPT, headers=PROMPT, is_stream=True), NO_LIMITS)
        claimed = await self.store.claim(LANE, "o")
        await self.store.append_events(claimed.lease, 0, [PIECE, PIECE])
        await self.store.finish(claimed.lease, an_answer(ANSWER))

    async def purge(self) -> None:
        self.clock.forward(2 * DAY_S)
        while not (await self.store.sweep()).is_all:
            pass


@pytest.mark.parametrize("is_sealed", [False, True])
async def test_with_a_key_nothing_that_was_said_can_be_read_on_the_disk(tmp_path, is_sealed):
    life = Life(tmp_path, *((KEY,) if is_sealed else ()))
    await life.finish("job_a")
    await life.store.submit(a_job("job_b", body=PROMPT), NO_LIMITS)
    disk = on_disk(tmp_path)
    await life.store.close()
    for marker in (PROMPT, ANSWER, PIECE):
        assert (marker in disk) == (not is_sealed), marker


async def test_a_purged_job_has_left_the_disk(tmp_path):
    life = Life(tmp_path)
    for number in range(50):
        await life.finish(f"job_{number}")
    await life.store.submit(a_job("job_c", body=PROMPT + b"-cancelled"), NO_LIMITS)
    await life.store.cancel("t1", "job_c")
    await life.store.submit(a_job("job_e", body=PROMPT + b"-expired", expires_in_s=60.0), NO_LIMITS)
    assert ANSWER in on_disk(tmp_path)
    await life.purge()
    disk = on_disk(tmp_path)
    job = await life.store.get("t1", "job_0")
    await life.store.close()
    assert (job.state, job.is_purged) == ("succeeded", True)
    for marker in (PROMPT, ANSWER, PIECE):
        assert marker not in disk, marker


async def test_a_request_has_left_the_disk_as_soon_as_its_job_has_ended(tmp_path):
    """But for the log, which is overwritten as it goes round, and emptied with the next purge."""
    life = Life(tmp_path)
    await life.finish("job_a")
    await life.store.close()
    assert PROMPT not in (tmp_path / "queue.db").read_bytes()
    assert ANSWER in on_disk(tmp_path)


async def test_a_result_in_a_file_is_sealed_and_goes_with_its_job(tmp_path):
    life = Life(tmp_path, KEY)
    await life.store.submit(a_job("job_big"), NO_LIMITS)
    claimed = await life.store.claim(LANE, "o")
    # What is random cannot be compressed, and is too large for the database.
    answer = ANSWER + random.Random(1).randbytes(6_000_000)
    await life.store.finish(claimed.lease, an_answer(answer))
    assert (await life.store.result("t1", "job_big")).body == answer
    (file,) = (tmp_path / "results").iterdir()
    assert ANSWER not in file.read_bytes()
    await life.purge()
    await life.store.close()
    assert list((tmp_path / "results").iterdir()) == []


async def test_after_a_rotation_old_jobs_are_read_and_new_ones_need_the_new_key(tmp_path):
    new = base64.b64encode(bytes(range(1, 33))).decode()
    before = Life(tmp_path, KEY)
    await before.finish("job_a")
    await before.store.close()
    after = Life(tmp_path, new, KEY)
    assert (await after.store.result("t1", "job_a")).body == ANSWER
    await after.finish("job_b")
    await after.store.close()
    only_new = Life(tmp_path, new)
    assert (await only_new.store.result("t1", "job_b")).body == ANSWER
    with pytest.raises(StoreAwayError, match=r"which is not in `queue\.encryption`"):
        await only_new.store.result("t1", "job_a")
    await only_new.store.close()

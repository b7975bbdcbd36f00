"""The shelf of files: whole or not there, a tenant's own, really gone when deleted, sealed where there is a key."""

import asyncio
import os

import pytest

from gateway.http_rules import Refusal
from gateway.overflow import shelf
from gateway.overflow.bodies import Bodies, BodyError
from gateway.overflow.files import Files
from gateway.overflow.sealing import AesSeal
from gateway.overflow.shelf import FRAME_BYTES, Draft, FilesConfig, Shelf, new_file_id
from gateway.stores.sqlite import StorageError
from tests.mutants import batches as mutants

TYPE = b"multipart/form-data; boundary=b"
NOW = 1_800_000_000.0


def form(content: bytes = b'{"a":1}\n', *, filename: bytes = b"in.jsonl", **fields: bytes) -> bytes:
    fields = {"purpose": b"batch"} | fields
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="' + filename + b'"\r\n\r\n'
    rest = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="' + name.encode() + b'"\r\n\r\n' + value + b"\r\n"
        for name, value in fields.items()
        if value
    )
    return head + content + b"\r\n" + rest + b"--b--\r\n"


async def in_pieces(data: bytes, size: int = 70_000):
    for start in range(0, len(data), size):
        yield data[start : start + size]


class Place:
    def __init__(self, directory, bodies=None, **settings) -> None:
        self.directory = directory
        self.time = NOW
        self.shelf = Shelf(directory, bodies or Bodies())
        self.files = Files(self.shelf, lambda: FilesConfig(**settings), lambda: self.time)

    async def upload(self, tenant="acme", data=None, **fields):
        return await self.files.upload(tenant, TYPE, in_pieces(data or form(**fields)))

    async def content(self, tenant, record):
        return b"".join([frame async for frame in self.files.content(tenant, record)])

    def names(self):
        return sorted(path.suffix for path in self.directory.rglob("file-*"))


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path / "files")
    yield place
    place.files.close()


async def test_what_was_uploaded_comes_back_byte_for_byte(place):
    for content in (b"x", b"\r\n" * 99, os.urandom(3 * FRAME_BYTES), b"a" * FRAME_BYTES):
        record = await place.upload(content=content)
        assert (record.bytes, record.purpose, record.filename) == (len(content), "batch", "in.jsonl")
        assert record.expires_time == int(NOW) + 30 * 86_400
        found = await place.files.find("acme", record.id)
        assert found == record
        assert await place.content("acme", found) == content


@pytest.fixture
def broken():
    """Applies a mutant for one test."""
    saved = Shelf._folder, Draft.publish
    yield lambda name: mutants.MUTANTS[name]()
    Shelf._folder, Draft.publish = saved


async def is_its_tenants_own(place):
    record = await place.upload()
    assert await place.files.find("other", record.id) is None
    assert not await place.files.delete("other", record.id)
    assert await place.files.page("other", limit=10) == ([], False)
    assert await place.files.find("acme", record.id) == record


async def test_a_file_is_its_tenants_own(place):
    await is_its_tenants_own(place)


async def test_a_build_that_forgets_whose_file_it_is_is_caught(place, broken):
    broken("forgets_whose_file_it_is")
    with pytest.raises(AssertionError):
        await is_its_tenants_own(place)


async def is_not_shown_when_killed(place, monkeypatch):
    """At the moment when its content is made safe."""

    def die(file):
        raise KeyboardInterrupt

    draft = place.shelf.begin("acme", new_file_id(NOW))
    draft.write(b"x" * 1000)
    monkeypatch.setattr(shelf, "_sync", die)
    with pytest.raises(KeyboardInterrupt):
        draft.publish("x", "batch", NOW, 1000.0)
    found, page = await place.files.find("acme", draft.id), await place.files.page("acme", limit=10)
    draft.abandon()
    assert (found, page) == (None, ([], False))


async def test_a_file_is_not_shown_before_all_of_it_is_on_the_disk(place, monkeypatch):
    await is_not_shown_when_killed(place, monkeypatch)


async def test_a_build_that_shows_it_earlier_is_caught(place, monkeypatch, broken):
    broken("shows_a_file_before_it_is_whole")
    with pytest.raises(AssertionError):
        await is_not_shown_when_killed(place, monkeypatch)


@pytest.mark.parametrize("name", ["../x", "file-..", "", "file-" + "g" * 44, "file-" + "0" * 44])
async def test_no_id_leads_out_of_the_folder(place, name):
    await place.upload()
    assert await place.files.find("acme", name) is None


async def test_pages_go_through_all_files_in_order(place):
    made = []
    for _ in range(5):
        place.time += 1
        record = await asyncio.to_thread(_publish, place)
        made.append(record.id)
    assert [r.id for r in (await place.files.page("acme", limit=10))[0]] == made[::-1]
    first, has_more = await place.files.page("acme", limit=2, is_ascending=True)
    assert ([r.id for r in first], has_more) == (made[:2], True)
    rest, has_more = await place.files.page("acme", limit=3, after=made[1], is_ascending=True)
    assert ([r.id for r in rest], has_more) == (made[2:], False)
    assert (await place.files.page("acme", purpose="batch_output", limit=3))[0] == []


def _publish(place, keep_s=100.0):
    draft = place.shelf.begin("acme", new_file_id(place.time))
    draft.write(b"x")
    return draft.publish("x", "batch", place.time, keep_s)


async def test_deleted_and_expired_files_are_gone_from_the_disk(place):
    record = await place.upload()
    assert await place.files.delete("acme", record.id)
    assert not await place.files.delete("acme", record.id)
    assert place.names() == []
    record = await place.upload(**{"expires_after[anchor]": b"created_at", "expires_after[seconds]": b"3600"})
    assert record.expires_time == int(NOW) + 3600
    place.time += 3599
    assert (await place.files.sweep(), place.names()) == (0, [".body", ".json"])
    place.time += 2
    assert await place.files.find("acme", record.id) is None
    assert await place.files.sweep() == 1
    await place.files.sweep()
    place.time = os.stat(place.directory).st_mtime + 200_000
    await place.files.sweep()
    assert place.names() == []


async def test_half_a_file_is_never_seen_and_leaves_nothing_behind(place):
    whole = form(content=b"y" * 100_000)
    with pytest.raises(Refusal):
        await place.upload(data=whole[:60_000])

    async def leaves():
        yield whole[:60_000]
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await place.files.upload("acme", TYPE, leaves())
    await place.files.run(lambda: None)
    async with asyncio.timeout(30):
        while place.names():
            await asyncio.sleep(0)
    assert (await place.files.page("acme", limit=10)) == ([], False)


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"purpose": b"fine-tune"}, 400, "invalid_value", "purpose"),
        ({"purpose": b""}, 400, "missing_required_parameter", "purpose"),
        ({"content": b""}, 400, "empty_file", "file"),
        ({"content": b"z" * 2000}, 413, "file_too_large", "file"),
        ({"expires_after[anchor]": b"now", "expires_after[seconds]": b"3600"}, 400, "invalid_value", "expires_after.anchor"),
        ({"expires_after[anchor]": b"created_at", "expires_after[seconds]": b"5"}, 400, "invalid_value", "expires_after.seconds"),
        ({"data": b"--b--\r\n"}, 400, "missing_required_parameter", "file"),
        ({"data": form() [:-7] + form()}, 400, "invalid_form", "file"),
    ],
    ids=lambda value: "-" if isinstance(value, dict) else value,
)  # fmt: skip
async def test_what_is_no_good_is_refused_and_not_kept(tmp_path, fields, status, code, param):
    place = Place(tmp_path, file_bytes=1024)
    with pytest.raises(Refusal) as refused:
        await place.upload(**fields)
    assert (refused.value.status, refused.value.code, refused.value.param) == (status, code, param)
    place.files.close()
    assert place.names() == []


async def test_a_tenant_has_only_so_much_room(tmp_path):
    place = Place(tmp_path, tenant_bytes=1024)
    record = await place.upload(content=os.urandom(2000))
    with pytest.raises(Refusal) as refused:
        await place.upload()
    assert (refused.value.status, refused.value.code) == (413, "storage_limit_exceeded")
    await place.upload(tenant="other")
    await place.files.delete("acme", record.id)
    await place.upload()
    place.files.close()


async def test_file_names_are_names_only(place):
    assert (await place.upload(filename=b"../../etc/passwd")).filename == "passwd"
    assert (await place.upload(filename=b"C:\\tmp\\a.jsonl")).filename == "a.jsonl"
    assert (await place.upload(filename=b"")).filename == "file"


async def test_contents_are_sealed_where_there_is_a_key(tmp_path):
    secret = b"the quick brown fox"
    place = Place(tmp_path, Bodies(AesSeal([bytes(32)])))
    record = await place.upload(content=secret * 30_000)
    stored = next(tmp_path.rglob("*.body"))
    assert secret not in stored.read_bytes()
    assert await place.content("acme", record) == secret * 30_000
    # Frames that changed places do not open.
    data = stored.read_bytes()
    stored.write_bytes(data[: len(data) // 2])
    with pytest.raises(BodyError):
        await place.content("acme", record)
    place.files.close()


async def test_a_disk_that_does_not_take_it_is_a_storage_error(tmp_path):
    place = Place(tmp_path / "file")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError):
        await place.upload()
    place.files.close()

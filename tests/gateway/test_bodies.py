"""Bodies at rest: plain or sealed, compressed or not, they come back as they were, and from nowhere else."""

import base64
import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.overflow.bodies import Bodies, BodyError, EncryptionConfig, open_bodies, read_key
from gateway.stores.sqlite import StorageError

OLD, NEW = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))
MARKER = b"the prompt of a customer"
PLACE = "job_1/body"


def sealed_with(*keys: str) -> Bodies:
    return open_bodies(EncryptionConfig(keys=keys))


@given(body=st.binary(max_size=5000), is_sealed=st.booleans())
def test_what_is_written_is_read_again(body, is_sealed):
    bodies = sealed_with(NEW) if is_sealed else Bodies()
    assert bodies.read(bodies.write(body, PLACE), PLACE) == body


def test_a_large_body_is_stored_smaller():
    assert len(Bodies().write(MARKER * 100, PLACE)) < 200


@pytest.mark.parametrize("times", [1, 100])
def test_with_a_key_nothing_of_it_is_to_be_seen(times):
    stored = sealed_with(NEW).write(MARKER * times, PLACE)
    assert MARKER not in stored
    assert stored != sealed_with(NEW).write(MARKER * times, PLACE), "the same twice must not look the same"


def test_a_new_key_writes_and_the_old_one_still_reads():
    before = sealed_with(OLD).write(MARKER, PLACE)
    after = sealed_with(NEW, OLD).write(MARKER, PLACE)
    assert sealed_with(NEW, OLD).read(before, PLACE) == sealed_with(NEW).read(after, PLACE) == MARKER
    with pytest.raises(BodyError, match=r"which is not in `queue\.encryption`"):
        sealed_with(OLD).read(after, PLACE)


def test_what_was_stored_before_there_was_a_key_is_still_read():
    assert sealed_with(NEW).read(Bodies().write(MARKER, PLACE), PLACE) == MARKER


def test_without_the_key_it_says_what_to_set():
    with pytest.raises(BodyError, match=r"set `queue\.encryption`"):
        Bodies().read(sealed_with(NEW).write(MARKER, PLACE), PLACE)


def test_a_body_does_not_open_in_another_jobs_place():
    with pytest.raises(BodyError, match="moved from another place"):
        sealed_with(NEW).read(sealed_with(NEW).write(MARKER, PLACE), "job_2/body")


@given(position=st.integers(0, 60))
def test_a_damaged_body_is_never_read_as_another(position):
    bodies = sealed_with(NEW)
    stored = bytearray(bodies.write(MARKER, PLACE))
    stored[position % len(stored)] ^= 0x55
    with pytest.raises(BodyError):
        bodies.read(bytes(stored), PLACE)


@pytest.mark.parametrize("stored", [b"", b"\x01no frame", b"\x07", b"\x02", b"\x02" + bytes(40)])
def test_what_is_no_body_is_an_error_not_a_crash(stored):
    with pytest.raises(BodyError):
        sealed_with(NEW).read(stored, PLACE)


@pytest.mark.parametrize("text", ["", "nonsense", base64.b64encode(bytes(16)).decode(), NEW[:-1]])
def test_what_is_no_key_is_refused_without_repeating_it(text):
    with pytest.raises(ValueError, match="32 random bytes") as refused:
        read_key(text)
    assert not text or text not in str(refused.value).split()


def test_keys_come_from_a_file_that_others_cannot_read(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"{NEW}\n{OLD}\n")
    path.chmod(0o600)
    bodies = open_bodies(EncryptionConfig(key_file=path))
    assert bodies.read(sealed_with(OLD).write(MARKER, PLACE), PLACE) == MARKER
    assert sealed_with(NEW).read(bodies.write(MARKER, PLACE), PLACE) == MARKER
    path.chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        open_bodies(EncryptionConfig(key_file=path))


@pytest.mark.parametrize(("text", "problem"), [("", "is empty"), ("nonsense", "32 random bytes")])
def test_a_key_file_that_cannot_be_used_says_so(tmp_path, text, problem):
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(StorageError, match=problem):
        open_bodies(EncryptionConfig(key_file=path))


def test_keys_have_one_source(tmp_path):
    with pytest.raises(ValueError, match="either keys or key_file"):
        EncryptionConfig(keys=(NEW,), key_file=tmp_path / "keys")


def test_a_key_is_in_no_representation():
    settings = EncryptionConfig(keys=(NEW,))
    assert NEW not in repr(settings)
    assert NEW not in settings.model_dump_json()


def test_without_the_library_a_key_is_refused_with_a_word_on_what_to_install(monkeypatch):
    def gone(name: str):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", gone)
    assert not open_bodies(EncryptionConfig()).are_sealed
    with pytest.raises(StorageError, match=r"headgate\[encryption\]"):
        open_bodies(EncryptionConfig(keys=(NEW,)))

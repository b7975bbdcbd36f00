import contextlib
import multiprocessing
import os
import stat

import apsw
import pytest

from gateway.stores.schema import STEPS
from gateway.stores.sqlite import StorageError, check_version, database, open_database


def _open_and_close(path) -> None:
    open_database(path).close()


def test_only_the_owner_may_read_the_database(tmp_path) -> None:
    path = tmp_path / "new" / "headgate.db"
    with database(path) as connection:
        connection.execute("BEGIN IMMEDIATE; CREATE TABLE t (x); COMMIT")
        for file in (path, path.with_name("headgate.db-wal")):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_commits_are_logged_ahead_and_synced_as_asked(tmp_path) -> None:
    for is_full_sync, level in ((False, 1), (True, 2)):
        with database(tmp_path / "a.db", is_full_sync=is_full_sync) as connection:
            assert connection.pragma("journal_mode") == "wal"
            assert connection.pragma("synchronous") == level


def test_a_sqlite_that_can_corrupt_its_log_is_refused() -> None:
    for version in ("3.40.1", "3.51.2", "3.9.99"):
        with pytest.raises(StorageError, match=r"3\.51\.3 or newer"):
            check_version(version)
    for version in ("3.51.3", "3.54.1", "4.0.0"):
        check_version(version)
    check_version()


def test_many_processes_may_open_a_new_database_at_once(tmp_path) -> None:
    path = tmp_path / "a.db"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_open_and_close, args=(path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    with database(path) as connection:
        assert connection.pragma("user_version") == len(STEPS)


class Contended(apsw.Connection):
    """What SQLite answers, at once, to one of several that turn a new file into one with a log."""

    refusals = 0

    def pragma(self, name, *value):
        if name == "journal_mode" and Contended.refusals:
            Contended.refusals -= 1
            raise apsw.BusyError("database is locked")
        return super().pragma(name, *value)


def test_who_is_told_that_a_new_database_is_busy_tries_again_and_not_for_ever(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gateway.stores.sqlite.Connection", Contended)
    monkeypatch.setattr(Contended, "refusals", 3)
    with database(tmp_path / "a.db") as connection:
        assert connection.pragma("journal_mode") == "wal"
    monkeypatch.setattr("gateway.stores.sqlite._BUSY_TIMEOUT_MS", 50)
    monkeypatch.setattr(Contended, "refusals", 10**6)
    with pytest.raises(StorageError, match="locked by another program"):
        open_database(tmp_path / "b.db")


def test_a_database_of_a_newer_version_is_left_alone(tmp_path) -> None:
    path = tmp_path / "a.db"
    with database(path) as connection:
        connection.pragma("user_version", len(STEPS) + 1)
    with pytest.raises(StorageError, match="newer Headgate"):
        open_database(path)


def test_a_failed_schema_step_leaves_nothing_behind(tmp_path) -> None:
    with pytest.raises(StorageError):
        open_database(tmp_path / "a.db", steps=(*STEPS, "CREATE TABLE half (x); nonsense"))
    with database(tmp_path / "a.db") as connection:
        assert not connection.table_exists(None, "half")


@pytest.mark.parametrize(
    ("content", "sentence"), [(b"not a database at all, but long enough" * 40, "is not a SQLite database")]
)
def test_a_file_that_is_no_database_is_named(tmp_path, content, sentence) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=sentence):
        open_database(path)
    assert path.read_bytes() == content


def test_a_directory_that_cannot_be_made_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Cannot make the storage directory"):
        open_database(tmp_path / "file" / "headgate.db")


@contextlib.contextmanager
def nobody():
    """Permissions mean nothing to root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("may_write", [True, False])
def test_a_directory_of_another_user_is_a_sentence(tmp_path, may_write) -> None:
    directory = tmp_path / "private"
    directory.mkdir(mode=0o000)
    with nobody(), pytest.raises(StorageError, match=r"Cannot .* Permission denied"):
        open_database(directory / "headgate.db", may_write=may_write)


def test_a_reader_makes_no_file_and_changes_nothing(tmp_path) -> None:
    path = tmp_path / "a.db"
    with pytest.raises(StorageError, match="start the gateway once"):
        open_database(path, may_write=False)
    assert not path.exists()
    open_database(path).close()
    with pytest.raises(StorageError, match="read-only"), database(path, may_write=False) as connection:
        connection.execute("INSERT INTO api_key (id) VALUES (1)")


def test_errors_while_a_database_is_in_use_become_sentences(tmp_path) -> None:
    with pytest.raises(StorageError, match="cannot be used"), database(tmp_path / "a.db") as connection:
        connection.execute("SELECT * FROM nowhere")
    with pytest.raises(StorageError, match="locked"), database(tmp_path / "a.db") as connection:
        other = apsw.Connection(str(tmp_path / "a.db"))
        try:
            other.execute("BEGIN IMMEDIATE")
            connection.set_busy_timeout(0)
            connection.execute("BEGIN IMMEDIATE")
        finally:
            other.close()

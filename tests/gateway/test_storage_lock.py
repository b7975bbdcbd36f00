import os
import signal
import subprocess
import sys

import pytest

from gateway.storage_lock import LOCK_NAME, storage_lock
from gateway.stores.sqlite import StorageError

HOLDER = """
import sys
from pathlib import Path
from gateway.storage_lock import storage_lock
with storage_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_service_is_refused_while_the_first_has_the_directory(tmp_path):
    with (
        storage_lock(tmp_path),
        pytest.raises(StorageError, match="Another Headgate uses"),
        storage_lock(tmp_path),
    ):
        pass
    with storage_lock(tmp_path):
        pass


def test_a_service_that_was_killed_holds_nothing(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError), storage_lock(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    with storage_lock(tmp_path):
        pass


def test_a_program_started_meanwhile_does_not_inherit_it(tmp_path):
    with storage_lock(tmp_path):
        other = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with storage_lock(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()


def test_a_directory_that_is_missing_is_made_for_its_owner_only(tmp_path):
    with storage_lock(tmp_path / "new" / "data"):
        assert os.stat(tmp_path / "new" / "data").st_mode & 0o777 == 0o700
        assert os.stat(tmp_path / "new" / "data" / LOCK_NAME).st_mode & 0o777 == 0o600


def test_a_directory_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(StorageError, match="Choose another"), storage_lock(tmp_path):
        pass

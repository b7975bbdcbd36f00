from pathlib import Path

import pytest

from local_engine.plan import PlanError
from local_engine.run_directory import leave, make, run_directory


def test_the_path_is_short_however_deep_the_data_directory_is(tmp_path):
    assert run_directory(Path("/var/lib/headgate")) == Path("/var/lib/headgate/run")
    deep = tmp_path / ("d" * 80)
    assert len(str(run_directory(deep).name)) <= 24
    assert run_directory(deep) == run_directory(deep)
    assert run_directory(deep) != run_directory(tmp_path / ("e" * 80))


def test_a_directory_that_others_can_look_into_is_not_used(tmp_path):
    make(tmp_path / "run")
    make(tmp_path / "run")  # of an earlier run
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o750)
    with pytest.raises(PlanError, match="is not this user's alone"):
        make(tmp_path / "open")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(PlanError, match="choose a shorter"):
        make(tmp_path / "link")


def test_it_is_removed_when_nobody_has_a_socket_in_it(tmp_path):
    directory = tmp_path / "run"
    make(directory)
    (directory / "pool-0.inproc.kv").touch()
    leave(directory)
    assert directory.exists()
    (directory / "pool-0.inproc.kv").unlink()
    leave(directory)
    assert not directory.exists()
    leave(directory)

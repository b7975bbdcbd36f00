import json
import resource
import stat

import pytest

from gateway.jsonl import JsonlLog, line_of
from gateway.stores.sqlite import StorageError
from tests.support.ledger_rows import a_row

LINE = len(line_of(a_row("r0")))


def ids_in(path) -> list[str]:
    return [json.loads(line)["request_id"] for line in path.read_text().splitlines()]


def test_a_line_is_the_row_with_the_columns_names(tmp_path) -> None:
    log = JsonlLog(tmp_path / "costs.jsonl")
    log.write([a_row(tags='["a"]', cost_nanousd=None, session_hash=-1)])
    log.close()
    record = json.loads((tmp_path / "costs.jsonl").read_text())
    assert record["tags"] == ["a"]
    assert record["cost_nanousd"] is None
    assert record["session_hash"] == "f" * 16
    assert record["requested_model"] == "demo"
    assert stat.S_IMODE((tmp_path / "costs.jsonl").stat().st_mode) == 0o600


def test_a_full_file_is_rotated_and_the_oldest_dropped(tmp_path) -> None:
    path = tmp_path / "costs.jsonl"
    log = JsonlLog(path, max_bytes=LINE * 2, keep=2)
    for n in range(8):
        log.write([a_row(f"r{n}")])
    log.close()
    assert ids_in(path) == ["r6", "r7"]
    assert ids_in(tmp_path / "costs.jsonl.1") == ["r4", "r5"]
    assert ids_in(tmp_path / "costs.jsonl.2") == ["r2", "r3"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_restart_appends(tmp_path) -> None:
    path = tmp_path / "costs.jsonl"
    for n in range(2):
        log = JsonlLog(path)
        log.write([a_row(f"r{n}")])
        log.close()
    assert ids_in(path) == ["r0", "r1"]


@pytest.mark.parametrize("whole", [0, 3])
def test_half_a_line_left_by_a_kill_is_removed(tmp_path, whole) -> None:
    path = tmp_path / "costs.jsonl"
    path.write_bytes(line_of(a_row("r0")) * whole + line_of(a_row("r0"))[:50])
    log = JsonlLog(path)
    log.write([a_row("r1")])
    log.close()
    assert ids_in(path) == ["r0"] * whole + ["r1"]


def test_on_a_full_disk_lines_are_dropped_whole_and_counted(tmp_path, caplog) -> None:
    path = tmp_path / "costs.jsonl"
    log = JsonlLog(path)
    log.write([a_row("r0")])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LINE * 2 + 10, limits[1]))
    try:
        log.write([a_row("r1"), a_row("r2")])
        log.write([a_row("r3"), a_row("r4")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write([a_row("r5")])
    log.close()
    assert ids_in(path) == ["r0", "r5"]
    assert log.lines_lost == 4
    assert caplog.text.count("cannot write") == 1


def test_a_path_that_cannot_be_written_fails_the_start(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cost log"):
        JsonlLog(tmp_path / "file" / "costs.jsonl")

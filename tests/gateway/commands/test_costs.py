import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.commands import costs as costs_module
from gateway.commands.costs import app
from gateway.ledger_row import COLUMNS
from gateway.stores import ledger_table
from gateway.stores.sqlite import DATABASE_NAME, database
from tests.support.ledger_rows import a_row

ROOT = Path(__file__).parents[3]
DAY_US = 86_400_000_000
START_US = 1_793_059_200_000_000  # 2026-10-27T00:00Z


@pytest.fixture
def storage(tmp_path):
    rows = [
        a_row("a", received_time_us=START_US, cost_nanousd=12_345, saved_nanousd=1, tags='["x","y"]'),
        a_row("b", received_time_us=START_US + 1, key_id="k2", key_name="[bold]odd", cost_nanousd=10**9),
        a_row(
            "c", received_time_us=START_US + DAY_US, cost_nanousd=None, saved_nanousd=None, is_estimated=True
        ),
        a_row("d", received_time_us=START_US + DAY_US, ended="interrupted", cost_nanousd=None, status=0),
    ]
    with database(tmp_path / DATABASE_NAME) as connection:
        ledger_table.insert(connection, rows)
    return tmp_path


@pytest.fixture
def run(storage, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("HEADGATE_DATA", str(storage))
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_the_table_shows_exact_dollars_and_what_they_leave_out(run) -> None:
    output = run().output
    line = next(line for line in output.splitlines() if "ci" in line)
    assert line.split() == [
        "ci",
        "3",
        "1",
        "3,000",
        "90.0%",
        "150",
        "$0.000012345",
        "$0.000000101",
    ]
    assert "[bold]odd" in output
    assert "$1.000012345" in output  # the total
    assert "not in the sums: 2 requests." in output
    assert "broke off: 1 request." in output
    assert "end of their worker: 1 request." in output


def test_json_and_csv_give_whole_nano_dollars(run) -> None:
    found = json.loads(run("--by", "day", "--json").output)
    assert [(g["group"], g["requests"], g["cost_nanousd"]) for g in found["groups"]] == [
        ("2026-10-27", 2, 1_000_012_345),
        ("2026-10-28", 2, 0),
    ]
    assert (found["total"]["unknown_cost"], found["total"]["requests"]) == (2, 4)
    rows = list(csv.DictReader(io.StringIO(run("--by", "tag", "--csv").output)))
    assert {row["tag"]: row["cost_nanousd"] for row in rows} == {"": "1000000000", "x": "12345", "y": "12345"}


def test_a_period_is_applied(run) -> None:
    def requests(*arguments) -> int:
        return json.loads(run(*arguments, "--json").output)["total"]["requests"]

    assert requests("--since", "2026-10-28") == 2
    assert requests("--until", "2026-10-28") == 2
    assert requests("--since", "2026-10-27T00:00:00.000001", "--until", "2026-10-28") == 1
    assert requests("--since", "1h") in {0, 4}  # the rows are of a fixed day


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--since", "yesterday"], "is no time"),
        (["--by", "colour"], "colour"),
        (["--since", "7d", "export"], "put options after the command"),
        (["export", "--format", "xlsx"], "xlsx"),
    ],
)
def test_wrong_arguments_are_explained(run, arguments, sentence) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in result.output


def test_without_a_ledger_the_command_says_so(run, tmp_path) -> None:
    result = run("--data", str(tmp_path / "nowhere"))
    assert result.exit_code == 1
    assert "start the gateway once" in result.output
    assert not (tmp_path / "nowhere").exists()


def test_an_empty_ledger_makes_an_empty_table(run, tmp_path) -> None:
    with database(tmp_path / "empty" / DATABASE_NAME):
        pass
    result = run("--data", str(tmp_path / "empty"))
    assert result.exit_code == 0
    assert "requests" in result.output


def test_the_table_stops_at_fifty_groups_and_says_so(run, storage) -> None:
    with database(storage / DATABASE_NAME) as connection:
        ledger_table.insert(
            connection, [a_row(f"r{n}", key_id=f"x{n}", key_name=f"key {n}") for n in range(60)]
        )
    result = run()
    assert "12 more not shown" in result.output
    assert result.output.count("key ") < 60


def test_an_export_is_one_line_per_request(run, storage) -> None:
    rows = list(csv.DictReader(io.StringIO(run("export").output)))
    assert tuple(rows[0]) == COLUMNS
    assert [row["request_id"] for row in rows] == ["a", "b", "c", "d"]
    assert (rows[0]["tags"], rows[0]["is_stream"], rows[2]["cost_nanousd"]) == ('["x","y"]', "1", "")
    out = storage / "out.jsonl"
    assert run("export", "--format", "jsonl", "--since", "2026-10-28", "--out", str(out)).exit_code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["request_id"], line["cost_nanousd"]) for line in lines] == [("c", None), ("d", None)]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_an_export_to_a_file_replaces_it_whole(run, storage, form) -> None:
    out = storage / "out"
    out.write_text("old")
    result = run("export", "--format", form, "--out", str(out))
    assert result.exit_code == 0
    assert len(out.read_text().splitlines()) == (5 if form == "csv" else 4)
    assert not (storage / "out.part").exists()
    result = run("export", "--out", str(storage / "nowhere" / "out"))
    assert result.exit_code == 1
    assert "Cannot write" in result.output


def test_parquet_without_pyarrow_says_what_to_install(run, monkeypatch) -> None:
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(costs_module.importlib, "import_module", missing)
    result = run("export", "--format", "parquet", "--out", "x")
    assert result.exit_code == 1
    assert "pip install 'headgate[parquet]'" in result.output


def test_a_parquet_export_has_typed_columns(run, storage) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    result = run("export", "--format", "parquet", "--out", str(storage / "out.parquet"))
    assert result.exit_code == 0, result.output
    table = pq.read_table(storage / "out.parquet")
    assert tuple(table.column_names) == COLUMNS
    found = table.to_pylist()
    assert [row["cost_nanousd"] for row in found] == [12_345, 10**9, None, None]
    assert (found[0]["tags"], found[0]["is_stream"]) == (["x", "y"], True)


def test_an_export_into_a_closed_pipe_ends_quietly(storage) -> None:
    with database(storage / DATABASE_NAME) as connection:
        ledger_table.insert(connection, [a_row(f"r{n}") for n in range(5000)])
    reader, writer = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", "from gateway.commands.costs import app; app()", "export", "--data", storage],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(writer)
        assert os.read(reader, 10)
        os.close(reader)
        assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 0

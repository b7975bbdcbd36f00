"""`headgate batch` against a running gateway."""

import json

import pytest
from typer.testing import CliRunner

from gateway.commands.app import app
from tests.support.gateway_process import KEY
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e


def line(number, **changes):
    body = {"model": "half", "messages": [{"role": "user", "content": f"hello {number}"}]}
    return {
        "custom_id": f"r{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
    } | changes


@pytest.fixture
def run(doors, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HEADGATE_URL", doors.gateway.url)
    monkeypatch.setenv("HEADGATE_API_KEY", KEY)
    return lambda *arguments: CliRunner().invoke(app, ["batch", *map(str, arguments)])


@pytest.fixture
def requests(tmp_path):
    path = tmp_path / "night.jsonl"

    def write(*lines):
        path.write_text("".join(json.dumps(each) + "\n" for each in lines))
        return path

    return write


def test_a_file_is_submitted_followed_and_answered(run, requests, tmp_path):
    result = run("submit", requests(line(0), line(1)))
    assert result.exit_code == 0, result.output
    written = tmp_path / "night.output.jsonl"
    assert result.stdout.strip() == str(written)
    assert {json.loads(each)["custom_id"] for each in written.read_text().splitlines()} == {"r0", "r1"}
    assert "completed" in result.stderr
    assert "2/2" in result.stderr


def test_a_batch_may_be_left_looked_at_listed_and_downloaded(run, requests, doors, tmp_path):
    batch_id = run("submit", requests(line(0)), "--no-wait").stdout.strip()
    assert batch_id.startswith("batch_")
    doors.ended(batch_id)
    shown = json.loads(run("show", batch_id, "--json").stdout)
    assert (shown["id"], shown["status"]) == (batch_id, "completed")
    assert batch_id in run("show", batch_id).stdout
    assert batch_id in [batch["id"] for batch in json.loads(run("list", "--json").stdout)]
    assert batch_id in run("list", "--limit", 5).stdout
    result = run("download", batch_id, "-o", tmp_path / "answers")
    assert result.stdout.strip() == str(tmp_path / "answers" / f"{batch_id}.output.jsonl")
    assert (tmp_path / "answers" / f"{batch_id}.output.jsonl").exists()
    cancelled = run("cancel", batch_id)
    assert cancelled.exit_code == 1
    assert "cannot be cancelled" in cancelled.stderr


def test_what_went_wrong_is_told_and_is_no_success(run, requests, doors, tmp_path):
    result = run("submit", requests(line(0), line(0)))
    assert result.exit_code == 1
    assert "line 2" in result.stderr
    assert "duplicate_custom_id" in result.stderr
    doors.upstream.script("chat", Answer.of_error(400))
    result = run("submit", requests(line(0)))
    assert result.exit_code == 1
    assert result.stdout.strip() == str(tmp_path / "night.error.jsonl")


def test_mistakes_end_in_a_sentence(run, requests, tmp_path, monkeypatch):
    (tmp_path / "bad").write_text("hello\n")
    assert "is not a request of a batch" in run("submit", tmp_path / "bad").stderr
    assert "Cannot read" in run("submit", tmp_path / "nothing").stderr
    assert "there is no batch" in run("show", "batch_none").stderr
    assert "`completion_window`" in run("submit", requests(line(0)), "--window", "9y").stderr
    monkeypatch.setenv("HEADGATE_API_KEY", "")
    assert "HEADGATE_API_KEY" in run("list").stderr
    monkeypatch.setenv("HEADGATE_API_KEY", KEY)
    monkeypatch.setenv("HEADGATE_URL", "http://127.0.0.1:9")
    assert "Nothing that speaks for Headgate" in run("list").stderr

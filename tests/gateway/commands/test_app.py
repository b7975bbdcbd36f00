import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from typer.testing import CliRunner

from gateway.commands.app import app

ROOT = Path(__file__).parents[3]


def test_the_version_is_the_installed_one_and_says_that_a_checkout_is_pure():
    assert CliRunner().invoke(app, ["version"]).output == metadata.version("headgate") + " (pure Python)\n"


def test_without_a_command_the_commands_are_listed():
    output = CliRunner().invoke(app, []).output
    for name in ("serve", "check", "explain", "keys", "costs"):
        assert f" {name} " in output


def test_ctrl_c_while_the_commands_are_loaded_leaves_no_trace():
    program = """
import os, signal
import gateway.__main__ as entry
entry.import_module = lambda name: os.kill(os.getpid(), signal.SIGINT)
entry.main()
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b"", b"")


def test_who_asks_the_service_without_an_operator_key_is_told_where_to_put_one(monkeypatch):
    monkeypatch.delenv("HEADGATE_OPERATOR_KEY", raising=False)
    for command in (["status"], ["jobs", "stats"], ["webhooks", "list"], ["engine", "status"]):
        result = CliRunner().invoke(app, [*command, "--url", "http://127.0.0.1:1"])
        assert result.exit_code == 1
        assert "HEADGATE_OPERATOR_KEY" in result.output

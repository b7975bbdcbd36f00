"""`headgate engine top` against a management plane that is played."""

import json

import pytest
from typer.testing import CliRunner

from gateway.commands import engine_top
from gateway.commands.app import app

ENDPOINT = {
    "state": "up",
    "reason": "",
    "out_in_workers": 0,
    "last_probe": "ok",
    "running": 3,
    "waiting": 1,
    "kv_usage": 0.42,
    "load_age_s": 0.4,
}
PAGES = {
    "/api/engines": {
        "pools": [
            {
                "replicas": [
                    {"endpoints": ["gpu/0"], "state": "ready", "gpu": 0.87, "gpu_memory": 0.9},
                    {"endpoints": ["gpu/1"], "state": "starting"},
                ]
            }
        ]
    },
    "/api/status": {
        "endpoints": [
            {
                **ENDPOINT,
                "name": "gpu/0",
                "hit_rate": 0.75,
                "prompt_tokens_per_s": 1234.4,
                "generation_tokens_per_s": 99.6,
                "kv_events": "complete",
                "kv_blocks": 512,
            },
            {
                **ENDPOINT,
                "name": "gpu/1",
                "state": "closed",
                "running": None,
                "waiting": None,
                "kv_usage": None,
            }
            | {"load_age_s": None},
            {**ENDPOINT, "name": "elsewhere/0", "hit_rate": None},
            {**ENDPOINT, "name": "openai", "running": None, "load_age_s": None},
        ]
    },
}


class Plane:
    def ask(self, path):
        return PAGES[path]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(engine_top, "find_plane", lambda *_: Plane())
    return lambda *arguments: CliRunner().invoke(app, ["engine", "top", *arguments])


def test_every_engine_is_a_line_and_providers_are_none(run):
    shown = run("--once").stdout
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert lines["gpu/0"][1:10] == ["up", "3", "1", "42%", "75%", "1,234", "100", "87%", "90%"]
    assert "complete, 512 blocks" in shown
    assert lines["gpu/1"] == ["gpu/1", "starting"]
    assert "elsewhere/0" in lines
    assert "openai" not in lines


def test_programs_get_json(run):
    engines = json.loads(run("--once", "--json").stdout)["engines"]
    assert [engine["name"] for engine in engines] == ["gpu/0", "gpu/1", "elsewhere/0"]
    assert (engines[0]["gpu"], engines[0]["state"], engines[1]["state"]) == (0.87, "up", "starting")


def test_it_looks_again_until_it_is_stopped(run, monkeypatch):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine_top.time, "sleep", sleep)
    result = run("--json", "--every", "0.5")
    assert (len(result.stdout.splitlines()), pauses, result.exit_code) == (3, [0.5] * 3, 0)


def test_without_engines_it_says_so(run, monkeypatch):
    monkeypatch.setitem(PAGES, "/api/status", {"endpoints": []})
    assert "No engine tells its load" in run("--once").stdout

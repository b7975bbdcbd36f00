import json
import subprocess
from pathlib import Path

import pytest

from tests.engine.pools import PYTHON
from tests.local_engine.plan_cases import CASES, plan, preset_plans

pytestmark = pytest.mark.engine
SCRIPT = Path(__file__).with_name("parse_commands.py")


def commands() -> dict[str, list[str]]:
    """Every command of every plan there is, by what it is for."""
    plans = {**{name: plan(name) for name in CASES}, **{f"preset {name}": p for name, p in preset_plans()}}
    found = {}
    for name, made in plans.items():
        for replica in made.replicas:
            found[f"{name}: {replica.name}"] = list(replica.argv)
        for part in made.remote:
            found[f"{name}: {part.node}"] = list(part.argv)
    return found


def refusals(lines: list[list[str]]) -> list[str | None]:
    done = subprocess.run(
        [str(PYTHON), str(SCRIPT)],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_vllms_own_parser_takes_every_command_and_not_just_anything():
    lines = commands()
    wrong = {
        "a flag it does not have": [*lines["one: pool/0"], "--no-such-flag"],
        "a value it does not have": [*lines["one: pool/0"], "--scheduling-policy", "luck"],
        "a parser it does not have": [*lines["one: pool/0"], "--tool-call-parser", "no_such_parser"],
        "JSON that is none": [*lines["one: pool/0"], "--speculative-config", "{"],
        "two modes at once": [*lines["ranks-external: pool/0"], "--data-parallel-rank", "0"],
    }
    said = dict(zip([*lines, *wrong], refusals([*lines.values(), *wrong.values()]), strict=True))
    assert {name: why for name, why in said.items() if why and name not in wrong} == {}
    assert [name for name in wrong if said[name] is None] == []

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from backends.registry import KNOWN
from gateway.commands.explain import explain
from gateway.keys import NewKey, create_key, load_pepper
from gateway.stores import key_table
from gateway.stores.sqlite import DATABASE_NAME, database
from tests.support.gateway_process import KEY, Gateway
from tests.support.upstream_thread import UpstreamThread

ROOT = Path(__file__).parents[3]
APP = typer.Typer()
APP.command()(explain)
CONFIG = """
keys:
  - {name: declared, key: caller-key-4fd8a1c6e2, team: platform, models: ["own*"]}
  - {name: old, key: caller-key-99aa71b3d0, expires: 2020-01-01}
pools:
  own: {endpoints: ["http://a.test:1/v1", "http://b.test:1/v1", "http://c.test:1/v1"]}
  sim: {simulator: {replicas: 2}}
models:
  own: {targets: [{pool: own}], price: {input: 1, cached_input: 0.1, output: 2}}
  sim: {targets: [{pool: sim, model: demo}]}
prices: {unknown: block}
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    for record in KNOWN.values():
        for variable in filter(None, (record.key_env, record.base_url_env)):
            monkeypatch.delenv(variable, raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run(config):
    def invoke(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(APP, ["--config", str(config), *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.output

    return invoke


@pytest.fixture
def told(run):
    return lambda *arguments: json.loads(run(*arguments, "--json")[1])


@pytest.fixture
def storage(config) -> Path:
    """As the first start leaves it, with a few keys."""
    directory = config.parent / ".headgate"
    pepper = load_pepper(directory)
    with database(directory / DATABASE_NAME) as connection:
        create_key(connection, pepper, NewKey("stored", team="t", models=("own", "sim")), 1)
        create_key(connection, pepper, NewKey("late", expires_time=2), 1)
        _, gone = create_key(connection, pepper, NewKey("gone"), 1)
        key_table.revoke(connection, gone.id, 2)
        create_key(connection, pepper, NewKey("op", "operator"), 1)
    return directory


def test_each_stage_is_told_in_its_order(run):
    code, text = run("--model", "own", "--key", "declared")
    assert code == 0
    stages = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert stages[:4] == ["identify", "read", "admit", "place"]
    assert "declared of team platform, may use own*" in text
    assert text.count("$1.00 in, $0.10 cached, $2.00 out") == 3


def test_engines_that_do_not_run_yet_are_placed_by_the_names_they_will_have(run, config):
    engines = "  gpu: {vllm: {model: m, gpus: none, replicas: 2}}\n"
    models = "  gpu: {targets: [{pool: gpu, model: m}], price: {input: 1, output: 1}}\n"
    config.write_text(CONFIG.replace("models:\n  own", engines + "models:\n" + models + "  own"))
    code, text = run("--model", "gpu")
    assert code == 0, text
    assert "gpu/0" in text
    assert "gpu/1" in text


def test_candidates_come_with_their_price_and_its_source(told):
    places = told("--model", "own")["place"]
    assert {place["endpoint"] for place in places} == {"own/0", "own/1", "own/2"}
    assert places[0]["usd_per_million_tokens"] == {"input": "1.00", "cached_input": "0.10", "output": "2.00"}
    assert (places[0]["price"], places[0]["price_source"]) == ("known", "config")


@pytest.mark.parametrize(
    ("arguments", "denied", "status"),
    [
        (["--model", "nope"], "model_not_found", 404),
        (["--model", "sim", "--key", "declared"], "model_not_allowed", 403),
        (["--model", "sim"], "price_unknown", 403),
    ],
)
def test_a_denial_is_the_one_that_a_client_would_get(run, told, arguments, denied, status):
    assert told(*arguments)["admit"] | {"message": ""} == {"denied": denied, "status": status, "message": ""}
    assert f"{status} {denied}: " in run(*arguments)[1]


def test_stored_keys_are_found_by_name(told, storage):
    assert told("--model", "own", "--key", "stored")["identify"] == {
        "key": "stored",
        "team": "t",
        "organisation": "",
        "models": ["own", "sim"],
        "denied": None,
        "status": None,
    }


@pytest.mark.parametrize(
    ("key", "denied"), [("old", "key_expired"), ("late", "key_expired"), ("gone", "key_revoked")]
)
def test_a_key_that_is_over_is_told_so(run, told, storage, key, denied):
    found = told("--model", "own", "--key", key, "--session", "s")
    assert found["identify"]["denied"] == denied
    assert "admit" not in found
    assert f"401 {denied}" in run("--model", "own", "--key", key)[1]


@pytest.mark.parametrize("key", ["nobody", "op"])
def test_a_key_that_no_caller_has_is_a_sentence(run, storage, key):
    code, text = run("--model", "own", "--key", key)
    assert (code, text) == (1, f"Error: There is no caller key named {key}: see `headgate keys list`.\n")


def test_a_dialect_that_nobody_speaks_is_told_with_those_that_are(run, config):
    config.write_text(CONFIG.replace("own: {endpoints", "own: {paths: {chat: /chat}, endpoints"))
    assert "dialect_not_supported: it is served on chat" in run("--model", "own", "--dialect", "messages")[1]
    assert run("--model", "own", "--dialect", "telnet")[0] == 2


def test_a_session_has_its_endpoint_first_every_time(told, storage):
    firsts = {
        session: {told("--model", "own", "--session", session)["place"][0]["endpoint"] for _ in range(2)}
        for session in ("s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8")
    }
    assert all(len(names) == 1 for names in firsts.values())
    assert len(set.union(*firsts.values())) > 1
    assert told("--model", "own", "--session", "s1")["is_order_known"] is True


def test_where_simulators_serve_a_session_is_not_known_before_they_run(run, told, config, storage):
    config.write_text(CONFIG.replace("unknown: block", "unknown: warn"))
    assert told("--model", "sim", "--session", "s1")["is_order_known"] is False
    assert "which one is known when the simulators run" in run("--model", "sim", "--session", "s1")[1]


def test_it_makes_nothing(run, config):
    code, text = run("--model", "own", "--session", "s1")
    assert code == 1
    assert "start the gateway once" in text
    assert run("--model", "own")[0] == 0
    assert list(config.parent.iterdir()) == [config]


def test_a_bad_configuration_is_told_line_by_line(run, config):
    config.write_text("server: {prot: 1}")
    code, text = run("--model", "own")
    assert code == 1
    assert 'server.prot: unknown key; did you mean "port"?' in text


@pytest.mark.e2e
def test_the_gateway_sends_each_session_where_explain_says(tmp_path, monkeypatch):
    with UpstreamThread() as upstreams:
        endpoints = [upstreams.start().url for _ in range(3)]
        gateway = Gateway(
            tmp_path,
            pools={"own": {"endpoints": endpoints}},
            models={"own": {"targets": [{"pool": "own"}]}},
        )
        with gateway:
            for number in range(6):
                session = f"session-{number}"
                arguments = ["--config", str(gateway.config_path), "--json", "--model", "own"]
                result = CliRunner().invoke(APP, [*arguments, "--key", "test", "--session", session])
                first = json.loads(result.output)["place"][0]["endpoint"]
                body = {"model": "own", "messages": [{"role": "user", "content": "Hello"}]}
                headers = {"x-session-affinity": session}
                status, answered, _ = gateway.post("/v1/chat/completions", body, headers)
                assert status == 200
                answered = {name.lower(): value for name, value in answered.items()}
                assert gateway.row(answered["x-request-id"])["endpoint"] == first
    assert KEY not in result.output

import copy
import dataclasses
import random
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
import yaml

from backends.registry import KNOWN
from gateway.config import Config, LimitsConfig, load
from gateway.config_file import ConfigError
from gateway.config_reference import settings
from gateway.inbound import Limits
from local_engine.config import SimulatorConfig
from local_engine.simulator.engine import EngineSettings

ROOT = Path(__file__).parents[2]
KEY = "sk-Zk3vTq9wYb7RmX2cJd5L"
OTHER_KEY = "sk-Hn8gFs4pWa6VuE1tQy0M"

MINIMAL = """
pools:
  demo: {simulator: {replicas: 1}}
models:
  demo: {targets: [{pool: demo, model: demo}]}
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "config.yaml"
    path.write_text(text)
    return path


def loaded(directory: Path, text: str, environ: dict[str, str] | None = None) -> Config:
    return load(write(directory, text), environ or {})


def attempt(directory: Path, text: str, environ: dict[str, str]) -> Config | ConfigError:
    try:
        return loaded(directory, text, environ)
    except ConfigError as error:
        return error


def refusal(directory: Path, text: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(directory, text, environ)
    return list(caught.value.lines)


def test_the_repositorys_config_runs_without_any_environment():
    config = load(ROOT / "config.yaml", {})
    assert list(config.served_models()) == ["demo"]
    assert config.enabled_providers() == {}
    assert list(config.enabled_pools()) == ["demo"]
    assert config.declared_keys() == ()
    assert config.storage.directory == ROOT / ".headgate"


def test_the_repositorys_config_shows_every_key():
    text = (ROOT / "config.yaml").read_text()
    values = yaml.safe_load(text)

    def shown(node: object, parts: list[str]) -> bool:
        if not parts:
            return True
        name, rest = parts[0], parts[1:]
        if isinstance(node, list):
            return any(shown(item, parts) for item in node)
        if not isinstance(node, dict):
            return node is None and f"{name}:" in text  # the section is null: its keys stand in a comment
        children = node.values() if name == "*" else [node[name]] if name in node else []
        return any(shown(child, rest) for child in children)

    of_providers = {setting.path for setting in settings()}
    for setting in settings():
        parts = setting.path.replace("[]", "").split(".")
        if parts[0] == "pools" and setting.path.replace("pools", "providers", 1) in of_providers:
            continue  # shown under providers
        if "price" in parts[:-1] or parts[:2] == ["prices", "overrides"]:
            continue  # the fields of a price are alternatives; docs/configuration.md has them
        assert shown(values, parts), f"{setting.path} is not in config.yaml"


def test_every_line_of_a_section_in_the_repositorys_config_is_commented():
    lines = (ROOT / "config.yaml").read_text().splitlines()
    assert sum("#" in line for line in lines) > len(lines) / 2


def test_defaults_are_safe(tmp_path):
    config = loaded(tmp_path, MINIMAL)
    assert (config.server.host, config.management.host) == ("127.0.0.1", "127.0.0.1")
    assert config.server.port != config.management.port
    assert config.prices.unknown == "warn"


def test_every_problem_is_listed_at_once_with_line_path_and_suggestion(tmp_path):
    lines = refusal(
        tmp_path,
        """\
server: {prot: 1, workers: 0}
logging: {level: inof}
pools:
  demo: {simulator: {replicas: many}}
models:
  demo: {targets: [{pool: demo, model: demo, pol: x}]}
  fast: {targets: [{pool: dmo}, {provider: opnai, model: "${NOPE}"}]}
  empty: {}
provders: {}
""",
    )
    assert lines == [
        "config.yaml:1: server.workers: must be greater than or equal to 1",
        'config.yaml:1: server.prot: unknown key; did you mean "port"?',
        "config.yaml:2: logging.level: must be 'debug', 'info', 'warning' or 'error'",
        "config.yaml:4: pools.demo.simulator.replicas: must be a valid integer, unable to parse string as an integer",
        'config.yaml:6: models.demo.targets[0].pol: unknown key; did you mean "pool"?',
        "config.yaml:7: models.fast.targets[1].model: the environment variable NOPE is not set; set it, or write ${NOPE:-default}",
        'config.yaml:7: models.fast.targets[0].pool: there is no pool "dmo"; did you mean "demo"?',
        'config.yaml:7: models.fast.targets[1].provider: there is no provider "opnai"; did you mean "openai"?',
        "config.yaml:8: models.empty.targets: is needed",
        'config.yaml:9: provders: unknown key; did you mean "providers"?',
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("management: {port: 8080}", "management.port: 8080 is also server.port"),
        ("server: {port: 9}\nmanagement: {host: 0.0.0.0, port: 9}", "9 is also server.port"),
        ("server: {port: 65536}", "server.port: must be less than or equal to 65535"),
        ("server: {host: ''}", "server.host: must have at least 1 character"),
        ("server: {workers: auot}", "server.workers: must be a valid integer"),
        ("server: {limits: {body_s: .inf}}", "server.limits.body_s: must be a finite number"),
        (
            "models: {m: {targets: [{provider: openai, model: on}]}}",
            "model: must be a text; put it in quotes",
        ),
        ("server: []", "server: must be a section of settings"),
        ("models: {m: {targets: []}}", "models.m.targets: must not be empty"),
        ("models: {m: {targets: [{model: x}]}}", "models.m.targets[0]: needs either pool or provider"),
        (
            "pools: {p: {simulator: {}}}\nmodels: {m: {targets: [{pool: p, provider: openai}]}}",
            "needs either pool or provider",
        ),
        ("models: {m: {targets: [{pool: openai}]}}", '"openai" is a provider; write `provider: openai`'),
        (
            "models: {'m*': {targets: [{provider: openai}]}}",
            "models.m*: a model's name is printable, without *",
        ),
        (
            "models: {a: {targets: [{provider: openai}], aliases: [b, b]}}",
            'models.a.aliases[1]: "b" is already an alias of a',
        ),
        (
            "models: {a: {targets: [{provider: openai}], aliases: [a]}}",
            'models.a.aliases[0]: "a" is already a model',
        ),
        (
            "models: {a: {targets: [{provider: openai}], aliases: ['b*']}}",
            "an alias is a whole name, without *",
        ),
        ("pools: {openai: {endpoints: ['http://e:1/v1']}}", "pools.openai: is also the name of a provider"),
        ("pools: {p: {}}", "pools.p: needs one of endpoints, discovery, vllm and simulator"),
        (
            "pools: {p: {simulator: {}, endpoints: ['http://e:1']}}",
            "pools.p: needs one of endpoints, discovery, vllm and simulator",
        ),
        (
            "pools: {p: {endpoints: ['http://e:1/v1', 'http://e:1/v1/']}}",
            "pools.p: endpoints: the same address twice",
        ),
        ("pools: {P: {simulator: {}}}", "pools.P: a name has small letters, digits"),
        ("pools: {v1: {simulator: {}}}", "pools.v1: the name v1 is taken by a path of the gateway's own"),
        ("pools: {p: {endpoints: ['e:8000']}}", "pools.p.endpoints[0]: the base URL must look like https://"),
        (
            "prices: {overrides: {demo: {input: 1}}}",
            "prices.overrides.demo: is written {provider or pool}/{model}",
        ),
        (
            "prices: {overrides: {'opnai/*': {input: 1}}}",
            'no provider or pool "opnai"; did you mean "openai"?',
        ),
        ("prices: {overrides: {'openai/*x': {input: 1}}}", "a * may stand only at the end"),
        (
            "providers: {acme: {api_key: k}}",
            "providers.acme.type: is needed: the known provider that it speaks",
        ),
        ("providers: {opnai: {api_key: k}}", 'or did you mean the provider "openai"?'),
        (
            "providers: {openai: {type: groq}}",
            "providers.openai.type: openai is a known provider; choose another",
        ),
        ("providers: {acme: null}", "providers.acme: must be a section of settings"),
        ("prices: {unknown: free}", "prices.unknown: must be 'warn' or 'block'"),
        ("sessions: {headers: [Host]}", "sessions.headers[0]: the header host belongs to the transport"),
        ("sessions: {headers: ['a b']}", 'sessions.headers[0]: "a b" is not a valid header name'),
        ("ledger: {jsonl: {}}", "ledger.jsonl.path: is needed"),
        ("outbound: {ca_file: nope.pem}", "outbound.ca_file: the CA file"),
        ("outbound: {no_proxy: [10.0.0.0/99]}", 'no_proxy[0]: "10.0.0.0/99" is no host name, address or'),
        ("outbound: {no_proxy: ['http://a']}", 'outbound.no_proxy[0]: "http://a" is no host name'),
        ("outbound: {no_proxy: ['localhost:80']}", "scheme and port are left out"),
        ("storage: {directory: ''}", "storage.directory: must not be empty"),
        ("queue: {store: redis}", "queue.store: is redis; say where that is, in storage.redis"),
        ("rules: all", "rules: must be a list"),
        (
            "limits: {rules: [{scope: 'user:*', usd: 1, per: day}]}",
            "limits.rules[0].scope: counts nobody: limits.end_users",
        ),
        (
            'providers: {acme: {type: openai, api_key: "a\\r\\nx-b: c"}}',
            "providers.acme.api_key: it goes into a header",
        ),
        (
            "providers: {acme: {type: openai, more_api_keys: [ä]}}",
            "providers.acme.more_api_keys[0]: it goes into a header",
        ),
        (
            "providers: {acme: {type: openai, api_key: k, headers: {Authorization: x}}}",
            "providers.acme.headers.Authorization: is the header that api_key is sent in",
        ),
        (
            "providers: {anthropic: {api_key: k, headers: {x-api-key: x}}}",
            "providers.anthropic.headers.x-api-key: is the header that api_key is sent in",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_change(tmp_path, text, told):
    lines = refusal(tmp_path, text)
    assert any(told in line for line in lines), lines
    assert len(lines) == 1, lines


def test_numbers_and_booleans_come_from_the_environment(tmp_path):
    text = 'server: {port: "${PORT}", workers: "${N:-auto}"}\nlogging: {access: "${ACCESS}"}\n'
    config = loaded(tmp_path, text, {"PORT": "9000", "ACCESS": "false", "N": "3"})
    assert (config.server.port, config.server.workers, config.logging.access) == (9000, 3, False)


def test_paths_count_from_the_files_directory_also_in_a_worker(tmp_path):
    path = write(tmp_path, f"{MINIMAL}ledger: {{jsonl: {{path: logs/costs.jsonl}}}}\n")
    config = Config.from_json(load(path, {}).to_json())
    assert config.storage.directory == tmp_path / ".headgate"
    assert config.ledger.jsonl is not None
    assert config.ledger.jsonl.path == tmp_path / "logs/costs.jsonl"


def test_limits_and_engines_have_the_defaults_of_what_they_configure():
    limits = LimitsConfig().model_dump(exclude={"response_bytes"})
    uploads = {
        "upload_paths": frozenset(),
        "upload_bytes": 0,
    }  # where there is a queue: its files' own settings
    assert limits | uploads == dataclasses.asdict(Limits())
    simulator = SimulatorConfig()
    for field in dataclasses.fields(EngineSettings):
        assert getattr(simulator, field.name) == field.default


def test_prices_travel_to_a_worker_exactly(tmp_path):
    text = """
prices:
  overrides:
    "openai/*": {input_cost_per_token: 0.0000025, output_cost_per_token: 1e-5, input_cost_per_token_batches: 1e-6}
    "openai/free": {free: true}
    "openai/long": {input: 0.10, output: 2, batch: 0.5, tiers: [{above: 200000, input: 3}]}
"""
    config = loaded(tmp_path, text)
    assert Config.from_json(config.to_json()) == config


# Keys


def test_declared_keys_become_what_the_keyring_takes(tmp_path):
    text = """
keys:
  - {name: ci, key: "${CI}", team: platform, models: [demo, "openai/*"], expires: 2027-01-01, tags: [a, b]}
  - {name: none, key: "${NONE:-}"}
management:
  keys: [{name: ops, key: "${OPS}", expires: 2027-01-01T12:00:00+02:00}]
"""
    caller, operator = loaded(tmp_path, text, {"CI": KEY, "OPS": OTHER_KEY}).declared_keys()
    assert (caller.name, caller.value, caller.kind, caller.team) == ("ci", KEY, "caller", "platform")
    assert caller.models == {"demo", "openai/*"}
    assert caller.expires_time == datetime(2027, 1, 1, tzinfo=UTC).timestamp()
    assert caller.tags == ("a", "b")
    assert (operator.name, operator.kind) == ("ops", "operator")
    assert operator.expires_time == datetime(2027, 1, 1, 10, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ('name: a, key: "sk-1234"', "keys[0].key: this key is too short"),
        ('name: a, key: "${K}", models: ["a*b"]', 'keys[0].models: "a*b": a * may stand only at the end'),
        ('name: a, key: "${K}", models: demo', 'keys[0].models: must be "*" or a list of names'),
        ('name: a, key: "${K}", expires: soon', "keys[0].expires: must be a valid datetime"),
        ('name: "", key: "${K}"', "keys[0].name: must have at least 1 character"),
        ("name: a", "keys[0].key: is needed"),
    ],
)
def test_a_key_that_cannot_work_is_refused(tmp_path, entry, told):
    (line,) = refusal(tmp_path, f"keys: [{{{entry}}}]", {"K": KEY})
    assert told in line


def test_two_keys_of_one_name_or_value_are_refused(tmp_path):
    text = 'keys: [{name: a, key: "${K}"}, {name: b, key: "${K}"}]\nmanagement: {keys: [{name: a, key: "${O}"}]}\n'
    lines = refusal(tmp_path, text, {"K": KEY, "O": OTHER_KEY})
    assert [line.split(": ", 1)[1] for line in lines] == [
        "keys[0].name: another key has this name",
        "keys[0].key: another entry has the same key",
        "keys[1].key: another entry has the same key",
        "management.keys[0].name: another key has this name",
    ]


# Secrets


SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXKEY9"
EVERY_SECRET = """
keys: [{name: a, key: "${S}"}]
storage: {pepper: "${S}-pepper-pepper"}
outbound: {proxy: "http://user:${S}@proxy:3128"}
providers:
  openai: {api_key: "${S}-1", headers: {x-token: "${S}"}, proxy: "http://user:${S}@proxy:3128"}
"""


def test_no_secret_shows_in_repr_or_dump(tmp_path):
    config = loaded(tmp_path, EVERY_SECRET, {"S": SECRET})
    shown = [
        repr(config),
        str(config),
        config.model_dump_json(),
        str(config.model_dump()),
        str(config.notes()),
    ]
    shown += [
        repr(config.enabled_providers()),
        repr(config.declared_keys()),
        config.model_dump_json(indent=1),
    ]
    assert not [text for text in shown if SECRET in text]


def test_a_worker_gets_every_secret(tmp_path):
    config = loaded(tmp_path, EVERY_SECRET, {"S": SECRET})
    twin = Config.from_json(config.to_json())
    assert twin == config
    provider = twin.enabled_providers()["openai"]
    assert provider.api_key == f"{SECRET}-1"
    assert provider.provider.headers == {"x-token": SECRET}
    assert provider.proxy == f"http://user:{SECRET}@proxy:3128"
    assert twin.declared_keys()[0].value == SECRET


@pytest.mark.parametrize(
    "text",
    [
        'server: {port: "${S}"}',
        'server: {workers: "${S}"}',
        'server: {host: "${S} x"}',
        'logging: {level: "${S}"}',
        'keys: [{name: a, key: "x ${S}"}]',
        'keys: [{name: a, key: "${S}", expires: "${S}"}]',
        'storage: {pepper: ["${S}"]}',
        'outbound: {proxy: "ftp://${S}@h"}',
        'providers: {openai: {base_url: "https://u:${S}@h"}}',
        'providers: {openai: {base_url: "${S}"}}',
        'providers: {openai: {headers: {x-a: "${S}é"}}}',
        'providers: {openai: {api_key: {x: "${S}"}}}',
        'pools: {p: {endpoints: ["${S}"]}}',
        'keys: "${S}"',
        'models: {m: {targets: [{provider: "${S}"}]}}',
        'models: {m: {targets: [{provider: "x${S}x"}]}}',
        'models: {m: {targets: [{provider: openai}], aliases: ["${S}", "${S}"]}}',
        'models: {m: {targets: [{provider: openai}], price: {input: "${S}"}}}',
        'providers: {acme: {type: "${S}"}}',
        'sessions: {headers: ["${S} x"]}',
    ],
)
def test_no_secret_shows_in_an_error(tmp_path, text):
    assert SECRET not in "\n".join(refusal(tmp_path, text, {"S": SECRET}))


def test_an_error_carries_no_trace_of_the_input(tmp_path):
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, 'server: {port: "${S}"}', {"S": SECRET})
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def places(node: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


VALUES = [
    None,
    "",
    0,
    -1,
    1.5,
    True,
    [],
    {},
    "x",
    "*",
    "${S}",
    ["a", 1],
    {"a": 1},
    {"a": {"b": [1]}},
    [{"a": 1}],
]
VALUES += [float("inf"), "x" * 300, "é", "a b", "http://h", "direct", 10**30, b"x", date(2020, 1, 1)]


@pytest.mark.parametrize("seed", range(4))
def test_a_spoilt_file_is_refused_in_sentences_or_loads(tmp_path, seed):
    chance = random.Random(seed)
    original = yaml.load((ROOT / "config.yaml").read_text(), yaml.CSafeLoader)
    for _ in range(60):
        values = copy.deepcopy(original)
        for _ in range(chance.randint(1, 3)):
            *outer, last = chance.choice(places(values)[1:])
            holder = values
            for key in outer:
                holder = holder[key]
            if isinstance(holder, dict) and chance.random() < 0.3:
                holder[chance.choice(["zz", "type", "name", "a/b", "é", ""])] = holder.pop(last)
            else:
                holder[last] = copy.deepcopy(chance.choice(VALUES))
        outcome = attempt(
            tmp_path, yaml.dump(values, Dumper=yaml.CSafeDumper), {"S": SECRET, "OPENAI_API_KEY": "k"}
        )
        if isinstance(outcome, ConfigError):
            assert SECRET not in str(outcome)
            assert not [line for line in outcome.lines if "\n" in line]
        else:
            assert Config.from_json(outcome.to_json()) == outcome
            outcome.notes()
            assert outcome.enabled_providers().keys() <= outcome.providers.keys()


# Providers


def test_a_known_provider_is_on_as_soon_as_its_key_is_in_the_environment(tmp_path):
    environ = {"GROQ_API_KEY": "gk", "ANTHROPIC_API_KEY": "ak", "ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}
    enabled = loaded(tmp_path, MINIMAL, environ).enabled_providers()
    assert sorted(enabled) == ["anthropic", "groq"]
    assert enabled["groq"].api_key == "gk"
    assert enabled["groq"].base_urls == ("https://api.groq.com/openai/v1",)
    assert enabled["groq"].provider.drops == KNOWN["groq"].drops
    assert enabled["anthropic"].base_urls == ("http://127.0.0.1:9",)


def test_what_the_file_says_of_a_provider_goes_before_the_environment(tmp_path):
    text = "providers:\n  groq: {base_url: 'http://127.0.0.1:1/v1'}\n  openai: {enabled: false}\n  xai:\n"
    environ = {
        "GROQ_API_KEY": "gk",
        "GROQ_BASE_URL": "http://other/v1",
        "OPENAI_API_KEY": "ok",
        "XAI_API_KEY": "x",
    }
    enabled = loaded(tmp_path, text, environ).enabled_providers()
    assert enabled["groq"].base_urls == ("http://127.0.0.1:1/v1",)
    assert enabled["groq"].api_key == "gk"
    assert sorted(enabled) == ["groq", "xai"]


def test_a_key_in_the_environment_without_an_address_is_a_note_and_no_error(tmp_path):
    config = loaded(tmp_path, MINIMAL, {"AZURE_OPENAI_API_KEY": "k"})
    assert config.enabled_providers() == {}
    assert config.notes() == ["providers.azure-openai: off (no address, set AZURE_OPENAI_BASE_URL)"]


def test_a_model_whose_targets_are_all_off_is_noted_and_not_served(tmp_path):
    text = """
pools:
  gpu: {enabled: false, endpoints: ["http://e:1/v1"]}
models:
  smart: {targets: [{provider: openai, model: gpt-5}, {provider: mistral, model: m}]}
  big: {targets: [{pool: gpu}]}
"""
    config = loaded(tmp_path, text)
    assert config.served_models() == {}
    assert config.notes() == [
        "models.smart: not served (openai: no key, set OPENAI_API_KEY; mistral: no key, set MISTRAL_API_KEY)",
        "models.big: not served (the pool gpu: enabled is false)",
    ]
    config = loaded(tmp_path, text, {"MISTRAL_API_KEY": "k"})
    assert [target.provider for target in config.served_models()["smart"]] == ["mistral"]


def test_a_model_that_would_hold_requests_without_a_queue_is_noted(tmp_path):
    text = "pools: {p: {simulator: {}}}\nmodels: {m: {targets: [{pool: p}], on_full: hold}}\n"
    assert loaded(tmp_path, text).notes() == [
        "models.m.on_full: as if it said nothing (queue.enabled is false)"
    ]
    assert loaded(tmp_path, text + "queue: {enabled: true}\n").notes() == []

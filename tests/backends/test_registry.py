import os
import re
from pathlib import Path

import pytest
from genai_prices.data_snapshot import get_snapshot

from backends.adapter import head
from backends.config import OutboundConfig, ProviderConfig
from backends.dialect import DIALECTS
from backends.pool import Endpoint
from backends.registry import KNOWN
from backends.transport import ConnectionPool, Origin

SNAPSHOT = Path(__file__).with_name("registry_snapshot.txt")
FILES = Path(__file__).parents[2] / "backends/providers"


def request_head(name: str, dialect: str) -> list[str]:
    """The head that goes out for this provider, as lines."""
    record = KNOWN[name]
    config = ProviderConfig(api_key="KEY", base_url=None if record.base_url else "https://given.example/v1")
    settings = config.resolve(name, OutboundConfig())
    origin, base_path = Origin.parse(settings.base_urls[0])
    endpoint = Endpoint(
        name, settings.provider, ConnectionPool(origin), base_path, settings.api_key, settings.deadlines
    )
    return head(endpoint, "POST", record.paths[dialect], {}, 2, "id").decode().splitlines()


def described(name: str) -> list[str]:
    record = KNOWN[name]
    lines = [f"{name}: prices {record.prices}, asks usage {record.may_ask_usage}"]
    lines.append(f"  drops    {', '.join(sorted(record.drops)) or '-'}")
    lines.append(f"  forwards {', '.join(sorted(record.forwards)) or '-'}")
    for dialect in record.paths:
        sent = request_head(name, dialect)
        fields = dict(line.split(": ", 1) for line in sent[1:] if line)
        auth = [f"{field}: {value}" for field, value in fields.items() if "KEY" in value]
        own = [f"{field}: {fields[field]}" for field in record.headers]
        path = sent[0].split()[1]
        lines.append(f"  {dialect:<12} {fields['host']}{path} | {'; '.join(auth + own)}")
    return lines


async def test_what_each_provider_is_sent_is_as_written_down():
    text = "\n".join(line for name in sorted(KNOWN) for line in described(name)) + "\n"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        SNAPSHOT.write_text(text)
    assert text == SNAPSHOT.read_text(), (
        "if this is meant: run again with UPDATE_SNAPSHOTS=1 and review the diff"
    )


def test_every_file_is_registered_under_its_own_name():
    files = {path.stem for path in FILES.glob("*.py") if path.stem != "__init__"}
    assert files == {name.replace("-", "_") for name in KNOWN}


@pytest.mark.parametrize("record", KNOWN.values(), ids=lambda record: record.name)
def test_a_record_is_complete_and_consistent(record):
    assert set(record.paths) <= set(DIALECTS)
    assert record.paths
    assert all(path.startswith("/") for path in record.paths.values())
    assert record.docs.startswith("https://")
    assert re.fullmatch(r"[a-z0-9-]+", record.name)
    assert record.forwards == {name.lower() for name in record.forwards}
    assert "model" not in record.drops
    if record.base_url:
        Origin.parse(record.base_url)
    if record.key_env is not None:
        assert re.fullmatch(r"[A-Z0-9_]+_API_KEY", record.key_env)


def test_no_two_providers_read_the_same_variable():
    variables = [variable for r in KNOWN.values() for variable in (r.key_env, r.base_url_env) if variable]
    assert len(variables) == len(set(variables))


def test_prices_are_ids_of_the_price_data_that_cover_the_providers_own_address():
    providers = {provider.id: provider for provider in get_snapshot().providers}
    for record in KNOWN.values():
        if record.prices is not None:
            assert record.prices in providers, record.name
    for name in (
        "openai",
        "anthropic",
        "groq",
        "mistral",
        "deepseek",
        "fireworks",
        "xai",
        "cerebras",
        "zai",
        "gemini",
    ):
        record = KNOWN[name]
        assert re.search(providers[record.prices].api_pattern, record.base_url), name


def test_no_client_header_that_pays_frames_or_authenticates_is_forwarded():
    never = {
        "authorization",
        "x-api-key",
        "api-key",
        "cookie",
        "host",
        "idempotency-key",
        "openai-organization",
    }
    never |= {
        "openai-project",
        "x-data-parallel-rank",
        "x-vllm-priority",
        "content-length",
        "transfer-encoding",
    }
    for record in KNOWN.values():
        assert not record.forwards & never, record.name


@pytest.mark.parametrize("name", ["groq", "nvidia", "azure-openai", "cerebras", "gemini"])
def test_providers_known_to_refuse_prompt_cache_key_are_not_sent_it(name):
    assert "prompt_cache_key" in KNOWN[name].drops


def test_mistral_is_never_sent_stream_options():
    assert "stream_options" in KNOWN["mistral"].drops
    assert not KNOWN["mistral"].may_ask_usage

"""The providers Headgate knows, by name. A new one is a file in `backends/providers/` and a line here."""

from collections.abc import Mapping
from importlib import import_module
from typing import Final

from backends.provider import Provider

_FILES: Final = (
    "anthropic",
    "azure_openai",
    "cerebras",
    "cohere",
    "deepinfra",
    "deepseek",
    "fireworks",
    "gemini",
    "groq",
    "llamacpp",
    "mistral",
    "moonshot",
    "nvidia",
    "ollama",
    "openai",
    "openrouter",
    "perplexity",
    "sglang",
    "simulator",
    "tgi",
    "together",
    "vllm",
    "xai",
    "zai",
)


def _record(file: str) -> Provider:
    record = import_module(f"backends.providers.{file}").PROVIDER
    assert isinstance(record, Provider)
    return record


KNOWN: Final[Mapping[str, Provider]] = {record.name: record for record in map(_record, _FILES)}

"""Anthropic: the Messages API.

The base URL ends in `/v1`; `ANTHROPIC_BASE_URL` by convention does not (the SDK appends `/v1/messages`), so the
paths carry it. The version header is the client's, or the oldest stable one: every client must send one.
"""

from backends.provider import Provider

PROVIDER = Provider(
    name="anthropic",
    base_url="https://api.anthropic.com",
    key_env="ANTHROPIC_API_KEY",
    base_url_env="ANTHROPIC_BASE_URL",
    auth="x-api-key",
    paths={"messages": "/v1/messages", "count_tokens": "/v1/messages/count_tokens"},
    prices="anthropic",
    forwards=frozenset({"anthropic-version", "anthropic-beta"}),
    headers={"anthropic-version": "2023-06-01"},
    docs="https://platform.claude.com/docs/en/api/overview",
)

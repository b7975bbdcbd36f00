"""One request with exact bytes on a connection of its own, for what an SDK would hide."""

import json
from typing import Any

from tests.support.gateway_process import KEY, Gateway
from tests.support.rawcli import Answer, RawClient

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBEDDINGS, MESSAGES = "/v1/embeddings", "/v1/messages"
USER = [{"role": "user", "content": "hi"}]
# The least each dialect takes, besides its model.
LEAST: dict[str, dict[str, Any]] = {
    CHAT: {"messages": USER},
    COMPLETIONS: {"prompt": "hi"},
    RESPONSES: {"input": "hi"},
    EMBEDDINGS: {"input": "hi"},
    MESSAGES: {"messages": USER, "max_tokens": 64},
}


def request(
    path: str, body: bytes | dict[str, Any] = b"", method: str = "POST", key: str | None = KEY, **headers: str
) -> bytes:
    """Headers by keyword, underscores for hyphens; the key as a bearer token unless it is None."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"host": "headgate.test", "content-length": str(len(data))}
    if data:
        fields["content-type"] = "application/json"
    if key is not None:
        fields["authorization"] = f"Bearer {key}"
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + data


async def ask(
    gateway: Gateway,
    path: str,
    body: bytes | dict[str, Any] = b"",
    method: str = "POST",
    key: str | None = KEY,
    **headers: str,
) -> Answer:
    """The whole answer, as strictly read as its framing allows."""
    client = await RawClient.connect(gateway.port)
    try:
        await client.send(request(path, body, method, key, **headers))
        return await client.read_answer(is_head=method == "HEAD")
    finally:
        client.close()


def called(path: str, model: str, **fields: Any) -> dict[str, Any]:
    """The body of a plain call in the path's dialect."""
    return {"model": model, **LEAST[path], **fields}

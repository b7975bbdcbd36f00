"""Liveness and readiness of one worker. They say ok or not ok, and nothing of what is behind."""

from gateway.endpoints.context import Context
from gateway.errors import answer_headers
from gateway.inbound import Request


async def live(context: Context, request: Request, request_id: str) -> None:
    """200 while the loop turns."""
    del context
    _say(request, request_id, is_ok=True)


async def ready(context: Context, request: Request, request_id: str) -> None:
    """503 before the first configuration and from the first moment of a drain."""
    _say(request, request_id, is_ok=context.is_ready)


def _say(request: Request, request_id: str, *, is_ok: bool) -> None:
    headers = [*answer_headers("openai", request_id), (b"content-type", b"application/json")]
    request.respond(
        200 if is_ok else 503, headers, b'{"status":"ok"}' if is_ok else b'{"status":"not ready"}'
    )

"""`/{provider}/...`: a provider's own paths, where the operator allows it.

A path the gateway knows as a dialect goes through the pipeline like any other, and is priced. Anything else is
relayed raw, for callers that may use everything of the provider: what it costs cannot be known.
"""

import time

from backends.dialect import DIALECTS, RAW
from gateway.endpoints.context import Context
from gateway.inbound import Request
from policies.exchange import Exchange


def provider_of(context: Context, path: str) -> str:
    """The provider a path names, or "" if none is open for passthrough under that name."""
    name, slash, _ = path[1:].partition("/")
    return name if slash and name in context.runtime.passthrough else ""


async def serve(context: Context, request: Request, request_id: str) -> None:
    provider = provider_of(context, request.path)
    rest = request.path[len(provider) + 1 :]
    model = context.runtime.passthrough[provider]
    paths = model.targets[0].pool.endpoints[0].provider.paths
    known = next((name for name, path in paths.items() if path == rest), None)
    dialect = RAW if known is None or request.method != "POST" else DIALECTS[known]
    exchange = Exchange(request_id, dialect, request.received_at, time.time())
    await context.pipeline.handle(request, exchange, provider)

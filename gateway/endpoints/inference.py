"""The inference endpoints: one per dialect, all through the pipeline."""

import time
from collections.abc import Awaitable, Callable

from backends.dialect import Dialect
from gateway.endpoints.context import Context
from gateway.inbound import Request
from policies.exchange import Exchange


def endpoint(dialect: Dialect) -> Callable[[Context, Request, str], Awaitable[None]]:
    """The endpoint of one dialect."""

    def serve(context: Context, request: Request, request_id: str) -> Awaitable[None]:
        return context.pipeline.handle(
            request, Exchange(request_id, dialect, request.received_at, time.time())
        )

    return serve

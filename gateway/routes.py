"""The data plane's table of routes: (path, method) to endpoint. A new endpoint is one file and one line here.

Paths are compared as they came, undecoded: what is authorised is what is served.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from backends.dialect import CHAT, COMPLETIONS, COUNT_TOKENS, EMBEDDINGS, MESSAGES, RESPONSES
from gateway.endpoints import (
    batches,
    files,
    health,
    inference,
    jobs,
    models,
    passthrough,
    responses,
    workers_ai,
)
from gateway.endpoints.context import Context, new_request_id
from gateway.errors import edge_answer
from gateway.inbound import Request

Endpoint = Callable[[Context, Request, str], Awaitable[None]]

ROUTES: Final[Mapping[str, Mapping[str, Endpoint]]] = {
    **{
        dialect.path: {"POST": inference.endpoint(dialect)}
        for dialect in (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES, COUNT_TOKENS)
    },
    "/v1/models": {"GET": models.list_models},
    "/v1/files": {"GET": files.list_all, "POST": files.create},
    "/v1/batches": {"GET": batches.list_all, "POST": batches.create},
    "/v1/jobs": {"GET": jobs.list_all, "POST": jobs.create},
    "/livez": {"GET": health.live},
    "/readyz": {"GET": health.ready},
    "/health": {"GET": health.ready},  # load generators and vLLM's own clients ask for this one
}
# Where a body may be a whole file.
UPLOAD_PATHS: Final = (files.PATH,)
MODEL_PREFIX: Final = "/v1/models/"
# `/v1/{things}/{id}` and `/v1/{things}/{id}/{action}`: by what comes before the id, and after it.
ITEMS: Final[Mapping[str, Mapping[str, Mapping[str, Endpoint]]]] = {
    "/v1/files/": {
        "": {"GET": files.show, "DELETE": files.delete},
        "content": {"GET": files.content},
    },
    "/v1/batches/": {"": {"GET": batches.show}, "cancel": {"POST": batches.cancel}},
    "/v1/jobs/": {
        "": {"GET": jobs.show, "DELETE": jobs.delete},
        "result": {"GET": jobs.result},
        "stream": {"GET": jobs.stream},
        "cancel": {"POST": jobs.cancel},
    },
    "/v1/responses/": {
        "": {"GET": responses.show, "DELETE": responses.delete},
        "cancel": {"POST": responses.cancel},
    },
}


def route(context: Context, request: Request) -> Awaitable[None]:
    """Answers one request. Unknown paths and methods get the API's own envelope, never a bare page.

    No coroutine itself, nor are the hot endpoints: each level that waits is paid at every step of the request.
    """
    request_id = new_request_id()
    methods = ROUTES.get(request.path)
    if methods is None:
        if request.path.startswith(MODEL_PREFIX):
            methods = {"GET": models.show_model}
        elif (item := _item(request.path)) is not None:
            methods = item
        elif request.path.startswith(workers_ai.PREFIX):
            path = workers_ai.openai_path(request.path)
            if path is not None:
                request.path = path
                return route(context, request)
            methods = workers_ai.methods_of(request)
        elif passthrough.provider_of(context, request.path):
            return passthrough.serve(context, request, request_id)
        else:
            methods = {}
    if not methods:
        what = f"there is nothing at {request.method} {request.path}"
        return _refuse(request, request_id, 404, "unknown_url", what)
    endpoint = methods.get("GET" if request.method == "HEAD" else request.method)
    if endpoint is None:
        allowed = ", ".join(methods)
        message = f"{request.path} takes {allowed}, not {request.method}"
        return _refuse(request, request_id, 405, "method_not_allowed", message, (b"allow", allowed.encode()))
    return endpoint(context, request, request_id)


def _item(path: str) -> Mapping[str, Endpoint] | None:
    """What may be done with one thing of a kind; None: it is no such path."""
    end = path.find("/", 4) + 1
    actions = ITEMS.get(path[:end])
    thing, _, action = path[end:].partition("/")
    return actions.get(action) if actions is not None and thing else None


async def _refuse(
    request: Request, request_id: str, status: int, code: str, message: str, *more: tuple[bytes, bytes]
) -> None:
    headers, body = edge_answer(status, code, message, request.path.encode(), request_id)
    request.respond(status, [*headers, *more], body)

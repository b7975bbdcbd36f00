"""The simulator's HTTP surface: vLLM's routes, envelopes and habits on a low-level aiohttp server.

Owns routing, reading bodies, writing answers and streams, and what happens when a client leaves (its sequences are
aborted at once) or the server stops. Everything about a dialect is in its `Reply`, everything about time in the
driver.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from local_engine.simulator import FINGERPRINT, VERSION, chat, messages, tokenizer
from local_engine.simulator.chat import ChatReply
from local_engine.simulator.completions import CompletionReply
from local_engine.simulator.driver import Call, Driver, EngineStoppedError
from local_engine.simulator.embeddings import EmbeddingReply
from local_engine.simulator.engine import Engine, EngineSettings, QueueFullError
from local_engine.simulator.faults import Condition, Fault, FaultQueue
from local_engine.simulator.generation import ApiError, Served, decode, refuse
from local_engine.simulator.messages import MessageReply
from local_engine.simulator.metrics import Metrics
from local_engine.simulator.reply import Label, Reply, Said, encoded, gather
from local_engine.simulator.responses import ResponseReply
from local_engine.simulator.transfer import Connector, Params, TransferConfig

MAX_BODY_BYTES: Final = 64 << 20
KEEPALIVE_S: Final = 5.0  # uvicorn's, and so vLLM's
_BUSY: Final = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
_DEAD: Final = "EngineCore encountered an issue. See stack trace (above) for the root cause."

_REPLIES: Final[dict[str, type[ChatReply | CompletionReply | ResponseReply | MessageReply]]] = {
    "/v1/chat/completions": ChatReply,
    "/v1/completions": CompletionReply,
    "/v1/responses": ResponseReply,
    "/v1/messages": MessageReply,
}


class TokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[chat.Message] | None = None
    tools: list[Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


class FaultRequest(msgspec.Struct, kw_only=True):
    fault: str | None
    count: int | None = None


_TOKENIZE: Final = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE: Final = msgspec.json.Decoder(DetokenizeRequest)
_FAULT: Final = msgspec.json.Decoder(FaultRequest)
_CONDITION: Final = msgspec.json.Decoder(Condition)


class Simulator:
    """One simulated vLLM server."""

    def __init__(
        self,
        settings: EngineSettings,
        model: str,
        *,
        seed: int,
        time_scale: float,
        allow_faults: bool = False,
        transfers: TransferConfig | None = None,
    ) -> None:
        """With `transfers`, a prompt may be computed here and decoded elsewhere, or the other way round."""
        self.engine = Engine(settings)
        self.served = Served(model, settings.max_model_len, seed)
        self.metrics = Metrics(self.engine, model)
        self.driver = Driver(self.engine, self.metrics, self.served, time_scale)
        self.connector = Connector(transfers, self.engine) if transfers is not None else None
        self.is_draining = False
        self._allow_faults = allow_faults
        self._faults = FaultQueue()
        self._condition = Condition()
        self._stale_metrics = b""
        self._gets: dict[str, Callable[[], web.Response]] = {
            "/v1/models": self._models,
            "/metrics": self._metrics,
            "/health": web.Response,
            "/ping": web.Response,
            "/load": lambda: _json({"server_load": self.driver.open_sequences}),
            "/version": lambda: _json({"version": VERSION, "simulator": FINGERPRINT}),
        }
        self._posts: dict[str, Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]] = {
            **dict.fromkeys(_REPLIES, self._generate),
            "/v1/embeddings": self._embed,
            "/v1/messages/count_tokens": self._count_tokens,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }
        if self.connector is not None:
            self._posts["/sim/kv/read"] = self._kv_read
            self._posts["/sim/kv/give_back"] = self._kv_give_back
        if allow_faults:
            self._posts["/sim/fault"] = self._set_fault
            self._posts["/sim/condition"] = self._set_condition

    def http_server(self) -> web.Server:
        """The protocol factory to listen with."""
        return web.Server(
            self.handle,
            request_factory=_request,
            handler_cancellation=True,
            keepalive_timeout=KEEPALIVE_S,
            access_log=None,
        )

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer any request; every error is in the envelope of the path's dialect."""
        try:
            response = await self._dispatch(request)
        except ApiError as error:
            is_anthropic = request.path.startswith("/v1/messages")
            body = messages.envelope(error) if is_anthropic else error.body()
            response = _json(body, error.status)
        if not response.prepared and "x-request-id" in request.headers:
            response.headers["x-request-id"] = request.headers["x-request-id"]
        return response

    async def _dispatch(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if path not in self._gets and path not in self._posts:
            raise ApiError(404, "Not Found")
        if request.method != ("GET" if path in self._gets else "POST"):
            raise ApiError(405, "Method Not Allowed")
        if path in self._gets:
            return self._gets[path]()
        try:
            return await self._posts[path](request)
        except EngineStoppedError as stopped:
            raise ApiError(500, str(stopped), kind="InternalServerError") from stopped
        except QueueFullError as full:
            raise ApiError(503, _BUSY) from full

    async def _generate(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await _body(request)
        params = self.connector.asked(body) if self.connector is not None else None
        if params is None or self.connector is None:
            return await self._answer(request, body)
        if params.do_remote_decode:
            return await self._answer(request, body, is_lent=True)
        with self.connector.owing(params):
            return await self._answer(request, body, params)

    async def _answer(
        self, request: web.BaseRequest, body: bytes, params: Params | None = None, *, is_lent: bool = False
    ) -> web.StreamResponse:
        """`params`: where the prompt has been computed; `is_lent`: it is computed for another engine."""
        self._check_admission(request)
        named = request.headers.get("x-request-id")
        label = Label(self.served.model, named) if named else Label(self.served.model)
        reply = _REPLIES[request.path](body, self.served, label)
        fault = self._fault(request)
        if fault is not None:
            await fault.before_answer(request, is_streamed=reply.generation.stream)
        loaded = None
        if params is not None and self.connector is not None:
            try:
                loaded = await self.connector.collect(params, reply.generation)
            except EngineStoppedError as stopped:
                if not reply.generation.stream:
                    raise
                return await _stopped(request, reply, stopped)  # its head is out by then
        call = self.driver.generate(reply.generation, is_lent=is_lent, loaded=loaded)
        try:
            if reply.generation.stream:
                return await self._stream(request, reply, call, fault)
            choices = [Said() for _ in call.sequences]
            while events := await call.events():
                gather(choices, events)
            answer = reply.whole(choices, call.tally())
            if is_lent and self.connector is not None:
                answer["kv_transfer_params"] = self.connector.lend(call.sequences[0])
            return await _whole(request, answer, fault)
        finally:
            call.close()

    async def _stream(
        self, request: web.BaseRequest, reply: Reply, call: Call, fault: Fault | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        if "x-request-id" in request.headers:
            response.headers["x-request-id"] = request.headers["x-request-id"]
        await response.prepare(request)
        try:
            if opening := reply.begin():
                await response.write(opening)
            sent = 0
            while events := await call.events():
                if fault is None:
                    await response.write(b"".join(map(reply.event, events)))
                    continue
                for event in events:
                    await fault.before_event(request, sent)
                    await response.write(reply.event(event))
                    sent += 1
            closing = reply.end(call.tally())
        except EngineStoppedError as stopped:
            closing = reply.failure(ApiError(500, str(stopped), kind="InternalServerError"))
        await response.write(closing)
        await response.write_eof()
        return response

    async def _embed(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await _body(request)
        self._check_admission(request)
        reply = EmbeddingReply(body, self.served, Label(self.served.model))
        fault = self._fault(request)
        if fault is not None:
            await fault.before_answer(request, is_streamed=False)
        call = self.driver.embed(reply.prompts)
        try:
            await call.events()
            return await _whole(request, reply.whole(call.tally()), fault)
        finally:
            call.close()

    def _check_admission(self, request: web.BaseRequest) -> None:
        if self.is_draining:
            # What vLLM says while it drains; its /health stays 200.
            raise ApiError(500, "cannot schedule new futures after shutdown", kind="InternalServerError")
        rank = request.headers.get("x-data-parallel-rank", "0")
        if rank != "0":
            raise refuse(
                f"data_parallel_rank {rank} is out of range: there is one rank, 0.", "data_parallel_rank"
            )

    def _fault(self, request: web.BaseRequest) -> Fault | None:
        if not self._allow_faults:
            return None
        named = request.headers.get("x-sim-fault")
        return Fault.parse(named) if named is not None else self._faults.take()

    async def _kv_read(self, request: web.BaseRequest) -> web.StreamResponse:
        assert self.connector is not None
        return _json(self.connector.read(await _body(request)))

    async def _kv_give_back(self, request: web.BaseRequest) -> web.StreamResponse:
        assert self.connector is not None
        return _json(self.connector.give_back(await _body(request)))

    async def _count_tokens(self, request: web.BaseRequest) -> web.StreamResponse:
        return _json(messages.count_tokens(await _body(request), self.served))

    def _models(self) -> web.Response:
        card = {
            "id": self.served.model,
            "object": "model",
            "created": 0,
            "owned_by": "headgate-simulator",
            "root": self.served.model,
            "parent": None,
            "max_model_len": self.served.max_model_len,
            "permission": [],
        }
        return _json({"object": "list", "data": [card]})

    async def _tokenize(self, request: web.BaseRequest) -> web.StreamResponse:
        asked = decode(_TOKENIZE, await _body(request))
        if asked.messages is not None:
            tokens = chat.prompt_of(asked.messages, asked.tools)
        elif asked.prompt is not None:
            tokens = tokenizer.encode(asked.prompt)
        else:
            raise refuse("Give either `prompt` or `messages`.", "prompt")
        strings = [tokenizer.decode([token]) for token in tokens] if asked.return_token_strs else None
        answer = {"count": len(tokens), "max_model_len": self.served.max_model_len, "tokens": tokens}
        return _json({**answer, "token_strs": strings})

    async def _detokenize(self, request: web.BaseRequest) -> web.StreamResponse:
        tokens = decode(_DETOKENIZE, await _body(request)).tokens
        if any(not 0 <= token <= tokenizer.MAX_TOKEN for token in tokens):
            raise refuse(f"A token id must be between 0 and {tokenizer.MAX_TOKEN}.", "tokens")
        return _json({"prompt": tokenizer.decode(tokens)})

    def _metrics(self) -> web.Response:
        headers = {"content-type": "text/plain; version=1.0.0; charset=utf-8"}
        if self._condition.metrics == "gone":
            raise ApiError(404, "Not Found")
        is_stale = self._condition.metrics == "stale"
        return web.Response(body=self._stale_metrics if is_stale else self.metrics.render(), headers=headers)

    async def _set_fault(self, request: web.BaseRequest) -> web.StreamResponse:
        asked = decode(_FAULT, await _body(request))
        self._faults.set(Fault.parse(asked.fault) if asked.fault is not None else None, asked.count)
        return _json({"fault": asked.fault, "count": asked.count})

    async def _set_condition(self, request: web.BaseRequest) -> web.StreamResponse:
        condition = decode(_CONDITION, await _body(request))
        if condition.forget:
            self.engine.pool.clear()
        if condition.metrics == "stale" and self._condition.metrics != "stale":
            self._stale_metrics = self.metrics.render()
        self.driver.slowness = condition.slowness
        self._condition = condition
        return _json(msgspec.to_builtins(condition))

    async def stop(self, drain_s: float) -> None:
        """Finish what is under way for up to `drain_s`, then break off the rest with vLLM's in-band error."""
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self.driver.idle()
        self.driver.fail_all(_DEAD)
        if self.connector is not None:
            await self.connector.close()


def _request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: RequestHandler,
    writer: AbstractStreamWriter,
    task: "asyncio.Task[None]",
) -> web.BaseRequest:
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=MAX_BODY_BYTES)


async def _body(request: web.BaseRequest) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise ApiError(413, f"The request body is larger than {MAX_BODY_BYTES} bytes.") from error


async def _stopped(request: web.BaseRequest, reply: Reply, stopped: EngineStoppedError) -> web.StreamResponse:
    """A stream that failed before its first token."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    await response.write(reply.failure(ApiError(500, str(stopped), kind="InternalServerError")))
    await response.write_eof()
    return response


async def _whole(request: web.BaseRequest, answer: dict[str, Any], fault: Fault | None) -> web.StreamResponse:
    if fault is None:
        return _json(answer)
    body = encoded(answer)
    response = web.StreamResponse(
        headers={"content-type": "application/json", "content-length": str(len(body))}
    )
    await response.prepare(request)
    half = len(body) // 2
    await fault.deliver(request, [body[:half], body[half:]], response.write)
    await response.write_eof()
    return response


def _json(answer: Any, status: int = 200) -> web.Response:
    return web.Response(body=encoded(answer), status=status, content_type="application/json")

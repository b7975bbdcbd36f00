"""An upstream's answer on its way to the client: bytes through, untouched.

A streamed answer is pushed from the upstream's protocol straight to the client's transport; a tap keeps what
may carry usage. Any other answer is read whole first, so that its cost can be told in a header. An answer
that broke off never looks complete: an error in band, then a body without its end.
"""

import asyncio
import time
from functools import lru_cache
from typing import Final

from backends.dialect import RAW
from backends.errors import ErrorKind, UpstreamError
from backends.tap import Tap
from backends.transport import Reply
from backends.usage_readers import read_usage
from gateway.errors import CAUSES, Headers, answer_headers, stream_event
from gateway.inbound import Refusal, Request
from gateway.ingress import decode_body
from gateway.limit_headers import PREFIXES, limit_headers
from policies.exchange import Exchange

# What of an upstream's headers a client may see. Account selectors (openai-organization), cookies, addresses and
# framing stay here.
_PASSED: Final = frozenset(
    {
        b"content-type",
        b"content-encoding",
        b"content-disposition",
        b"retry-after",
        b"retry-after-ms",
        b"x-should-retry",
        b"openai-processing-ms",
        b"openai-version",
    }
)


def relayed_headers(exchange: Exchange, reply: Reply) -> Headers:
    """The upstream's headers that pass, then ours."""
    theirs = reply.headers
    if exchange.taken and (limits := limit_headers(exchange)):
        headers = [(name, theirs[name]) for name in _passed(tuple(theirs), ())]
        headers += limits
    else:
        headers = [(name, theirs[name]) for name in _passed(tuple(theirs), PREFIXES)]
    headers += answer_headers(exchange.dialect.family, exchange.request_id)
    candidate, model = exchange.candidate, exchange.model
    headers += _told(
        candidate.endpoint.name if candidate is not None else "",
        exchange.model_name if model is None else model.name,
        exchange.session_state,
        exchange.attempts,
    )
    if exchange.prefilled_by:
        headers.append((b"x-headgate-prefill", exchange.prefilled_by.encode()))
    if exchange.session_state == "moved":
        headers.append((b"x-headgate-session-reason", exchange.place_reason.encode()))
    return headers


@lru_cache(maxsize=512)
def _told(target: str, model: str, session_state: str, attempts: int) -> Headers:
    """Where it went: the same few answers over and over. Not to be changed."""
    told = [
        (b"x-headgate-model", model.encode()),
        (b"x-headgate-session", session_state.encode()),
        (b"x-headgate-attempts", b"%d" % attempts),
    ]
    return [(b"x-headgate-target", target.encode()), *told] if target else told


@lru_cache(maxsize=512)
def _passed(names: tuple[bytes, ...], prefixes: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Which of an upstream's headers pass, those that tell its limits by these prefixes.

    Its limits are those of the operator's account: where ours say what this caller has left, they would mislead.
    """
    return tuple(name for name in names if name in _PASSED or name.startswith(prefixes))


def is_stream(reply: Reply) -> bool:
    return reply.status < 300 and reply.is_event_stream


def take_whole(exchange: Exchange, reply: Reply, limit_bytes: int) -> bytes | None:
    """What `read_whole` returns, if nothing has to be awaited for it: the answer is short, here, and in no coding."""
    if b"content-encoding" in reply.headers:
        return None
    body = reply.take_whole(limit_bytes)
    if body is not None:
        exchange.ready_at = exchange.first_byte_at
        _take_usage(exchange, reply.status, body)
    return body


async def read_whole(exchange: Exchange, reply: Reply, limit_bytes: int) -> bytes:
    """The whole body, and the usage in it. UpstreamError if it can be no answer to what was asked."""
    body = await reply.read(limit_bytes)
    exchange.ready_at = time.perf_counter()
    plain: bytes | None = body
    if reply.status == 200 and exchange.dialect.is_billed:
        plain = await _decoded(exchange, reply, body, limit_bytes)
    if plain is not None:
        _take_usage(exchange, reply.status, plain)
    return body


async def _decoded(exchange: Exchange, reply: Reply, body: bytes, limit_bytes: int) -> bytes | None:
    """Without its content coding; None: it is the client's to undo, and not for us to read."""
    encoding = reply.headers.get(b"content-encoding")
    if encoding is None:
        return body
    try:
        return await decode_body(body, encoding, limit_bytes)
    except Refusal as refusal:  # in words for a client's body
        if exchange.dialect is RAW:
            return None
        kind: ErrorKind = "too_large" if refusal.status == 413 else "unusable"
        raise UpstreamError(kind, "it used a content coding nobody asked for, and badly") from refusal


def _take_usage(exchange: Exchange, status: int, body: bytes) -> None:
    dialect = exchange.dialect
    if status != 200:
        if status < 400 and dialect is not RAW:
            raise UpstreamError(
                "unusable", f"it answered with status {status}, which answers nothing; is its base_url right?"
            )
        return
    if not dialect.is_billed:
        return
    reading = read_usage(dialect, body)
    if reading is not None:
        exchange.usage = reading.usage
        exchange.served_model = reading.model
        exchange.service_tier = reading.service_tier
        exchange.answer_id = reading.answer_id
    elif dialect is not RAW:
        raise UpstreamError("unusable", "its answer is not a JSON object; is its base_url right?")


def is_foreign_error(exchange: Exchange, reply: Reply, body: bytes) -> bool:
    """Whether an SDK could not read this error: a proxy's page, a word, nothing. Gemini's are lists."""
    return (
        exchange.dialect is not RAW
        and reply.header(b"content-encoding") is None
        and body.lstrip()[:1] not in (b"{", b"[")
    )


class StreamRelay:
    """One streamed answer: the sink of an upstream's reply. No task and no future per chunk."""

    __slots__ = ("_done", "_exchange", "_last", "_reply", "_request", "error", "tap")

    def __init__(self, request: Request, exchange: Exchange, reply: Reply, *, strips_usage: bool) -> None:
        self._request = request
        self._exchange = exchange
        self._reply = reply
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last = b""
        self.tap = Tap(exchange.dialect, strips_usage=strips_usage)
        self.error: UpstreamError | None = None

    async def run(self) -> None:
        """Until the upstream's body ends, well or not. Cancelled when the client goes.

        UpstreamError before anything was relayed: the stream is compressed, so nobody could say what it costs.
        """
        if self._exchange.dialect is not RAW and self._reply.header(b"content-encoding") not in (
            None,
            b"identity",
        ):
            raise UpstreamError("unusable", "it compressed its stream, which it was asked not to")
        self._request.start(self._reply.status, relayed_headers(self._exchange, self._reply))
        self._request.on_backpressure(self._reply.pause, self._reply.resume)
        self._reply.relay(self)
        await self._done

    def on_body(self, data: bytes) -> None:
        exchange = self._exchange
        if not exchange.relayed_at:
            exchange.ready_at = time.perf_counter()
            data = self.tap.feed(data)
            if data:
                self._last = data
                self._request.write(data)
                exchange.relayed_at = time.perf_counter()
            return
        data = self.tap.feed(data)
        if data:
            self._last = data
            self._request.write(data)

    def on_end(self, error: UpstreamError | None) -> None:
        self.error = error
        if not self._done.done():
            self._done.set_result(None)

    def finish(self) -> bool:
        """Ends the client's body as the upstream's ended. False if the answer is not whole."""
        rest = self.tap.flush()
        if rest:
            self._last = rest
            self._request.write(rest)
        tap = self.tap
        # What the last event of a raw stream is, only its framing can tell.
        is_at_end = tap.is_complete or self._exchange.dialect is RAW
        if self.error is None and tap.error is None and is_at_end:
            self._request.finish()
            return True
        if tap.error is not None and self.error is None:
            # The upstream told the client itself, in its own words; the framing was whole.
            self._request.finish()
            return False
        kind = self.error.kind if self.error is not None else "incomplete"
        message = f"the answer is not whole: {CAUSES[kind]}"
        self.break_off(f"upstream_{kind}", message)
        return False

    def break_off(self, code: str, message: str) -> None:
        """An error in band, where one can be read, and a body without its end."""
        if not self._last or self._last.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")):
            exchange = self._exchange
            self._request.write(stream_event(exchange.dialect.name, code, message, exchange.request_id))
        self._request.abort()

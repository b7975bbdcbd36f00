"""The answer to a native request, put into Cloudflare's envelope on its way out (`gateway.request.Translation`)."""

from collections.abc import Sequence

from msgspec import Raw

from gateway.workers_ai.answers import NativeStream, UnreadableAnswerError, result_of
from gateway.workers_ai.envelope import INTERNAL, encode, failed, succeeded
from gateway.workers_ai.forms import Form

Headers = Sequence[tuple[bytes, bytes]]

_CODED = b"content-encoding"


class NativeAnswer:
    """`form` None: what is answered is the result already."""

    def __init__(self) -> None:
        self.form: Form | None = None
        self._stream: NativeStream | None = None

    def whole(self, status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
        if status >= 400:
            status, body = failed(status, body)
        elif self.form is None:
            return status, headers, body
        elif status == 202:
            body = succeeded(Raw(body))  # there was no room, and it became a job
        else:
            try:
                body = succeeded(result_of(self.form, body))  # compressed, it cannot be read either
            except UnreadableAnswerError:
                status, body = 502, _UNREADABLE
        kept = [(name, value) for name, value in headers if name not in {b"content-type", _CODED}]
        return status, [*kept, (b"content-type", b"application/json")], body

    def begin(self, status: int, headers: Headers) -> Headers:
        del status
        if self.form is not None:
            self._stream = NativeStream(self.form)
        return headers

    def piece(self, data: bytes) -> bytes:
        return data if self._stream is None else self._stream.feed(data)

    def rest(self) -> bytes:
        return b"" if self._stream is None else self._stream.end()


_UNREADABLE = encode(
    {
        "result": None,
        "success": False,
        "errors": [
            {"code": INTERNAL, "message": "the model's upstream answered in a form that is not its API's"}
        ],
        "messages": [],
    }
)

"""A request's body: decompressed under a cap, and read no further than the fields that decide where it goes.

Owns what is said about a body that cannot be accepted. Knows no models and no callers; messages, tools and
whatever else the body holds stay bytes.

Invariant: what was read here is what every upstream will read. A body that two JSON parsers could understand
differently (duplicate fields, another case of a routed name, malformed UTF-8) is refused.
"""

import asyncio
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Raw

from backends.json_object import JsonObject, read_object
from gateway.http_rules import Refusal

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# Up to so much is decompressed on the loop (a millisecond or two), the rest in a thread.
_INLINE_RAW_BYTES: Final = 64 * 1024
_INLINE_BYTES: Final = 256 * 1024
_SLICE_BYTES: Final = 16 * 1024  # of input: what follows a member is copied by zlib
_PIECE_BYTES: Final = 64 * 1024  # of output
_MAX_MEMBERS: Final = 1000  # gzip members or zstd frames
_WINDOW_LOG: Final = 23  # 8 MiB, the most a zstd content coding may ask for (RFC 9659)
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="decompress")

# A larger body must have all but so much in the fields known to be large: each top-level field costs memory.
_LARGE_BODY_BYTES: Final = 1280 * 1024
_MAX_FIELDS: Final = 1000  # at the top level
_UTF8_WINDOW_BYTES: Final = 32 * 1024
_MAX_INT: Final = 2**31 - 1


async def decode_body(raw: bytes, encoding: bytes | None, limit_bytes: int) -> bytes:
    """The body without its content coding. Refusal: 415 unknown coding, 413 over the limit, 400 corrupt."""
    coding = (encoding or b"identity").strip().lower()
    if coding == b"identity":
        if len(raw) > limit_bytes:
            raise _too_large(limit_bytes)
        return raw
    decoder = _DECODERS.get(coding)
    if decoder is None:
        raise Refusal(
            415, "unsupported_encoding", "`Content-Encoding` must be one of gzip, deflate, zstd, or left out"
        )
    expansion = _Expansion(decoder(raw), limit_bytes)
    try:
        body = expansion.run(_INLINE_BYTES) if len(raw) <= _INLINE_RAW_BYTES else None
        if body is None:
            loop = asyncio.get_running_loop()
            body = await loop.run_in_executor(_threads, expansion.run, sys.maxsize)
            assert body is not None
    except (zlib.error, zstd.ZstdError, _CorruptError) as error:
        raise Refusal(
            400, "invalid_encoding", f"the body is not what `Content-Encoding: {coding.decode()}` promises"
        ) from error
    return body


class _CorruptError(Exception):
    pass


class _Expansion:
    """A decompression under way; may be taken up again on another thread."""

    def __init__(self, pieces: Iterator[bytes], limit_bytes: int) -> None:
        self._pieces = pieces
        self._limit_bytes = limit_bytes
        self._parts: list[bytes] = []
        self._size_bytes = 0

    def run(self, until_bytes: int) -> bytes | None:
        """The whole body; None when it is larger than `until_bytes`."""
        for piece in self._pieces:
            self._parts.append(piece)
            self._size_bytes += len(piece)
            if self._size_bytes > self._limit_bytes:
                self._parts.clear()
                raise _too_large(self._limit_bytes)
            if self._size_bytes > until_bytes:
                return None
        return b"".join(self._parts)


def _too_large(limit_bytes: int) -> Refusal:
    return Refusal(413, "body_too_large", f"the request body may take {limit_bytes} bytes, decompressed")


def _gunzip(raw: bytes) -> Iterator[bytes]:
    return _inflate(raw, 31)


def _undeflate(raw: bytes) -> Iterator[bytes]:
    # `deflate` means zlib's format (RFC 9110 section 8.4.1.2), but some send the bare stream.
    is_zlib = len(raw) >= 2 and raw[0] & 0x0F == 8 and (raw[0] << 8 | raw[1]) % 31 == 0
    return _inflate(raw, 15 if is_zlib else -15)


def _inflate(raw: bytes, window_bits: int) -> Iterator[bytes]:
    decoder = zlib.decompressobj(window_bits)
    members = 1
    for start in range(0, len(raw), _SLICE_BYTES):
        data = raw[start : start + _SLICE_BYTES]
        while data:
            if decoder.eof:
                members += 1
                if window_bits != 31 or members > _MAX_MEMBERS:
                    raise _CorruptError("more after the end")
                decoder = zlib.decompressobj(window_bits)
            yield decoder.decompress(data, _PIECE_BYTES)
            data = decoder.unconsumed_tail or decoder.unused_data
    while not decoder.eof:
        piece = decoder.decompress(b"", _PIECE_BYTES)
        if not piece:
            raise _CorruptError("ends too early")
        yield piece


def _unzstd(raw: bytes) -> Iterator[bytes]:
    decoder = _zstd_decoder()
    frames = 1
    for start in range(0, len(raw), _SLICE_BYTES):
        data = raw[start : start + _SLICE_BYTES]
        while data or not decoder.needs_input:
            if decoder.eof:
                frames += 1
                if frames > _MAX_MEMBERS:
                    raise _CorruptError("too many frames")
                decoder = _zstd_decoder()
            yield decoder.decompress(data, _PIECE_BYTES)
            data = decoder.unused_data if decoder.eof else b""
            if decoder.eof and not data:
                break
    if not decoder.eof:
        raise _CorruptError("ends too early")


def _zstd_decoder() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})


_DECODERS: Final[dict[bytes, Callable[[bytes], Iterator[bytes]]]] = {
    b"gzip": _gunzip,
    b"x-gzip": _gunzip,
    b"deflate": _undeflate,
    b"zstd": _unzstd,
}


@lru_cache(maxsize=64)
def check_content_type(value: bytes | None) -> None:
    """Refuses (415) what is declared to be anything but JSON in UTF-8; nothing declared is taken for JSON."""
    if value is None:
        return
    kind, *parameters = [part.strip() for part in value.lower().split(b";")]
    if kind not in (b"application/json", b"text/json") and not kind.endswith(b"+json"):
        raise Refusal(
            415,
            "unsupported_media_type",
            "the body must be JSON: send it with `Content-Type: application/json`",
        )
    for parameter in parameters:
        name, _, setting = parameter.partition(b"=")
        if name.strip() == b"charset" and setting.strip(b' "') not in (b"utf-8", b"utf8", b"us-ascii"):
            raise Refusal(415, "unsupported_charset", "JSON is sent in UTF-8: leave out `charset`")


class Fields(msgspec.Struct):
    """The routed fields of a body. Text that was not given is empty."""

    document: JsonObject
    model: str
    stream: bool = False
    max_tokens: int | None = None  # the largest of the three fields that say it
    prompt_cache_key: str = ""
    choices: int = 1  # how many answers (`n`)
    previous_response_id: str = ""


def _reader(kind: Any) -> Callable[[Raw], Any]:
    return msgspec.json.Decoder(kind).decode


_text = _reader(str | None), "a string"
_count = _reader(Annotated[int, Meta(ge=0, le=_MAX_INT)] | None), f"an integer from 0 to {_MAX_INT}"
_READERS: Final[dict[str, tuple[Callable[[Raw], Any], str]]] = {
    "model": (_reader(Annotated[str, Meta(min_length=1, max_length=512)]), "a string of 1 to 512 characters"),
    "stream": (_reader(bool | None), "a boolean"),
    "max_tokens": _count,
    "max_completion_tokens": _count,
    "max_output_tokens": _count,
    "n": _count,
    "prompt_cache_key": _text,
    "user": _text,
    "service_tier": _text,
    "previous_response_id": _text,
    "stream_options": (_reader(dict[str, Raw] | None), "an object"),
}


_Plan = tuple[tuple[str, Callable[[Raw], Any], str], ...]
_MAX_PLANS: Final = 512
# Clients send the same few sets of fields over and over: what is to be read of each set, in order.
_plans: dict[tuple[str, ...], _Plan] = {}


def read_fields(body: bytes) -> Fields:
    """The routed fields of a JSON object. Refusal (400) with a sentence for anything that is not acceptable."""
    document = _read_object(body)
    values = document.values
    found: dict[str, Any] = {}
    keys = tuple(values)
    for key, read, wanted in _plans.get(keys) or _plan(keys):
        try:
            found[key] = read(values[key])
        except (ValueError, OverflowError) as error:
            raise _invalid(f"`{key}` must be {wanted}", key) from error
    model = found.get("model")
    if model is None:
        raise _invalid("`model` is missing", "model")
    if not model.isprintable():
        raise _invalid("`model` must not contain control characters", "model")
    if len(found) == 1:
        return Fields(document, model)
    counts = [found[name] for name in _COUNTS if found.get(name) is not None]
    return Fields(
        document,
        model,
        found.get("stream") or False,
        max(counts) if counts else None,
        found.get("prompt_cache_key") or "",
        found.get("n") or 1,
        found.get("previous_response_id") or "",
    )


def _plan(keys: tuple[str, ...]) -> _Plan:
    """How to read a body with these keys. Refusal when one of them could be taken for a routed one."""
    for key in keys:
        if key not in _READERS and (meant := _routed_name(key[:64])) is not None:
            raise _invalid(f"{key[:64]!r} is no field, but some servers would read it as `{meant}`", meant)
    plan = tuple((key, *_READERS[key]) for key in keys if key in _READERS)
    if len(keys) <= 40 and max(map(len, keys), default=0) <= 40:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        _plans[keys] = plan
    return plan


_COUNTS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def _invalid(message: str, param: str | None = None) -> Refusal:
    return Refusal(400, "invalid_field" if param else "invalid_json", message, param)


def _routed_name(key: str) -> str | None:
    """The routed field that a lenient parser takes this key for: Go's ignores case, C's stop at a NUL."""
    name = key.partition("\0")[0].strip().casefold()
    return name if name in _READERS else None


def _read_object(body: bytes) -> JsonObject:
    try:
        if len(body) > _LARGE_BODY_BYTES:
            _check_small_fields(body)
        document = read_object(body)
        if not body.isascii():
            _check_utf8(body)
    except UnicodeDecodeError as error:
        raise _invalid("the request body is not valid UTF-8") from error
    except RecursionError as error:
        raise _invalid("the request body nests too deeply") from error
    except msgspec.DecodeError as error:
        raise _invalid(_explain(body, error)) from error
    except ValueError as error:
        raise _invalid(f"the request body is ambiguous: {error}") from error
    if len(document.values) > _MAX_FIELDS:
        raise _invalid(f"the request body may have {_MAX_FIELDS} fields")
    return document


def _explain(body: bytes, error: msgspec.DecodeError) -> str:
    if not body.strip():
        return "the request body is empty: send a JSON object"
    if body.startswith(b"\xef\xbb\xbf"):
        return "the request body begins with a byte order mark: send it without"
    if isinstance(error, msgspec.ValidationError):
        return f"the request body must be a JSON object: {str(error).lower()}"
    detail = str(error).removeprefix("JSON is malformed: ")
    if detail == "Input data was truncated":
        detail = "it ends too early, or an escaped surrogate has no partner"
    return f"the request body is not valid JSON: {detail}"


class _LargeFields(msgspec.Struct):
    """What may be large at the top level of a body, in any dialect."""

    messages: Raw = Raw()
    input: Raw = Raw()
    prompt: Raw = Raw()
    tools: Raw = Raw()
    system: Raw = Raw()
    instructions: Raw = Raw()
    documents: Raw = Raw()
    requests: Raw = Raw()
    response_format: Raw = Raw()


_read_large_fields = msgspec.json.Decoder(_LargeFields).decode


def _check_small_fields(body: bytes) -> None:
    """Keeps a body made of millions of tiny fields from becoming millions of objects, at the price of a second look.

    The decoder would build them all before it could be told to stop: 1.4 s and 200 MB for 32 MiB.
    """
    large_bytes = sum(map(len, msgspec.structs.astuple(_read_large_fields(body))))
    if len(body) - large_bytes > _LARGE_BODY_BYTES:
        names = ", ".join(f"`{name}`" for name in _LargeFields.__struct_fields__)
        raise _invalid(f"all fields but {names} may take {_LARGE_BODY_BYTES} bytes together")


def _check_utf8(body: bytes) -> None:
    """UnicodeDecodeError if it is not; the decoder does not look inside the strings it skips.

    Window by window: most bodies are ASCII but for a few characters, and decoding all of a body at once makes
    Python widen all of it for the sake of one emoji.
    """
    start = 0
    while start < len(body):
        end = start + _UTF8_WINDOW_BYTES
        for _ in range(3):
            if body[end : end + 1] and body[end] & 0xC0 == 0x80:
                end += 1  # not between the bytes of a character
        window = body[start:end]
        if not window.isascii():
            window.decode()
        start = end

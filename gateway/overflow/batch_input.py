"""The input file of a batch: lines of JSON that become requests, or reasons why they cannot.

Works through the file as it comes, whatever its size: in memory are one line, a digest of each `custom_id` and the first
few errors. Errors are what OpenAI's batch object lists under `errors.data`. Knows no files and no queue; blocks while it
computes, so it runs on a thread.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Raw, field

from gateway.http_rules import Refusal
from gateway.ingress import read_fields

MOST_ERRORS: Final = 100
_MAX_CUSTOM_ID: Final = 512
_DIGEST_BYTES: Final = 12


class InputLine(NamedTuple):
    """One request of a batch. `number` counts from 1, as an editor does."""

    number: int
    custom_id: str
    body: bytes


class LineError(msgspec.Struct, frozen=True):
    """Why a batch cannot be carried out. `line` None: it is about the file as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class ChangedFileError(Exception):
    """A file is not what it was when it was checked."""


class _Line(msgspec.Struct):
    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: Raw = field(default_factory=Raw)


_decode = msgspec.json.Decoder(_Line).decode


def split_lines(frames: Iterable[bytes], line_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Lines that are not blank, with their numbers; None in place of one that is longer than `line_bytes`."""
    number = 0
    held: list[bytes] = []
    held_bytes = 0
    for frame in frames:
        pieces = frame.split(b"\n")
        for piece in pieces[:-1]:
            number += 1
            is_long = held_bytes + len(piece) > line_bytes
            line = None if is_long else b"".join((*held, piece))
            held, held_bytes = [], 0
            if line is None or line.strip():
                yield number, line
        held_bytes += len(pieces[-1])
        if held_bytes > line_bytes:
            held = []
        elif pieces[-1]:
            held.append(pieces[-1])
    if held_bytes > line_bytes:
        yield number + 1, None
    elif (line := b"".join(held)).strip():
        yield number + 1, line


class BatchInput:
    """The rules for one batch's file. `endpoint` is what every line must name as its `url`."""

    def __init__(self, endpoint: str, *, most_lines: int, line_bytes: int) -> None:
        self.errors: list[LineError] = []
        self.model = ""
        self.lines = 0
        self._endpoint = endpoint
        self._most_lines = most_lines
        self._line_bytes = line_bytes
        self._custom_ids: set[bytes] = set()

    def check(self, frames: Iterable[bytes]) -> None:
        """Reads all of the file: `errors`, `lines` and `model` say what it is."""
        for number, line in split_lines(frames, self._line_bytes):
            self.lines += 1
            if self.lines > self._most_lines:
                message = f"the file has more than {self._most_lines} requests: split it into several batches"
                self.errors.append(LineError("too_many_tasks", message))
                return
            read = self._read(number, line)
            error = read if isinstance(read, LineError) else self._compare(read)
            if error is not None:
                self.errors.append(error)
                if len(self.errors) >= MOST_ERRORS:
                    return
        if not self.lines:
            self.errors.append(LineError("empty_file", "the file has no requests"))

    def requests(self, frames: Iterable[bytes], skip: int) -> Iterator[InputLine]:
        """The requests of a file that was found good, without the first `skip`. ChangedFileError if it is not."""
        for position, (number, line) in enumerate(split_lines(frames, self._line_bytes)):
            if position < skip:
                continue
            read = self._read(number, line)
            if isinstance(read, LineError):
                raise ChangedFileError(read.message)
            yield read

    def _read(self, number: int, line: bytes | None) -> InputLine | LineError:
        def bad(code: str, message: str, param: str | None = None) -> LineError:
            return LineError(code, message, param, number)

        if line is None:
            return bad("line_too_long", f"a line may take {self._line_bytes} bytes")
        try:
            found = _decode(line)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return bad("invalid_json_line", "This line is not parseable as valid JSON.")
        custom_id = found.custom_id
        if not isinstance(custom_id, str) or not custom_id:
            return bad(
                "missing_required_parameter", "`custom_id` must be a string that is not empty", "custom_id"
            )
        if len(custom_id) > _MAX_CUSTOM_ID:
            return bad("invalid_request", f"`custom_id` may have {_MAX_CUSTOM_ID} characters", "custom_id")
        if found.method != "POST":
            return bad("invalid_method", "`method` must be `POST`", "method")
        if found.url != self._endpoint:
            return bad("url_mismatch", f"`url` must be the batch's endpoint, `{self._endpoint}`", "url")
        return InputLine(number, custom_id, bytes(found.body))

    def _compare(self, line: InputLine) -> LineError | None:
        """With the other lines, and with what an ordinary request may be."""
        digest = hashlib.blake2b(
            line.custom_id.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES
        ).digest()
        if digest in self._custom_ids:
            message = f"`{line.custom_id[:64]}` is the `custom_id` of an earlier line: each needs its own"
            return LineError("duplicate_custom_id", message, "custom_id", line.number)
        self._custom_ids.add(digest)
        if not line.body.startswith(b"{"):
            message = "`body` must be the JSON object that would be posted"
            return LineError("missing_required_parameter", message, "body", line.number)
        try:
            fields = read_fields(line.body)
        except Refusal as refusal:
            param = f"body.{refusal.param}" if refusal.param else "body"
            return LineError("invalid_request", refusal.message, param, line.number)
        if fields.stream:
            message = "`stream` must be false or left out: a batch's answers are in its files"
            return LineError("invalid_request", message, "body.stream", line.number)
        if not self.model:
            self.model = fields.model
        if fields.model != self.model:
            message = f"`{fields.model[:64]}` is another model than `{self.model[:64]}` of the first line"
            return LineError("model_mismatch", message, "body.model", line.number)
        return None

"""What a simulated sequence says, token by token.

Owns the words: a statement that this is a simulator and then plain words chosen by a seed, or a JSON value that fits
a schema, or a tool call. A pure function of (seed, model, prompt token ids, sampling seed, choice): nothing here
depends on time, load or the cache. Knows no dialect.
"""

import hashlib
import itertools
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from local_engine.simulator import tokenizer

STATEMENT: Final = (
    "This is the Headgate engine simulator: no model runs here, and what follows means nothing."
)
_WORDS: Final = (  # noqa: SIM905 - words read best as words
    "water gate river field stone light paper north south early later small great green white under above every other"
    " table house plant grass cloud wheel canal mill barn clay reed moss fish boat rope lamp door wall path hill lake"
    " rain snow wind dawn dusk noon week year hour long deep wide calm slow open keep turn hold lift pour flow rest"
).split()
_SHORTEST_TOKENS: Final = 24
_LONGEST_TOKENS: Final = 96


class Piece(NamedTuple):
    """One token and what it adds to the answer: text, the start of tool call number `call`, or its arguments."""

    token: int
    text: str
    kind: Literal["text", "call", "arguments"] = "text"
    call: int = 0


@dataclass(frozen=True, slots=True)
class Words:
    """Plain text that ends by itself after a while, or never."""

    min_tokens: int = 0
    never_ends: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """Exactly this text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str  # JSON


Saying = Words | Text | ToolCall


def sampling_seed(seed: int, model: str, prompt: Sequence[int], sampling: int | None, choice: int) -> int:
    """The number all of one choice's words follow from."""
    digest = hashlib.sha256(repr((seed, model, sampling, choice)).encode())
    digest.update(array("Q", prompt).tobytes())
    return int.from_bytes(digest.digest()[:8])


class Speech:
    """A saying being said: the engine's script. `latest` is the piece of the token taken last."""

    __slots__ = ("_next", "_pieces", "latest", "stop_reason", "stops")

    def __init__(self, saying: Saying, seed: int, stops: tuple[str, ...] = ()) -> None:
        """`stops` end the text where the first of them would begin; it is not said."""
        self.stops = stops
        self.stop_reason: str | None = None
        pieces = _pieces(saying, seed)
        self._pieces = self._until_stop(pieces) if stops else pieces
        self._next: Piece | None = next(self._pieces)
        self.latest: Piece

    def next_token(self) -> tuple[int, bool]:
        if self._next is None:
            raise RuntimeError("a finished speech was asked for more")
        self.latest = self._next
        self._next = next(self._pieces, None)
        return self.latest.token, self._next is None

    def _until_stop(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Looks as far ahead as the longest stop, so that nothing is said that a stop would take back."""
        longest = max(map(len, self.stops))
        for head, group in itertools.groupby(pieces, key=lambda piece: (piece.kind == "text", piece.call)):
            if not head[0]:
                yield from group
                continue
            window: list[Piece] = []
            for piece in group:
                window.append(piece)
                if sum(len(each.text) for each in window[1:]) < longest:
                    continue
                yield self._cut(window)
                if self.stop_reason is not None:
                    return
                del window[0]
            while window:
                yield self._cut(window)
                if self.stop_reason is not None:
                    return
                del window[0]

    def _cut(self, window: list[Piece]) -> Piece:
        """The first piece of the window, cut where a stop begins in it."""
        ahead = "".join(piece.text for piece in window)
        first = window[0]
        found = [(ahead.find(stop), stop) for stop in self.stops if stop in ahead]
        at, stop = min(found, default=(len(ahead), ""))
        # An empty piece cannot hold a beginning; the next one has it.
        if at >= len(first.text):
            return first
        self.stop_reason = stop
        return first._replace(text=first.text[:at])


def _pieces(saying: Saying, seed: int) -> Iterator[Piece]:
    match saying:
        case Words():
            return _words(saying, random.Random(seed))  # noqa: S311 - no secret depends on it
        case Text(text):
            return iter([Piece(token, part) for token, part in tokenizer.split(text)] or [_END])
        case ToolCall(name, arguments):
            return _call(name, arguments)


# The token of an answer that says nothing: even that takes one.
_END: Final = Piece(tokenizer.TURN_END, "")


def _words(saying: Words, chance: random.Random) -> Iterator[Piece]:
    wanted = max(saying.min_tokens, chance.randint(_SHORTEST_TOKENS, _LONGEST_TOKENS))
    said = 0
    for sentence in itertools.chain((STATEMENT,), _sentences(chance)):
        for token, text in tokenizer.split(sentence):
            yield Piece(token, text)
            said += 1
        if said >= wanted and not saying.never_ends:
            return


def _sentences(chance: random.Random) -> Iterator[str]:
    while True:
        words = chance.choices(_WORDS, k=chance.randint(4, 9))
        yield " " + " ".join(words).capitalize() + "."


def _call(name: str, arguments: str) -> Iterator[Piece]:
    first, *others = tokenizer.encode(name) or [tokenizer.TURN_END]
    yield Piece(first, name, "call")
    for token in others:
        yield Piece(token, "", "arguments")
    for token, text in tokenizer.split(arguments):
        yield Piece(token, text, "arguments")

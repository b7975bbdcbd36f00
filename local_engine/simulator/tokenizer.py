"""Text to token ids and back, with no vocabulary to download.

A token is a piece of at most six bytes: up to five letters or digits with the space before them, up to three
punctuation marks, a run of white space, or one non-ASCII character; English comes to about four characters a token.
Its id is the piece itself, read as a number with a leading 1 (so below 2**49, exact in JavaScript too), which makes
encoding stateless and exactly reversible. Ids below 256 are never pieces: the chat template uses three of them.
"""

import re
from collections.abc import Iterable
from typing import Final

TURN_START: Final = 1
TURN_END: Final = 2
ROLE_END: Final = 3
SPECIAL: Final = {TURN_START: b"<|start|>", TURN_END: b"<|end|>", ROLE_END: b"<|message|>"}
MAX_TOKEN: Final = (1 << 53) - 1

_PIECE: Final = re.compile(
    rb" ?[A-Za-z0-9_]{1,5}"
    rb"| ?[!-/:-@\[-^`{-~]{1,3}"
    rb"|\s{1,6}"
    rb"|[\xc2-\xf4][\x80-\xbf]{1,3}"
    rb"|.",
    re.DOTALL,
)


def encode(text: str) -> list[int]:
    """Lone surrogates become `?`; anything else survives `decode`."""
    return [int.from_bytes(b"\x01" + piece) for piece in _PIECE.findall(text.encode(errors="replace"))]


def split(text: str) -> list[tuple[int, str]]:
    """Each token with the text it stands for. No character is split between two tokens."""
    pieces = _PIECE.findall(text.encode(errors="replace"))
    return [(int.from_bytes(b"\x01" + piece), piece.decode(errors="replace")) for piece in pieces]


def decode(tokens: Iterable[int]) -> str:
    """Ids that `encode` cannot produce (another tokenizer's) come out as `<|id|>`."""
    return b"".join(map(_bytes, tokens)).decode(errors="replace")


def _bytes(token: int) -> bytes:
    if token in SPECIAL:
        return SPECIAL[token]
    raw = token.to_bytes((token.bit_length() + 7) // 8)
    if len(raw) > 1 and raw[0] == 1:
        return raw[1:]
    return b"<|%d|>" % token

"""Prompts in tokens, remembered by conversation, so that a further turn costs only what it adds.

A conversation is the hashes of its messages, each chained to those before it; what is remembered of a beginning is its
`Chain` of blocks. Only the engine knows how it renders messages, so it is asked (`gateway.prompt_tokens`); this says
what to ask: all of the prompt, or only the messages after a beginning that is known.

Rendering only the end is right where a template renders messages one after the other. Most do. `Template` finds out:
it compares the parts with the whole a few times before it trusts them, now and then after that, and is told what the
engine counted. Memory is bounded; no clock, no I/O.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

import xxhash

from backends.kv_blocks import Chain

_hash: Final = xxhash.xxh3_64_intdigest
# Wholes that must have equalled their parts before the whole is no longer asked for.
_PROOFS: Final = 2
_CHECK_EVERY: Final = 64
# Prompts in a row that the engine counted otherwise: it renders them by other rules than it told us.
_MOST_REFUTED: Final = 3
_RETRY_AFTER: Final = 1024


def message_keys(seed: int, messages: Sequence[bytes | memoryview]) -> list[int]:
    """One for each beginning of the conversation: the first message, the first two, ... `seed` is of all before them."""
    keys = []
    for message in messages:
        seed = _hash(message, seed)
        keys.append(seed)
    return keys


class Template:
    """How one model renders one kind of conversation (its tools and options).

    `opening` are the tokens that end every prompt and begin the answer; `stub` those of a short conversation that
    stands before messages rendered without theirs. None: not asked for yet.
    """

    __slots__ = ("_checked", "_proofs", "_refuted", "_skipped", "is_joined", "opening", "stub")

    def __init__(self) -> None:
        self.opening: Sequence[int] | None = None
        self.stub: Sequence[int] | None = None
        self.is_joined = True  # whether a prompt is its messages one after the other
        self._proofs = 0
        self._checked = 0
        self._refuted = 0
        self._skipped = 0

    @property
    def is_known(self) -> bool:
        return self.opening is not None and self.stub is not None

    def learn(self, stub: Sequence[int], opened: Sequence[int]) -> None:
        """The stub's tokens without and with the opening of an answer."""
        self.stub = stub
        if list(opened[: len(stub)]) == list(stub):
            self.opening = opened[len(stub) :]
        else:
            self.opening = ()
            self.is_joined = False

    def wants_proof(self) -> bool:
        """Whether the next prompt is to be asked for whole, too."""
        if self._proofs < _PROOFS:
            return True
        self._checked += 1
        return self._checked % _CHECK_EVERY == 0

    def compared(self, *, is_same: bool) -> None:
        if is_same:
            self._proofs += 1
        else:
            self.is_joined = False

    def is_useful(self) -> bool:
        """Whether asking is worth it: the engine counts what it told us. Tries again now and then."""
        if self._refuted < _MOST_REFUTED:
            return True
        self._skipped += 1
        return self._skipped % _RETRY_AFTER == 0

    def counted(self, *, is_same: bool) -> None:
        """The engine answered, and counted the prompt's tokens."""
        if is_same:
            self._refuted = 0
        else:
            self._refuted += 1
            self._proofs = 0

    def without_opening(self, tokens: Sequence[int]) -> Sequence[int] | None:
        """The tokens of the messages alone; None if the prompt does not end as prompts do."""
        opening = self.opening
        if opening is None or not self.is_joined:
            return None
        end = len(tokens) - len(opening)
        return tokens[:end] if end >= 0 and list(tokens[end:]) == list(opening) else None


class Known(NamedTuple):
    """A request's prompt in tokens, as a pool's engines have it; `template` is to hear what they counted."""

    pool: str
    chain: Chain
    template: Template


class Conversations:
    """The chains of conversations seen last, within `capacity_bytes`; templates within `_MOST_TEMPLATES`."""

    _MOST_TEMPLATES: Final = 256

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._chains: OrderedDict[int, Chain] = OrderedDict()
        self._templates: OrderedDict[int, Template] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._chains)

    def template(self, seed: int) -> Template:
        template = self._templates.get(seed)
        if template is None:
            template = self._templates[seed] = Template()
            if len(self._templates) > self._MOST_TEMPLATES:
                self._templates.popitem(last=False)
        else:
            self._templates.move_to_end(seed)
        return template

    def longest(self, keys: Sequence[int], block_size: int) -> tuple[int, Chain | None]:
        """How many of the messages are known, and their chain."""
        for place in range(len(keys) - 1, -1, -1):
            chain = self._chains.get(keys[place])
            if chain is not None and chain.block_size == block_size:
                self._chains.move_to_end(keys[place])
                return place + 1, chain
        return 0, None

    def remember(self, key: int, chain: Chain) -> None:
        self.forget(key)
        self._chains[key] = chain
        self.size_bytes += chain.size_bytes
        while self.size_bytes > self._capacity_bytes:
            _, oldest = self._chains.popitem(last=False)
            self.size_bytes -= oldest.size_bytes

    def forget(self, key: int) -> None:
        known = self._chains.pop(key, None)
        if known is not None:
            self.size_bytes -= known.size_bytes

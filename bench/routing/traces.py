"""What is asked of a pool: conversations made from a seed, or read from a file in Mooncake's trace format.

A conversation is a list of turns, each with the wait before it, the tokens it adds and the tokens it is answered with;
its prompt is all that was said before. Content is named, not stored: every block of tokens has an identity, and so has
every beginning of a prompt. The same seed and settings give the same conversations, in whatever order they are played.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MOONCAKE_BLOCK_TOKENS = 512
BYTES_PER_TOKEN = 4
_NUMBERS = 1 << 24  # blocks of one conversation, at most


@dataclass(frozen=True, slots=True)
class Turn:
    """`wait_s` counts from the end of the answer before, or from the conversation's start."""

    wait_s: float
    added_tokens: int
    output_tokens: int


class Conversation:
    """`shared_tokens` at its beginning are the same in all conversations of `group` (a system prompt and its tools)."""

    __slots__ = (
        "at_s",
        "digests",
        "ends_s",
        "group",
        "has_session",
        "number",
        "session",
        "shared_tokens",
        "tenant",
        "turns",
    )

    def __init__(
        self, number: int, turns: Sequence[Turn], *, tenant: int = 0, group: int = 0, shared_tokens: int = 0
    ) -> None:
        self.number = number
        self.turns = turns
        self.tenant = tenant
        self.group = group
        self.shared_tokens = shared_tokens
        self.at_s = 0.0  # when it begins, where the trace says so
        self.ends_s = math.inf  # no turn begins later
        self.session = number
        self.has_session = True
        self.digests: list[int] = []

    def blocks(self, tokens: int, block_size: int) -> list[int]:
        """The identities of the first `tokens` tokens' full blocks. The list grows from call to call."""
        digests = self.digests
        count = tokens // block_size
        if len(digests) < count:
            shared = self.shared_tokens // block_size
            for index in range(len(digests), count):
                owner = -1 - self.group if index < shared else self.number
                digests.append(owner * _NUMBERS + index)
        return digests

    @property
    def recognised_by_bytes(self) -> int:
        """The end of the first user turn: so much of the prompt is what names a session that nobody named."""
        return self.turns[0].added_tokens * BYTES_PER_TOKEN

    def beginning(self, size_bytes: int) -> int:
        """The identity of the prompt's first bytes: equal in two conversations when these are."""
        owner = -1 - self.group if size_bytes <= self.shared_tokens * BYTES_PER_TOKEN else self.number
        return hash((owner, size_bytes)) & 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentTraffic:
    """Coding or research agents: a person asks, the agent calls tools in a loop, every step sends everything again.

    Medians of log-normal sizes and waits, with the spread given; means of geometric counts. The defaults are of the
    order of what agent traces show: long inputs, short outputs, a few seconds between steps.
    """

    seed: int = 1
    tenants: int = 24
    tenant_skew: float = 0.9  # Zipf's exponent: how much of the traffic the first tenants make
    shared_tokens: int = 3000  # median of a tenant's system prompt and tools
    question_tokens: int = 900
    tool_tokens: int = 500
    output_tokens: int = 110
    spread: float = 0.8
    steps_per_question: float = 6.0
    questions: float = 4.0
    tool_wait_s: float = 2.5
    human_wait_s: float = 18.0
    max_tokens: int = 60_000

    def conversation(self, number: int) -> Conversation:
        rng = random.Random(self.seed * 1_000_003 + number)
        tenant = self._tenant(rng)
        shared = max(
            64, int(self.shared_tokens * math.exp(random.Random(self.seed * 7919 + tenant).gauss(0, 0.4)))
        )
        turns, context = [], shared
        for question in range(_geometric(rng, self.questions)):
            for step in range(_geometric(rng, self.steps_per_question)):
                median, wait_s = (
                    (self.tool_tokens, self.tool_wait_s)
                    if step
                    else (self.question_tokens, self.human_wait_s)
                )
                added, output = self._size(rng, median), self._size(rng, self.output_tokens)
                context += added + output
                if context > self.max_tokens:
                    break
                is_first = not (question or step)
                wait_s = 0.0 if is_first else wait_s * math.exp(rng.gauss(0, self.spread))
                turns.append(Turn(wait_s, added + (shared if is_first else 0), output))
        return Conversation(number, turns, tenant=tenant, group=tenant, shared_tokens=shared)

    def _size(self, rng: random.Random, median: int) -> int:
        return max(8, int(median * math.exp(rng.gauss(0, self.spread))))

    def _tenant(self, rng: random.Random) -> int:
        weights = [1 / (rank + 1) ** self.tenant_skew for rank in range(self.tenants)]
        return rng.choices(range(self.tenants), weights)[0]


def _geometric(rng: random.Random, mean: float) -> int:
    """1, 2, ... with this mean."""
    return 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / mean)) if mean > 1 else 1


class _Recorded(Conversation):
    """A request of a recorded trace, whose blocks have the identities that the trace gives them."""

    __slots__ = ("_hash_ids",)

    def __init__(self, number: int, turn: Turn, hash_ids: Sequence[int]) -> None:
        super().__init__(number, [turn])
        self._hash_ids = hash_ids
        self.has_session = False

    def blocks(self, tokens: int, block_size: int) -> list[int]:
        """Answers are not in the trace under an identity, so only the prompt's blocks are named."""
        del tokens
        if not self.digests:
            prompt = self.turns[0].added_tokens
            for index in range(
                min(prompt // block_size, len(self._hash_ids) * MOONCAKE_BLOCK_TOKENS // block_size)
            ):
                block, part = divmod(index * block_size, MOONCAKE_BLOCK_TOKENS)
                self.digests.append(self._hash_ids[block] * MOONCAKE_BLOCK_TOKENS + part)
        return self.digests

    @property
    def recognised_by_bytes(self) -> int:
        """The trace does not say where the first turn ends."""
        return 8 * MOONCAKE_BLOCK_TOKENS * BYTES_PER_TOKEN

    def beginning(self, size_bytes: int) -> int:
        last = (size_bytes - 1) // (MOONCAKE_BLOCK_TOKENS * BYTES_PER_TOKEN)
        owner = self._hash_ids[min(last, len(self._hash_ids) - 1)]
        return hash((owner, size_bytes)) & 0xFFFFFFFFFFFFFFFF


def read_mooncake(path: Path, *, speed: float = 1.0, limit: int | None = None) -> list[Conversation]:
    """The requests of a file of lines {timestamp, input_length, output_length, hash_ids}; `speed` 2 plays it twice as fast.

    ValueError names the line that is not one.
    """
    requests: list[Conversation] = []
    for at_s, input_tokens, output_tokens, hash_ids in _lines(path):
        if limit is not None and len(requests) >= limit:
            break
        recorded = _Recorded(len(requests), Turn(0.0, input_tokens, max(1, output_tokens)), hash_ids)
        recorded.at_s = at_s / speed
        requests.append(recorded)
    return requests


def _lines(path: Path) -> Iterator[tuple[float, int, int, list[int]]]:
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                hash_ids = [int(hash_id) for hash_id in entry["hash_ids"]]
                found = (
                    float(entry["timestamp"]) / 1000,
                    int(entry["input_length"]),
                    int(entry["output_length"]),
                )
            except (ValueError, KeyError, TypeError) as problem:
                raise ValueError(
                    f"{path}:{number} is not a request in Mooncake's format: {problem!r}"
                ) from problem
            needed = -(-found[1] // MOONCAKE_BLOCK_TOKENS)
            if not hash_ids or len(hash_ids) < needed - 1:
                raise ValueError(
                    f"{path}:{number}: {found[1]} tokens need {needed} hash_ids, not {len(hash_ids)}"
                )
            yield *found, hash_ids

"""What a placement policy is told of one request: who continues what, and how much there is to compute.

Made once per request by whoever has it (`policies.placement.prompt` from a request body; a simulation from its
trace). Knows no HTTP and no text of the prompt: only hashes and sizes.
"""

from typing import Final

import msgspec

from policies.placement.conversations import Known

# Beginnings of prompts that are told apart; how far a session's context reaches is known better than that.
BEGINNINGS_BYTES: Final = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
# A prompt is hashed up to here: what placing costs does not grow with the prompt beyond it.
PREFIX_CAP_BYTES: Final = BEGINNINGS_BYTES[-1]


class Ask(msgspec.Struct):
    """`session` and `prefixes` are keyed by tenant where the pool salts its caches, so that none meets another's.

    `prefixes` are hashes of the prompt's first `prefix_bytes[i]` bytes, shortest first: equal hashes, equal
    beginnings. Empty when the policy does not want them (`Placer.wants_prefixes`).
    """

    session: int = 0  # 64 bits; 0: none, and the client asked for none
    is_derived: bool = False  # the session was recognised by its first turns, not named by the client
    prefixes: tuple[int, ...] = ()
    prefix_bytes: tuple[int, ...] = ()
    prompt_bytes: int = 0
    hits: dict[bytes, int] | None = None  # tokens by endpoint's hash key, as the latest ranking found them
    prompt_tokens: int = 0  # an estimate before, what the upstream counted after
    known: Known | None = None  # the prompt in tokens, where they are told
    is_exact: bool = False  # what was predicted came from the engine's own word

"""KV-cache events as engines publish them: one payload read into what was stored, removed or cleared.

Reads both forms of vLLM's MessagePack (maps with a `type`, and the positional arrays of older versions and of
SGLang), and ignores what it does not know. Refuses to know sockets, sequence numbers and endpoints. Source: vLLM
`distributed/kv_events.py`.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

# An engine's name for a block: 64 bits of its digest, or all of it.
BlockName = int | bytes
# What else goes into a block's name: adapter, salt, images. None: nothing.
Extra = Sequence[Any] | None

# Only what is in the memory of the device counts as cached; None: an engine that has nothing else.
_DEVICE: Final = frozenset({None, "GPU"})
_WHOLE_ATTENTION: Final = frozenset({None, "full_attention", "mla_attention"})

_decode: Final = msgspec.msgpack.Decoder().decode


class EventError(ValueError):
    """Not a payload of KV events."""


class Stored(NamedTuple):
    """Blocks that follow one another; `parent` is the one before the first, None at the start of a prompt.

    `tokens` are those of all blocks together, `extras` one for each block; empty: the engine did not say. `adapter` is
    the LoRA adapter they were computed with.
    """

    names: Sequence[BlockName]
    parent: BlockName | None
    tokens: Sequence[int]
    block_size: int
    extras: Sequence[Extra]
    adapter: str | None


class Removed(NamedTuple):
    """Blocks of which one copy is gone."""

    names: Sequence[BlockName]


class Cleared(NamedTuple):
    """The whole cache is empty."""


Event = Stored | Removed | Cleared


class Batch(NamedTuple):
    """What one step of an engine changed. `rank` is the data-parallel rank; `time` the engine's wall clock."""

    time: float
    rank: int | None
    events: list[Event]


def read_batch(payload: bytes) -> Batch:
    """EventError if it is none. Events of other tiers and of sliding windows are left out."""
    try:
        values = _decode(payload)
        time, listed, rank = float(values[0]), values[1], values[2] if len(values) > 2 else None
        events = [event for raw in listed if (event := _event(raw)) is not None]
    except (msgspec.MsgspecError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise EventError("not a batch of KV events") from error
    return Batch(time, rank, events)


def _event(raw: Any) -> Event | None:
    if isinstance(raw, list):
        kind, values = raw[0], raw[1:]
        fields = dict(zip(_FIELDS.get(kind, ()), values, strict=False))
    else:
        kind, fields = raw["type"], raw
    match kind:
        case "BlockStored":
            return _stored(fields)
        case "BlockRemoved":
            is_ours = fields.get("medium") in _DEVICE
            return Removed(fields["block_hashes"]) if is_ours else None
        case "AllBlocksCleared":
            return Cleared()
    return None


_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "BlockStored": (
        *("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"),
        *("extra_keys", "group_idx", "kv_cache_spec_kind"),
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
}


def _stored(fields: dict[str, Any]) -> Stored | None:
    if fields.get("medium") not in _DEVICE or fields.get("kv_cache_spec_kind") not in _WHOLE_ATTENTION:
        return None
    names, tokens, size = fields["block_hashes"], fields["token_ids"], fields["block_size"]
    extras = fields.get("extra_keys") or ()
    if len(names) * size != len(tokens) or (extras and len(extras) != len(names)):
        return None  # blocks that are not all there cannot be told by their tokens
    adapter = fields.get("lora_name")
    if not extras and adapter:
        extras = [[adapter]] * len(names)
    return Stored(names, fields.get("parent_block_hash"), tokens, size, extras, adapter)

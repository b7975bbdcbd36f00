"""KV events in both wire forms, and what is to be left alone."""

import msgspec
import pytest

from backends.kv_events import Cleared, EventError, Removed, Stored, read_batch

STORED = {
    "type": "BlockStored",
    "block_hashes": [11, 12],
    "parent_block_hash": 10,
    "token_ids": [1, 2, 3, 4],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
    "extra_keys": [["salt"], None],
    "group_idx": 0,
    "kv_cache_spec_kind": "full_attention",
    "session_id": "s",
}


def payload(*events, rank=0):
    return msgspec.msgpack.encode([7.5, list(events), rank])


def test_maps_with_a_type_are_read():
    removed = {"type": "BlockRemoved", "block_hashes": [11], "medium": "GPU", "group_idx": 0}
    batch = read_batch(payload(STORED, removed, {"type": "AllBlocksCleared"}, rank=3))
    assert (batch.time, batch.rank) == (7.5, 3)
    assert batch.events == [
        Stored([11, 12], 10, [1, 2, 3, 4], 2, [["salt"], None], None),
        Removed([11]),
        Cleared(),
    ]


def test_positional_arrays_of_older_versions_are_read():
    batch = read_batch(
        payload(
            ["BlockStored", [11, 12], None, [1, 2, 3, 4], 2, None],
            ["BlockStored", [b"\x01" * 32], 12, [5, 6], 2, 1, "GPU", "adapter"],
            ["BlockRemoved", [11]],
            ["AllBlocksCleared"],
        )
    )
    assert batch.events == [
        Stored([11, 12], None, [1, 2, 3, 4], 2, (), None),
        Stored([b"\x01" * 32], 12, [5, 6], 2, [["adapter"]], "adapter"),
        Removed([11]),
        Cleared(),
    ]


def test_a_batch_without_a_rank_is_read():
    assert read_batch(msgspec.msgpack.encode([1.0, []])).rank is None


@pytest.mark.parametrize(
    "event",
    [
        STORED | {"medium": "CPU"},
        STORED | {"kv_cache_spec_kind": "sliding_window"},
        STORED | {"token_ids": [1, 2, 3]},
        {"type": "BlockRemoved", "block_hashes": [11], "medium": "STORAGE"},
        {"type": "SomethingNew", "x": 1},
        ["SomethingNew", 1],
    ],
)
def test_other_tiers_other_caches_and_unknown_events_are_left_out(event):
    assert read_batch(payload(event)).events == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"{}",
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode([1.0, [{"type": "BlockStored"}]]),
    ],
)
def test_anything_else_is_an_error(data):
    with pytest.raises(EventError):
        read_batch(data)

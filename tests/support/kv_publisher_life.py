"""A publisher's life with losses, deaths and a short memory, followed as the gateway follows it; checked against the truth."""

import random
from collections import Counter

import msgspec

from backends.kv_blocks import Chain
from backends.kv_stream import KvStream, Message
from policies.placement.block_index import BlockIndex

SIZE = 2
_KEEPS = 8  # messages that can be repeated
_ENDPOINT = b"engine"


def message(number, *events, time=None):
    time = float(number if time is None else time)
    return Message(number, msgspec.msgpack.encode([time, list(events), 0]))


def stored(name, *, parent=None):
    return ["BlockStored", [name], parent, [name, name], SIZE, None]


def live(seed: int, messages: int = 400) -> None:
    """AssertionError when what is believed is not what the publisher holds."""
    rng = random.Random(seed)
    stream, index, log = KvStream(), BlockIndex(), []
    is_lost = True  # the connection: a death shows there
    for clock in range(messages):
        if rng.random() < 0.02:
            log, is_lost = [], True
        copies = rng.sample(range(12), 2)
        events = [stored(copies[0]), stored(copies[0]), ["BlockRemoved", [copies[1]]]]
        if rng.random() < 0.02:
            events.append(["AllBlocksCleared"])
        log.append(message(len(log), *events, time=clock))
        if rng.random() < 0.15:
            continue  # it did not arrive
        change = None if is_lost else stream.take(log[-1])
        if change is None:
            is_lost = False
            kept = log[-_KEEPS:]
            change = stream.resume([m for m in kept if m.number >= stream.repair_from]) or stream.restart(
                kept
            )
        if change.is_cleared:
            index.clear(_ENDPOINT)
        index.follow(_ENDPOINT, SIZE, is_partial=not stream.is_complete)
        index.change(_ENDPOINT, change.added, change.removed)
        assert index.held(_ENDPOINT) == len(stream.blocks), f"seed {seed}, message {clock}: the index differs"
        if stream.is_complete:
            held = sorted(stream.blocks.names())
            assert held == truth(log), f"seed {seed}, message {clock}: not what it holds"


def truth(log: list[Message]) -> list[int]:
    """What a publisher that sent these holds, counted as plainly as can be."""
    copies: Counter[int] = Counter()
    for past in log:
        for event in msgspec.msgpack.decode(past.payload)[1]:
            match event[0]:
                case "BlockStored":
                    copies[event[1][0]] += 1
                case "BlockRemoved":
                    copies[event[1][0]] = max(copies[event[1][0]] - 1, 0)
                case _:
                    copies.clear()
    return sorted(Chain(SIZE).extended([name, name]).names[0] for name, count in copies.items() if count)

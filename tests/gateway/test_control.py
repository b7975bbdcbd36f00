import asyncio
import socket
import struct

from gateway.control import (
    Channel,
    Configure,
    Drain,
    Heartbeat,
    Metrics,
    Ready,
    Samples,
    ToParent,
    ToWorker,
    open_channel,
)


class End:
    """One end of a channel, and what it was told."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[object] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.channel: Channel

    async def open(self, sock: socket.socket, accepts: object) -> "End":
        self.channel = await open_channel(sock, accepts, self.messages.put_nowait, self.closed.set)
        return self


async def both_ends() -> tuple[End, End]:
    left, right = socket.socketpair()
    return await End().open(left, ToParent), await End().open(right, ToWorker)


async def test_messages_arrive_whole_in_order_and_typed():
    parent, worker = await both_ends()
    config = bytes(range(256)) * 40_000  # far beyond one read
    parent.channel.send(Configure(config=config))
    parent.channel.send(Drain(timeout_s=2.5, is_shutdown=False))
    worker.channel.send(Ready())
    worker.channel.send(Heartbeat(loop_lag_s=0.25, open_connections=7))
    assert await worker.messages.get() == Configure(config=config)
    assert await worker.messages.get() == Drain(timeout_s=2.5, is_shutdown=False)
    assert await parent.messages.get() == Ready()
    assert await parent.messages.get() == Heartbeat(loop_lag_s=0.25, open_connections=7)
    parent.channel.close()
    await worker.closed.wait()
    worker.channel.close()


async def test_metrics_keep_integers_beyond_the_precision_of_floats():
    parent, worker = await both_ends()
    nanousd = 2**60 + 1
    snapshot = {"cost": Samples("counter", "Cost.", ["model"], [(["m"], nanousd)])}
    worker.channel.send(Metrics(snapshot=snapshot, number=3))
    assert await parent.messages.get() == Metrics(snapshot=snapshot, number=3)
    parent.channel.close()
    await worker.closed.wait()


async def test_messages_queued_before_close_are_still_delivered():
    parent, worker = await both_ends()
    worker.channel.send(Ready())
    worker.channel.close()
    assert await parent.messages.get() == Ready()
    await parent.closed.wait()


async def test_a_message_this_end_does_not_accept_closes_the_channel():
    parent, worker = await both_ends()
    parent.channel.send(Ready())  # the parent's word, from the wrong side
    await worker.closed.wait()
    await parent.closed.wait()
    assert worker.messages.empty()


async def test_a_length_beyond_the_limit_closes_the_channel_without_reading_on():
    left, right = socket.socketpair()
    end = await End().open(left, ToParent)
    right.sendall(struct.pack("!I", 1 << 31))
    await end.closed.wait()
    right.close()


async def test_sending_to_an_end_that_is_gone_is_silent_and_told_once():
    parent, worker = await both_ends()
    worker.channel.close()
    await parent.closed.wait()
    parent.channel.send(Drain(timeout_s=1))
    assert not parent.channel.is_congested


async def test_an_end_that_does_not_read_shows_as_congested():
    left, right = socket.socketpair()
    end = await End().open(left, ToWorker)
    assert not end.channel.is_congested
    end.channel.send(Configure(config=bytes(8 << 20)))
    assert end.channel.is_congested
    right.close()
    await end.closed.wait()

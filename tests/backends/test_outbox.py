import asyncio

from backends.outbox import Outbox


class Wire(asyncio.Transport):
    """A transport that writes down what it is given."""

    def __init__(self, log: list[tuple[str, bytes]], name: str) -> None:
        super().__init__()
        self._log = log
        self._name = name
        self.is_closed = False

    def is_closing(self) -> bool:
        return self.is_closed

    def write(self, data: bytes) -> None:
        self._log.append((self._name, data))


async def test_writes_of_one_turn_are_sent_at_its_end_in_order_and_not_merged():
    log: list[tuple[str, bytes]] = []
    outbox, a, b = Outbox(), Wire(log, "a"), Wire(log, "b")
    outbox.write(a, b"1")
    outbox.write(b, b"2")
    outbox.write(a, b"3")
    assert log == []
    await asyncio.sleep(0)
    assert log == [("a", b"1"), ("b", b"2"), ("a", b"3")]


async def test_the_next_turn_has_its_own():
    log: list[tuple[str, bytes]] = []
    outbox, a = Outbox(), Wire(log, "a")
    for number in (b"1", b"2"):
        outbox.write(a, number)
        await asyncio.sleep(0)
    assert log == [("a", b"1"), ("a", b"2")]


async def test_what_waits_can_be_sent_at_once_and_is_not_sent_twice():
    log: list[tuple[str, bytes]] = []
    outbox, a = Outbox(), Wire(log, "a")
    outbox.write(a, b"1")
    outbox.flush()
    assert log == [("a", b"1")]
    await asyncio.sleep(0)
    assert log == [("a", b"1")]


async def test_nothing_is_written_to_a_transport_that_was_closed_meanwhile():
    log: list[tuple[str, bytes]] = []
    outbox, a, b = Outbox(), Wire(log, "a"), Wire(log, "b")
    outbox.write(a, b"1")
    outbox.write(b, b"2")
    a.is_closed = True
    await asyncio.sleep(0)
    assert log == [("b", b"2")]


async def test_a_write_made_while_sending_goes_out_in_the_turn_after():
    log: list[tuple[str, bytes]] = []
    outbox, b = Outbox(), Wire(log, "b")

    class Chain(Wire):
        def write(self, data: bytes) -> None:
            super().write(data)
            outbox.write(b, b"more")

    outbox.write(Chain(log, "a"), b"1")
    await asyncio.sleep(0)
    assert log == [("a", b"1")]
    await asyncio.sleep(0)
    assert log == [("a", b"1"), ("b", b"more")]

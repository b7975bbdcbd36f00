import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from gateway.acceptor import Loads
from gateway.config import Config, ServerConfig
from gateway.control import (
    Channel,
    Configure,
    Drain,
    Drained,
    Failed,
    Heartbeat,
    Metrics,
    Ready,
    Reload,
    Reloaded,
    Report,
    ToParent,
    open_channel,
)
from gateway.worker import Worker, leave_with_parent

pytestmark = pytest.mark.e2e  # real processes

ROOT = Path(__file__).parents[2]
FAKE = str(ROOT / "tests" / "support" / "fake_worker.py")


class Parent:
    """The parent's end of one worker's channel, and its socket."""

    def __init__(self, errors: Path) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.ours, theirs = socket.socketpair()
        self.loads = Loads.create(2)
        inherited = (self.listener.fileno(), theirs.fileno(), self.loads.descriptor)
        self.errors = errors
        with theirs, errors.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, FAKE, "w0-1", *map(str, inherited), "0"],
                pass_fds=inherited,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        self.messages: asyncio.Queue[object] = asyncio.Queue()
        self.channel: Channel | None = None

    async def open(self, config: Config | None = None) -> None:
        self.channel = await open_channel(self.ours, ToParent, self.messages.put_nowait, lambda: None)
        self.channel.send(Configure((config or Config()).to_json()))

    async def hear(self, kind: type, timeout_s: float = 30.0):
        """The next message of this kind; others are passed over."""
        async with asyncio.timeout(timeout_s):
            while True:
                message = await self.messages.get()
                if isinstance(message, kind):
                    return message

    async def ended(self, timeout_s: float = 30.0) -> int:
        return await asyncio.to_thread(self.process.wait, timeout_s)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.listener.getsockname())


@pytest.fixture
async def parent(tmp_path) -> AsyncIterator[Parent]:
    parent = Parent(tmp_path / "log")
    yield parent
    parent.process.kill()
    parent.process.wait()
    parent.listener.close()
    if parent.channel is not None:
        parent.channel.close()
        await asyncio.sleep(0)
    parent.ours.close()


async def test_a_worker_says_ready_beats_and_reports(parent):
    await parent.open()
    await parent.hear(Ready)
    beat = await parent.hear(Heartbeat)
    assert beat.open_connections == 0
    assert 0 <= beat.loop_lag_s < 5
    parent.channel.send(Report(number=41))
    while (metrics := await parent.hear(Metrics)).number != 41:
        pass
    assert metrics.snapshot["fake_requests_total"].samples == [([], 0)]
    assert metrics.snapshot["headgate_worker_resident_bytes"].labels == ["worker"]
    assert metrics.snapshot["headgate_worker_resident_bytes"].samples[0][0] == ["0"]


async def test_the_last_words_are_the_metrics_and_how_many_were_cut(parent):
    await parent.open()
    await parent.hear(Ready)
    reader, writer = await parent.connect()
    writer.write(b"GET /stream?400 HTTP/1.1\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    parent.channel.send(Drain(timeout_s=0.3))
    assert (await reader.read()).endswith(b"cut\n")
    metrics = await parent.hear(Metrics)
    while metrics.snapshot["fake_requests_total"].samples != [([], 1)]:
        metrics = await parent.hear(Metrics)
    assert await parent.hear(Drained) == Drained(cut=1)
    assert await parent.ended() == 0
    writer.close()
    await writer.wait_closed()


class Draining:
    """An application with a kept connection; how it is drained is noted."""

    def __init__(self) -> None:
        self.open_connections = 1
        self.drained: list[float] = []

    def unready(self) -> None: ...

    def announce_drain(self) -> None: ...

    async def drain(self, timeout_s: float) -> int:
        self.drained.append(timeout_s)
        return 0


@pytest.mark.parametrize("is_shutdown", [True, False])
async def test_while_another_worker_takes_over_kept_connections_have_time_for_their_last_request(
    monkeypatch, is_shutdown
):
    monkeypatch.setattr("gateway.worker._KEPT_S", 3600.0)
    monkeypatch.setattr("gateway.worker._ACCEPTED_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        worker = Worker("w0-1", listener, Loads.create(1), 0, lambda *_: Draining())
        worker._acceptor = SimpleNamespace(close=lambda: None)
        application = Draining()
        draining = asyncio.ensure_future(
            worker._drain(application, Drain(timeout_s=7200.0, is_shutdown=is_shutdown))
        )
        for _ in range(10):
            await asyncio.sleep(0)
        assert draining.done() == is_shutdown
        application.open_connections = 0
        async with asyncio.timeout(30.0):
            assert await draining == 0
    assert application.drained == [7200.0]


async def test_a_reload_is_answered_with_its_number(parent):
    await parent.open()
    await parent.hear(Ready)
    parent.channel.send(Reload(number=7, config=Config().to_json()))
    assert await parent.hear(Reloaded) == Reloaded(7)
    parent.channel.send(Reload(number=8, config=b"not a configuration"))
    assert await parent.hear(Reloaded) == Reloaded(8, "ValidationError")


async def test_a_worker_drains_and_leaves_when_its_parent_is_gone(parent):
    await parent.open(Config(server=ServerConfig(drain_timeout_s=1)))
    await parent.hear(Ready)
    parent.channel.close()
    assert await parent.ended() == 0


async def test_a_worker_without_a_configuration_leaves_with_its_parent(parent):
    parent.ours.close()
    assert await parent.ended() == 1


async def test_a_thread_leaves_some_time_after_the_parent_even_if_the_loop_hangs():
    ours, theirs = socket.socketpair()
    left = threading.Event()
    codes = []

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    with theirs:
        leave_with_parent(theirs.fileno(), 0.01, leave)
        assert not left.wait(0.2)
        ours.close()
        assert left.wait(10)  # this blocks the loop, as a hung worker would
    assert codes == [1]


async def test_sigterm_drains_a_worker_that_has_a_parent(parent):
    await parent.open()
    await parent.hear(Ready)
    parent.process.send_signal(signal.SIGTERM)
    await parent.hear(Drained)
    assert await parent.ended() == 0


SECRET = "canary-of-the-lost-key-7"


def a_config_with_a_secret(name: str) -> Config:
    return Config.from_json(msgspec.json.encode({"keys": [{"name": name, "key": SECRET}]}))


async def test_the_configurations_secrets_are_in_no_argument_and_no_environment(parent):
    await parent.open(a_config_with_a_secret("ci"))
    await parent.hear(Ready)
    for place in ("cmdline", "environ"):
        shown = Path(f"/proc/{parent.process.pid}/{place}").read_bytes()
        assert shown
        assert SECRET.encode() not in shown


async def test_a_start_that_fails_through_a_bug_tells_its_type_and_no_text(parent):
    await parent.open(a_config_with_a_secret("bug"))
    failed = await parent.hear(Failed)
    assert "RuntimeError" in failed.message
    assert await parent.ended() == 1
    told = failed.message + parent.errors.read_text()
    assert SECRET not in told
    assert "sk-secret" not in told

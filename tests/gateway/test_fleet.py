import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gateway.config import Config, KeyConfig
from gateway.control import Membership, Reload
from gateway.exposition import Page
from gateway.fleet import Fleet, FleetSettings, Worker, WorkerError
from local_engine.processes import Backoff

pytestmark = pytest.mark.e2e  # real processes

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, str(ROOT / "tests" / "support" / "fake_worker.py"))


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def a_config(label: str = "one") -> bytes:
    return Config(keys=(KeyConfig(name=label, key="hunter-of-the-lost-key-9"),)).to_json()


class Service:
    """A fleet with its listening socket, and a client of it."""

    def __init__(self, workers: int, **settings) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        self.page = Page("test")
        self.deaths = 0
        self.fleet = Fleet(
            self.listener, FleetSettings(workers=workers, command=COMMAND, **settings), self.page, self.died
        )

    def died(self) -> None:
        self.deaths += 1

    async def get(self, path: str = "/") -> str:
        """The body of one answer on a connection of its own; ConnectionError when there is none."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            size = [line for line in head.split(b"\r\n") if line.startswith(b"content-length")]
            body = await (reader.readexactly(int(size[0].split()[1])) if size else reader.read())
            return body.decode()
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError from error
        finally:
            writer.close()

    async def begun(self, path: str) -> asyncio.Task[str]:
        """The rest of an answer whose first piece has come: its worker has the request for certain."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        await reader.readline()

        async def rest() -> str:
            try:
                return (await reader.read()).decode()
            finally:
                writer.close()

        return asyncio.ensure_future(rest())

    async def names(self, requests: int = 40) -> set[str]:
        return {(await self.get()).split()[0] for _ in range(requests)}

    def metric(self, name: str) -> float:
        lines = [line for line in self.page.render().decode().splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@contextlib.asynccontextmanager
async def a_service(workers: int = 1, config: bytes = b"", **settings) -> AsyncIterator[Service]:
    service = Service(workers, **settings)
    try:
        await service.fleet.start(config or a_config())
        yield service
    finally:
        await service.fleet.drain(0.0, 0.0)
        service.listener.close()


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_at, "it did not happen in time"
        await asyncio.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_all_workers_serve_the_one_socket_and_end_with_the_drain():
    async with a_service(workers=2) as service:
        pids = [worker.process.pid for worker in service.fleet.workers()]
        assert len(pids) == 2
        assert service.fleet.is_ready
        assert {int((await service.get()).split()[1]) for _ in range(5)} <= set(pids)
    assert not service.fleet.is_ready
    assert not any(map(is_running, pids))
    assert service.deaths == 0


async def test_a_worker_inherits_the_listener_and_its_own_channel_and_nothing_else():
    with socket.socket() as stranger:
        os.set_inheritable(stranger.fileno(), True)
        async with a_service(workers=2) as service:
            mine = descriptors(os.listdir("/proc/self/fd"))
            standard = descriptors(["0", "1", "2"])
            links = set((await service.get("/fds")).split(" "))
            listener = os.readlink(f"/proc/self/fd/{service.listener.fileno()}")
    shared = links & mine - standard
    assert {link for link in shared if link.startswith(("socket:", "pipe:"))} == {listener}


def descriptors(names: list[str]) -> set[str]:
    """What they refer to; sockets and pipes by their number in the kernel."""
    links = set()
    for name in names:
        with contextlib.suppress(OSError):
            links.add(os.readlink(f"/proc/self/fd/{name}"))
    return links


async def test_a_crashed_worker_is_replaced_and_what_it_left_is_recovered():
    async with a_service() as service:
        (first,) = await service.names(1)
        with pytest.raises(ConnectionError):
            await service.get("/crash")
        await until(lambda: {worker.name for worker in service.fleet.workers()} - {first} != set())
        await until(lambda: service.fleet.is_ready)
        (second,) = await service.names(1)
        assert first != second
        assert service.deaths == 1
        assert service.metric('headgate_worker_restarts_total{reason="crashed"}') == 1


async def test_connections_that_wait_to_be_accepted_survive_a_crash():
    async with a_service() as service:
        (worker,) = service.fleet.workers()
        worker.process.send_signal(signal.SIGSTOP)
        waiting = asyncio.ensure_future(service.get())
        await asyncio.sleep(0.1)  # the connection is in the socket's queue by now; nobody could have taken it
        worker.kill()
        assert (await waiting).split()[0] != worker.name


async def test_a_hung_worker_is_killed_and_replaced():
    async with a_service(hang_timeout_s=2.5) as service:
        (hung,) = service.fleet.workers()
        asking = asyncio.ensure_future(service.get("/hang"))
        with pytest.raises(ConnectionError):
            await asking
        await until(lambda: hung.state == "gone" and service.fleet.is_ready)
        assert not is_running(hung.process.pid)
        assert service.metric('headgate_worker_restarts_total{reason="hung"}') >= 1


async def test_a_worker_that_refuses_to_start_says_why_and_the_others_are_ended():
    service = Service(workers=2)
    with pytest.raises(WorkerError, match="not to this application's taste"):
        await service.fleet.start(a_config("refuse"))
    assert service.fleet.workers() == []
    service.listener.close()


async def test_a_bug_at_the_start_is_an_error_without_its_text(capfd):
    service = Service(workers=1)
    with pytest.raises(WorkerError, match="a bug, RuntimeError"):
        await service.fleet.start(a_config("bug"))
    service.listener.close()
    assert "sk-secret" not in capfd.readouterr().err


async def test_a_reload_reaches_every_worker():
    async with a_service(workers=2) as service:
        assert await service.fleet.reload(a_config("two")) == []
        assert {(await service.get()).split()[2] for _ in range(20)} == {"two"}


async def test_what_a_worker_is_told_after_a_reload_comes_after_it():
    """Else an engine that opens in that moment stays closed in this worker: the configuration did not know of it yet."""
    async with a_service() as service:
        (worker,) = service.fleet.workers()
        sent = []
        keep, worker.channel.send = worker.channel.send, lambda message: (sent.append(message), keep(message))
        reloading = asyncio.ensure_future(service.fleet.reload(a_config("two")))
        asyncio.get_running_loop().call_soon(
            service.fleet.tell, Membership("gpu/0", is_open=True), ""
        )  # in the next turn, the one in which the reload is sent at the earliest
        assert await reloading == []
        assert [type(message) for message in sent[:2]] == [Reload, Membership]


async def test_a_worker_that_dies_instead_of_reloading_keeps_nothing_old():
    async with a_service(workers=2) as service:
        victim = service.fleet.workers()[0]
        victim.process.send_signal(signal.SIGSTOP)
        reloading = asyncio.ensure_future(service.fleet.reload(a_config("two")))
        await asyncio.sleep(0)
        victim.kill()
        assert await reloading == []
        await until(lambda: [w.state for w in service.fleet.workers()] == ["ready", "ready"])
        assert {(await service.get()).split()[2] for _ in range(20)} == {"two"}


async def test_a_configuration_a_worker_cannot_apply_is_reported_and_the_old_one_stays():
    async with a_service() as service:
        problems = await service.fleet.reload(a_config("refuse"))
        assert problems == [
            f"worker {service.fleet.workers()[0].name} keeps its old configuration: RuntimeError"
        ]
        assert (await service.get()).endswith(" one")


async def test_a_replacement_starts_with_the_newest_configuration():
    async with a_service() as service:
        await service.fleet.reload(a_config("two"))
        (old,) = service.fleet.workers()
        old.kill()
        await until(lambda: old.state == "gone" and service.fleet.is_ready)
        assert (await service.get()).endswith(" two")


async def test_a_rotation_replaces_every_worker_without_losing_a_request():
    async with a_service(workers=2) as service:
        before = {worker.name for worker in service.fleet.workers()}
        is_over = False
        answers = 0

        async def client() -> None:
            nonlocal answers
            while not is_over:
                await service.get()
                answers += 1
                await asyncio.sleep(0.005)

        clients = [asyncio.ensure_future(client()) for _ in range(4)]
        stream = await service.begun("/stream?20")
        await service.fleet.rotate(drain_timeout_s=10)
        is_over = True
        await asyncio.gather(*clients)
        assert answers > 10
        assert (await stream).endswith("19\nend\n")
        after = {worker.name for worker in service.fleet.workers()}
        assert len(after) == 2
        assert not before & after
        assert service.deaths == 0


async def test_a_rotation_stops_at_a_newcomer_that_cannot_start_and_the_old_worker_stays():
    async with a_service() as service:
        (old,) = service.fleet.workers()
        service.fleet._config = a_config("refuse")
        with pytest.raises(WorkerError):
            await service.fleet.rotate(drain_timeout_s=1)
        assert [worker.name for worker in service.fleet.workers()] == [old.name]
        assert (await service.get()).startswith(old.name)


async def test_a_drain_lets_streams_end_and_refuses_new_connections():
    async with a_service() as service:
        stream = await service.begun("/stream?30")
        draining = asyncio.ensure_future(service.fleet.drain(0.0, 60.0))
        await until(lambda: service.listener.fileno() == -1)
        with pytest.raises(ConnectionError):
            await service.get()
        assert (await stream).endswith("29\nend\n")
        await draining


async def test_readiness_goes_first_while_requests_are_still_taken():
    async with a_service() as service:
        draining = asyncio.ensure_future(service.fleet.drain(pre_stop_s=60.0, timeout_s=5.0))
        await asyncio.sleep(0)
        assert not service.fleet.is_ready
        assert (await service.get("/readyz")).startswith("w0-1")
        service.fleet.hurry()
        await draining


async def test_a_drain_that_takes_too_long_cuts_what_is_left():
    async with a_service() as service:
        stream = await service.begun("/stream?4000")
        await service.fleet.drain(0.0, 0.3)
        assert (await stream).endswith("cut\n")


async def test_a_second_order_shortens_the_drain():
    async with a_service() as service:
        stream = await service.begun("/stream?4000")
        draining = asyncio.ensure_future(service.fleet.drain(0.0, 60.0))
        await asyncio.sleep(0.2)
        assert not draining.done()
        service.fleet.hurry()
        await asyncio.wait_for(draining, 30.0)
        assert (await stream).endswith("cut\n")


async def test_metrics_of_replaced_workers_stay_in_the_sum():
    async with a_service() as service:
        for _ in range(3):
            await service.get()
        await service.fleet.rotate(drain_timeout_s=5)
        for _ in range(2):
            await service.get()
        await service.fleet.collect()
        assert service.metric("fake_requests_total") == 5
        assert service.metric('headgate_workers{state="ready"}') == 1
        assert service.metric("headgate_worker_resident_bytes") > 1e6


async def test_a_worker_ended_by_somebody_else_drains_and_is_replaced():
    async with a_service() as service:
        (old,) = service.fleet.workers()
        stream = await service.begun("/stream?10")
        old.process.send_signal(signal.SIGTERM)
        assert (await stream).endswith("end\n")
        await until(lambda: service.fleet.is_ready and service.fleet.workers()[0].name != old.name)


async def test_a_flood_of_deaths_is_slowed_down_while_the_others_serve(monkeypatch):
    # Each died near its start and soon after the last one, however busy the machine is.
    monkeypatch.setattr("gateway.fleet._SETTLED_S", 3600.0)
    async with a_service(workers=2) as service:
        steady, victim = service.fleet.workers()
        monkeypatch.setattr(service.fleet, "_backoff", Backoff(window_s=3600.0))

        def successor() -> Worker | None:
            return next(
                (w for w in service.fleet.workers() if w.slot == victim.slot and w is not victim), None
            )

        for _ in range(5):  # these are replaced at once
            victim.kill()
            await until(lambda: (found := successor()) is not None and found.state == "ready")
            victim = successor()
        victim.kill()
        await until(lambda: len(service.fleet.workers()) == 1)
        await asyncio.sleep(0.3)
        assert service.fleet.workers() == [steady], "the next start waits"
        assert (await service.get()).startswith(steady.name)


async def test_only_deaths_near_the_start_count_towards_the_wait(monkeypatch):
    async with a_service() as service:
        counted: list[float] = []
        monkeypatch.setattr(service.fleet._backoff, "died", lambda now: counted.append(now) or 0.0)
        for settled_s, expected in ((0.0, 0), (3600.0, 1)):
            monkeypatch.setattr("gateway.fleet._SETTLED_S", settled_s)
            (worker,) = service.fleet.workers()
            worker.kill()
            await until(lambda gone=worker: gone.state == "gone" and service.fleet.is_ready)
            assert len(counted) == expected


async def test_requests_at_an_endpoint_are_counted_over_all_workers_after_what_was_told_before():
    async with a_service(workers=2) as service:
        streams = [asyncio.ensure_future(service.get("/stream?200")) for _ in range(3)]
        while await service.fleet.in_flight(["gpu/0"]) != 3:
            await asyncio.sleep(0.02)
        assert await service.fleet.in_flight(["gpu/1"]) == 0
        service.fleet.tell(Membership("gpu/0", is_open=False), "")
        assert await service.fleet.in_flight(["gpu/0"]) == 0
        for stream in streams:
            stream.cancel()


async def test_while_a_worker_does_not_answer_nobody_knows_how_many_requests_there_are():
    async with a_service(workers=1) as service:
        hanging = asyncio.ensure_future(service.get("/hang"))
        while await service.fleet.in_flight(["gpu/0"], timeout_s=0.2) is not None:
            await asyncio.sleep(0.02)
        asked = asyncio.ensure_future(service.fleet.in_flight(["gpu/0"], timeout_s=60.0))
        await asyncio.sleep(0)
        service.fleet.workers()[0].kill()
        assert await asked == 0, "what it had has ended with it"
        with contextlib.suppress(ConnectionError):
            await hanging


async def test_a_worker_that_starts_later_begins_with_what_was_amended():
    async with a_service(workers=1, config=a_config("one")) as service:
        service.fleet.amend(a_config("two"))
        assert (await service.get()).endswith("one")
        first = service.fleet.workers()[0]
        first.kill()
        await until(lambda: any(w.state == "ready" and w is not first for w in service.fleet.workers()))
        assert (await service.get()).endswith("two")

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.config import Config, load
from gateway.reload import ConfigWatch, reload

BASE = """
server: {{port: {port}, drain_timeout_s: {drain}}}
storage: {{directory: {directory}}}
pools:
  demo: {{simulator: {{replicas: {replicas}}}}}
  gpu: {{endpoints: ["http://127.0.0.1:1/v1"]}}
models:
  demo: {{targets: [{{pool: demo}}]}}
"""


def text(port: int = 8080, drain: int = 10, directory: str = "data", replicas: int = 1) -> str:
    return BASE.format(port=port, drain=drain, directory=directory, replicas=replicas)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text())
    return path


class Applied:
    """Collects what is applied, and lets a test wait for it."""

    def __init__(self) -> None:
        self.configs: asyncio.Queue[Config] = asyncio.Queue()
        self.fails = False

    async def __call__(self, config: Config) -> None:
        if self.fails:
            raise RuntimeError("cannot build this")
        self.configs.put_nowait(config)

    async def drain_timeout_s(self) -> float:
        return (await asyncio.wait_for(self.configs.get(), 20)).server.drain_timeout_s


@asynccontextmanager
async def watching(path: Path) -> AsyncIterator[tuple[ConfigWatch, Applied]]:
    applied = Applied()
    watch = ConfigWatch(path, {}, load(path, {}), applied)
    task = asyncio.create_task(watch.run())
    await asyncio.sleep(0.3)  # the watch stands in a thread of its own; polling would make up for a miss
    try:
        yield watch, applied
    finally:
        task.cancel()
        await asyncio.wait([task])


# What may change


def test_a_valid_file_takes_effect(path):
    running = load(path, {})
    path.write_text(text(drain=20))
    result = reload(path, {}, running)
    assert (result.problems, result.needs_restart) == ((), ())
    assert result.config.server.drain_timeout_s == 20


def test_an_invalid_file_changes_nothing_and_says_the_same_as_at_the_start(path):
    running = load(path, {})
    path.write_text("server: {prot: 1}")
    result = reload(path, {}, running)
    assert result.config is running
    assert result.problems == ('config.yaml:1: server.prot: unknown key; did you mean "port"?',)


def test_a_missing_file_changes_nothing(path):
    running = load(path, {})
    path.unlink()
    assert reload(path, {}, running).problems == (
        "config.yaml: there is no such file (--config names another)",
    )


def test_what_needs_a_restart_keeps_its_running_value_and_is_named(path):
    running = load(path, {})
    path.write_text(text(port=9999, drain=20, directory="elsewhere"))
    result = reload(path, {}, running)
    assert result.needs_restart == ("server.port", "storage.directory")
    assert result.config.server.port == 8080
    assert result.config.storage.directory == path.parent / "data"
    assert result.config.server.drain_timeout_s == 20
    worker = Config.from_json(result.config.to_json())
    assert (worker.server.port, worker.storage.directory) == (8080, path.parent / "data")


def test_a_setting_left_out_now_counts_as_its_default(path):
    running = load(path, {})
    path.write_text(text().replace("port: 8080", "workers: 3"))
    result = reload(path, {}, running)
    assert result.needs_restart == ("server.workers",)
    assert result.config.server.workers == "auto"


def test_running_engines_keep_their_settings(path):
    running = load(path, {})
    path.write_text(text(replicas=5))
    result = reload(path, {}, running)
    assert result.needs_restart == ("pools.demo",)
    simulator = result.config.pools["demo"].simulator
    assert simulator is not None
    assert simulator.replicas == 1


def test_new_engines_wait_for_the_restart_switched_off(path):
    running = load(path, {})
    more = "pools:\n  more: {simulator: {replicas: 1}}"
    path.write_text(text().replace("pools:", more) + "  more: {targets: [{pool: more}]}\n")
    result = reload(path, {}, running)
    assert result.needs_restart == ("pools.more",)
    assert sorted(result.config.enabled_pools()) == ["demo", "gpu"]
    assert list(result.config.served_models()) == ["demo"]


def test_engines_no_longer_asked_for_are_named(path):
    running = load(path, {})
    path.write_text("models: {}\n")
    result = reload(path, {}, running)
    assert "pools.demo" in result.needs_restart
    assert result.config.pools == {}


def test_pools_of_addresses_change_at_once(path):
    running = load(path, {})
    path.write_text(text().replace("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"))
    result = reload(path, {}, running)
    assert result.needs_restart == ()
    assert result.config.enabled_pools()["gpu"].base_urls == ("http://127.0.0.1:2/v1",)


# When


def rewrite(path: Path, content: str) -> None:
    path.write_text(content)


def replace(path: Path, content: str) -> None:
    draft = path.with_name(".config.yaml.draft")
    draft.write_text(content)
    draft.replace(path)


def delete_and_write(path: Path, content: str) -> None:
    path.unlink()
    path.write_text(content)


@pytest.mark.parametrize("change", [rewrite, replace, delete_and_write])
async def test_a_changed_file_is_applied(path: Path, change: Callable[[Path, str], None]):
    async with watching(path) as (watch, applied):
        for drain in (20, 30):
            change(path, text(drain=drain))
            assert await applied.drain_timeout_s() == drain
        await asyncio.sleep(0)
        assert watch.config.server.drain_timeout_s == 30


async def test_a_kubernetes_mount_is_followed(tmp_path):
    def publish(version: int, drain: int) -> None:
        """As the kubelet does: a directory for each version, and a link that is swapped."""
        directory = tmp_path / f"..version_{version}"
        directory.mkdir()
        (directory / "config.yaml").write_text(text(drain=drain))
        link = tmp_path / "..data_tmp"
        link.symlink_to(directory.name)
        os.replace(link, tmp_path / "..data")
        old = tmp_path / f"..version_{version - 1}"
        if old.exists():
            (old / "config.yaml").unlink()
            old.rmdir()

    publish(1, 10)
    (tmp_path / "config.yaml").symlink_to("..data/config.yaml")
    async with watching(tmp_path / "config.yaml") as (_, applied):
        for version in (2, 3, 4):
            publish(version, version * 10)
            assert await applied.drain_timeout_s() == version * 10


async def test_a_link_into_another_directory_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "app").mkdir()
    target = tmp_path / "real/config.yaml"
    target.write_text(text())
    link = tmp_path / "app/config.yaml"
    link.symlink_to(target)
    async with watching(link) as (_, applied):
        replace(target, text(drain=20))
        assert await applied.drain_timeout_s() == 20


async def test_an_invalid_change_is_passed_over_and_the_next_one_taken(path, caplog):
    async with watching(path) as (watch, applied):
        replace(path, "server: {prot: 1}")
        while "server.prot" not in caplog.text:
            await asyncio.sleep(0.02)
        assert watch.config.server.drain_timeout_s == 10
        replace(path, text(drain=30))
        assert await applied.drain_timeout_s() == 30
    assert (
        'the running one stays: config.yaml:1: server.prot: unknown key; did you mean "port"?' in caplog.text
    )


async def test_a_change_that_cannot_be_applied_leaves_the_old_one_running(path, caplog):
    async with watching(path) as (watch, applied):
        applied.fails = True
        replace(path, text(drain=20))
        while "could not be applied" not in caplog.text:
            await asyncio.sleep(0.02)
        assert watch.config.server.drain_timeout_s == 10
        applied.fails = False
        replace(path, text(drain=30))
        assert await applied.drain_timeout_s() == 30


async def test_a_touched_file_and_its_neighbours_change_nothing(path, caplog):
    caplog.set_level("INFO", "gateway.reload")
    async with watching(path) as (_, applied):
        os.utime(path)
        (path.parent / "other.yaml").write_text("x")
        replace(path, text(drain=20))
        assert await applied.drain_timeout_s() == 20
        assert applied.configs.empty()
    assert caplog.text.count("configuration reloaded") == 1


async def test_a_directory_that_goes_and_comes_back_is_followed_again(tmp_path, monkeypatch):
    monkeypatch.setattr("gateway.reload._POLL_MS", 200)
    directory = tmp_path / "conf"
    directory.mkdir()
    path = directory / "config.yaml"
    path.write_text(text())
    async with watching(path) as (_, applied):
        directory.rename(tmp_path / "gone")
        directory.mkdir()
        path.write_text(text(drain=20))
        assert await applied.drain_timeout_s() == 20
        replace(path, text(drain=30))
        assert await applied.drain_timeout_s() == 30


async def test_sighup_reads_the_file_again(path):
    applied = Applied()
    watch = ConfigWatch(path, {}, load(path, {}), applied)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, watch.on_sighup)
    try:
        path.write_text(text(drain=20))
        os.kill(os.getpid(), signal.SIGHUP)
        assert await applied.drain_timeout_s() == 20
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def test_reloads_come_one_after_the_other_and_the_last_file_wins(path):
    running = 0

    async def apply(config: Config) -> None:
        nonlocal running
        assert running == 0
        running += 1
        await asyncio.sleep(0.01)
        running -= 1

    watch = ConfigWatch(path, {}, load(path, {}), apply)

    async def change(drain: int) -> None:
        replace(path, text(drain=drain))
        await watch.reload()

    await asyncio.gather(*(change(drain) for drain in range(11, 31)))
    assert watch.config.server.drain_timeout_s == 30


async def test_the_environment_that_was_there_at_the_start_still_holds(path):
    environ = {"DRAIN": "20"}
    applied = Applied()
    watch = ConfigWatch(path, environ, load(path, environ), applied)
    path.write_text(text().replace("drain_timeout_s: 10", 'drain_timeout_s: "${DRAIN}"'))
    assert (await watch.reload()).config.server.drain_timeout_s == 20


async def test_stopping_the_watch_ends_it_at_once(path):
    loop = asyncio.get_running_loop()
    async with watching(path):
        started_at = loop.time()
    assert loop.time() - started_at < 3

"""Reloading: the file changed, or SIGHUP came; the new configuration is checked whole and handed on, or refused.

Owns what may change while running. Settings marked as needing a restart keep their running values and are
reported; everything else of a valid file takes effect. An invalid file changes nothing. Refuses to know what a
configuration is applied to.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from watchfiles import awatch

from backends.config import PoolConfig
from gateway.config import Config, load
from gateway.config_file import ConfigError
from local_engine.config import RESTART, Section

_log = logging.getLogger(__name__)
_S = TypeVar("_S", bound=Section)

_QUIET_MS: Final = 200  # editors write in several steps: wait until nothing has moved for this long
_DEBOUNCE_MS: Final = 2_000  # but no longer than this
_POLL_MS: Final = 5_000  # for what inotify cannot see: network file systems, a link further up
_MAX_LINKS: Final = 40


class Reloaded(NamedTuple):
    """`config` is what runs from now on; `problems` are the lines of the ConfigError that kept the old one."""

    config: Config
    problems: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()


def reload(path: Path, environ: Mapping[str, str], running: Config) -> Reloaded:
    """What the file makes of the running configuration. Touches nothing else."""
    try:
        wanted = load(path, environ)
    except ConfigError as error:
        return Reloaded(running, error.lines)
    kept: list[str] = []
    config = _keep_running(running, wanted, "", kept)
    pools = _keep_engines(running.pools, config.pools, kept)
    return Reloaded(config.model_copy(update={"pools": pools}), (), tuple(kept))


class ConfigWatch:
    """The running configuration of this process, and what changes it. `apply` gets each valid new one.

    When `apply` raises, the old configuration stays the running one.
    """

    def __init__(
        self,
        path: Path,
        environ: Mapping[str, str],
        config: Config,
        apply: Callable[[Config], Awaitable[None]],
    ) -> None:
        self.config = config
        self._path = path
        self._environ = environ
        self._apply = apply
        self._content = _read(path)
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Reloaded]] = set()

    async def reload(self) -> Reloaded:
        """Read the file now, changed or not."""
        async with self._lock:
            self._content = await asyncio.to_thread(_read, self._path)
            result = await asyncio.to_thread(reload, self._path, self._environ, self.config)
            if not result.problems:
                await self._apply(result.config)
                self.config = result.config
        for line in result.problems:
            _log.error("configuration refused, the running one stays: %s", line)
        for setting in result.needs_restart:
            _log.warning("configuration: %s needs a restart to change", setting)
        if not result.problems:
            _log.info("configuration reloaded")
        return result

    def on_sighup(self) -> None:
        """For `loop.add_signal_handler`."""
        task = asyncio.get_running_loop().create_task(self.reload())
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    async def run(self) -> None:
        """Follow the file until cancelled."""
        while True:
            directories = _directories(self._path)
            try:
                async for _ in awatch(
                    *directories,
                    watch_filter=None,
                    debounce=_DEBOUNCE_MS,
                    step=_QUIET_MS,
                    rust_timeout=_POLL_MS,
                    yield_on_timeout=True,
                    recursive=False,
                ):
                    await self._reload_if_changed()
                    if _directories(self._path) != directories:
                        break
            except OSError as error:  # no directory left to watch, or no inotify watches left in the system
                _log.debug("cannot watch the configuration: %s", error.strerror)
                await asyncio.sleep(_POLL_MS / 1000)
                await self._reload_if_changed()

    async def _reload_if_changed(self) -> None:
        content = await asyncio.to_thread(_read, self._path)
        if content is None or content == self._content:
            return
        try:
            await self.reload()
        except Exception:  # noqa: BLE001 - one that cannot be applied must not end the watch for the next
            _log.exception("a new configuration could not be applied")

    def _finished(self, task: asyncio.Task[Reloaded]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a new configuration could not be applied", exc_info=task.exception())


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _directories(path: Path) -> set[Path]:
    """Where a change of the file shows: its own directory and those of all links on the way to it.

    Kubernetes mounts `config.yaml -> ..data/config.yaml` and swaps the link `..data`.
    """
    found: set[Path] = set()
    for _ in range(_MAX_LINKS):
        path = path.absolute()
        found |= {path.parent, path.parent.resolve()}
        if not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    return {directory for directory in found if directory.is_dir()}


def _keep_running(running: _S, wanted: _S, prefix: str, kept: list[str]) -> _S:
    """`wanted` with the running values of the settings that need a restart; their names are added to `kept`."""
    changes: dict[str, object] = {}
    for name, field in type(wanted).model_fields.items():
        before, after = getattr(running, name), getattr(wanted, name)
        if before == after:
            continue
        if field.json_schema_extra == RESTART:
            kept.append(prefix + name)
            changes[name] = before
        elif isinstance(before, Section) and type(before) is type(after):
            changes[name] = _keep_running(before, after, f"{prefix}{name}.", kept)
    return wanted.model_copy(update=changes)


def _keep_engines(
    running: Mapping[str, PoolConfig], wanted: Mapping[str, PoolConfig], kept: list[str]
) -> dict[str, PoolConfig]:
    """Engines are started with Headgate only: a pool of them stays as it is, and a new one waits, switched off."""
    pools = dict(wanted)
    for name in {**running, **wanted}:
        before, after = running.get(name), wanted.get(name)
        runs = before.simulator if before is not None and before.enabled else None
        asked = after.simulator if after is not None and after.enabled else None
        if runs == asked:
            continue
        kept.append(f"pools.{name}")
        if after is not None and asked is not None:
            update = {"enabled": False} if runs is None else {"simulator": runs}
            pools[name] = after.model_copy(update=update)
    return pools

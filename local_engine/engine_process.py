"""Engine processes as the system has them: started behind a guard, or taken over from a gateway that is gone.

Owns signals, groups, logs and what an engine leaves behind. Refuses to decide when. An engine is ended by its process
group, always: its processes outlive each other. Nothing is signalled whose identity is not known (`engine_records`).
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from local_engine.engine_records import EngineRecord, EngineRecords
from local_engine.free_ports import FreePorts
from local_engine.plan import ReplicaPlan
from local_engine.planning import process_env
from local_engine.process_table import (
    ProcessId,
    boot_id,
    group_members,
    identify,
    remove_socket,
    remove_unused,
    shared_memory,
)
from local_engine.supervision_config import EnginesConfig

_GUARD: Final = str(Path(__file__).with_name("guard.py"))
_TAIL_BYTES: Final = 256 << 10
_POLL_S: Final = 0.2
_log = logging.getLogger(__name__)


class EngineProcess:
    """One engine's processes. `exited` is None as an exit code where nobody could see it."""

    def __init__(
        self,
        record: EngineRecord,
        records: EngineRecords,
        process: asyncio.subprocess.Process | None,
    ) -> None:
        """`process` is the guard; None: it is not our child."""
        self.record = record
        self._records = records
        self._process = process

    @property
    def pid(self) -> int:
        return self.record.guard[0]

    async def wait(self) -> int | None:
        """Its exit code, when it has one."""
        if self._process is not None:
            return await self._process.wait()
        while self.record.guard_id.is_alive():  # noqa: ASYNC110 - nobody tells of a process that is not our child
            await asyncio.sleep(_POLL_S)
        return None

    def terminate(self) -> None:
        """SIGTERM: the engine's main process ends what it has, in its own time."""
        if self._is_running() or self.record.guard_id.is_alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole group, and to whatever left it."""
        group = self.pid
        is_leader_known = self._is_running() or self.record.guard_id.is_alive()
        if is_leader_known or (self._process is not None and identify(group) is None):
            # Nobody else can have this number: its leader is there, or has just gone and was our child.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        for one in self.record.living():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(one.pid, signal.SIGKILL)

    async def observe(self) -> None:
        """Write down who is of the group now and what shared memory they have: it may be asked when they are gone."""
        await asyncio.to_thread(self._observe)

    def _observe(self) -> None:
        members = group_members(self.pid)
        if not members:
            return
        known = set(self.record.shared_memory) | shared_memory([one.pid for one in members])
        changed = _with(self.record, members=[tuple(one) for one in members], shared_memory=sorted(known))
        if changed != self.record:
            self.record = changed
            self._records.put(changed)

    def tail(self) -> str:
        """The end of what it wrote since its start."""
        return _tail(self._records.log_path(self.record.name))

    async def clean(self) -> None:
        """After its end: what is left of its group, its shared memory, its sockets, its record."""
        self.kill()
        removed = await asyncio.to_thread(remove_unused, set(self.record.shared_memory))
        for path in self.record.sockets:
            remove_socket(Path(path))
        if removed:
            _log.info(
                "shared memory of an engine was removed",
                extra={"engine": self.record.name, "count": len(removed)},
            )
        self._records.forget(self.record.name)

    def _is_running(self) -> bool:
        """As our child: until it is reaped its number is its own."""
        return self._process is not None and self._process.returncode is None


class Launcher:
    """Starts engines of this gateway, and takes over those of one before it."""

    def __init__(
        self,
        records: EngineRecords,
        settings: EnginesConfig,
        ports: FreePorts,
        environ: Mapping[str, str],
    ) -> None:
        """`environ` is that of the parent, of which an engine gets what it may have."""
        self._records = records
        self._settings = settings
        self._ports = ports
        self._environ = environ
        self._adoptable: dict[str, EngineRecord] = {}

    def is_of(self, record: EngineRecord, plan: ReplicaPlan) -> bool:
        """Whether what runs is what would be started."""
        return record.name == plan.name and record.fingerprint == fingerprint(plan)

    def offer(self, record: EngineRecord) -> None:
        """An engine of an earlier gateway, to be adopted when a replica of its name wants to start."""
        self._adoptable[record.name] = record

    def adopt(self, plan: ReplicaPlan) -> EngineProcess | None:
        """The engine that runs already for this very plan; None: there is none. Offered once."""
        record = self._adoptable.pop(plan.name, None)
        if record is None or not record.guard_id.is_alive() or not self.is_of(record, plan):
            return None
        return EngineProcess(record, self._records, None)

    async def launch(self, plan: ReplicaPlan) -> EngineProcess:
        """OSError when the system has no room for another process."""
        settings, name = self._settings, plan.name
        for path in plan.sockets:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_socket(path)
        guard = [
            *(sys.executable, "-I", "-S", _GUARD, str(self._records.owner_path)),
            *(str(settings.orphan_grace_s), str(self._records.log_path(name))),
            *(str(settings.log_bytes), str(settings.log_keep), "--"),
        ]
        process = await asyncio.create_subprocess_exec(
            *guard,
            *plan.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            env=process_env(plan, self._environ),
            start_new_session=True,
        )
        guard_id = identify(process.pid) or ProcessId(process.pid, 0)
        record = EngineRecord(
            name=name,
            pool=plan.pool,
            slot=plan.slot,
            boot=boot_id(),
            guard=(guard_id.pid, guard_id.started),
            fingerprint=fingerprint(plan),
            api_key=plan.api_key,
            ports=self._ports.held(name),
            members=[(guard_id.pid, guard_id.started)],
            sockets=[str(path) for path in plan.sockets],
        )
        self._records.put(record)
        return EngineProcess(record, self._records, process)


def leftovers(records: EngineRecords) -> list[EngineProcess]:
    """What the records say of engines of an earlier gateway, alive or not."""
    return [EngineProcess(record, records, None) for record in records.all()]


def fingerprint(plan: ReplicaPlan) -> str:
    """Of all that makes one engine another: its command and what is set for it. It shows no secret."""
    digest = hashlib.sha256()
    for part in (*plan.argv, *(f"{name}={value}" for name, value in sorted(plan.env.items()))):
        digest.update(part.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def _with(record: EngineRecord, **changes: object) -> EngineRecord:
    values = {name: getattr(record, name) for name in record.__struct_fields__}
    return EngineRecord(**(values | changes))


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""

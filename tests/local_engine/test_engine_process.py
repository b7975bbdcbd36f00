"""Real processes behind a real guard: logs, groups, leftovers, and what a killed gateway leaves."""

import asyncio
import contextlib
import dataclasses
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from local_engine.engine_process import EngineProcess, Launcher, leftovers
from local_engine.engine_records import EngineRecords, TakenError
from local_engine.free_ports import FreePorts
from local_engine.guard import Guard, Log
from local_engine.process_table import ProcessId, group_members, identify, remove_socket, remove_unused
from local_engine.supervision_config import EnginesConfig
from tests.mutants.engines import MUTANTS
from tests.support.scripted_engine import a_plan

# An engine with a second process that outlives it, as vLLM has; `note` gets both pids.
ENGINE = textwrap.dedent(
    """
    import os, subprocess, sys, time
    core = subprocess.Popen([sys.executable, "-S", "-c",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
    print("engine says hello", flush=True)
    note = sys.argv[1]
    open(note + ".new", "w").write(f"{os.getpid()} {core.pid}")
    os.replace(note + ".new", note)
    time.sleep(600)
    """
)


async def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline_at = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_at, "it did not happen in time"
        await asyncio.sleep(0.02)


def is_running(pid: int) -> bool:
    found = identify(pid)
    return found is not None and found.is_alive()


class Bench:
    """One directory of records, and engines started in it."""

    def __init__(self, directory: Path, **settings) -> None:
        self.records = EngineRecords(directory)
        self.launcher = Launcher(self.records, EnginesConfig(**settings), FreePorts(), os.environ)
        self.note = directory / "note"
        self.started: list[EngineProcess] = []

    def plan(self, code: str = ENGINE, **changes):
        argv = (sys.executable, "-S", "-c", code, str(self.note))
        return a_plan(argv=argv, sockets=(), **changes)

    async def start(self, plan) -> EngineProcess:
        self.note.unlink(missing_ok=True)
        engine = await self.launcher.launch(plan)
        self.started.append(engine)
        return engine

    async def pids(self) -> tuple[int, int]:
        await until(self.note.exists)
        main, core = map(int, self.note.read_text().split())
        return main, core


@pytest.fixture
async def bench(tmp_path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path / "engines")
    try:
        yield bench
    finally:
        for engine in bench.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine.pid, signal.SIGKILL)
            await engine.wait()
        bench.records.close()


async def test_the_log_is_caught_and_the_exit_code_told(bench):
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    engine = await bench.start(bench.plan(code))
    assert await engine.wait() == 3
    assert set(engine.tail().split()) == {"out", "err"}
    await engine.clean()
    assert bench.records.all() == []


async def test_a_command_that_is_not_there_says_so_in_the_log(bench):
    engine = await bench.start(a_plan(argv=("/nowhere/vllm",), sockets=()))
    assert await engine.wait() == 127
    assert "cannot start /nowhere/vllm: No such file or directory" in engine.tail()


async def test_every_start_has_a_log_of_its_own_and_only_so_many_are_kept(tmp_path):
    bench = Bench(tmp_path / "engines", log_keep=2)
    for number in range(4):
        engine = await bench.start(bench.plan(f"print('start {number}')"))
        await engine.wait()
    path = bench.records.log_path("gpu/0")
    assert path.read_text().split() == ["start", "3"]
    assert Path(f"{path}.2").read_text().split() == ["start", "1"]
    assert not Path(f"{path}.3").exists()
    bench.records.close()


async def test_a_log_is_rotated_at_its_size(tmp_path):
    bench = Bench(tmp_path / "engines", log_bytes=4096, log_keep=2)
    engine = await bench.start(
        bench.plan("import sys\nfor n in range(2000): sys.stdout.write(f'line {n:06}\\n')")
    )
    await engine.wait()
    path = bench.records.log_path("gpu/0")
    files = [path, Path(f"{path}.1"), Path(f"{path}.2")]
    assert all(file.stat().st_size <= 4096 for file in files), [file.stat().st_size for file in files]
    assert "line 001999" in engine.tail()
    kept = "".join(file.read_text() for file in reversed(files)).split()[1::2]
    numbers = [int(number) for number in kept if len(number) == 6]
    assert numbers == sorted(numbers), "nothing between is lost"
    bench.records.close()


async def left_of_a_killed_engine(bench: Bench) -> list[int]:
    """Its main process is killed; who of it is still there when it was cleaned up."""
    engine = await bench.start(bench.plan())
    main, core = await bench.pids()
    assert {one.pid for one in group_members(engine.pid)} == {engine.pid, main, core}
    os.kill(main, signal.SIGKILL)
    assert await engine.wait() == 128 + signal.SIGKILL
    await engine.clean()
    with contextlib.suppress(AssertionError):
        await until(lambda: not is_running(core), within_s=3.0 if is_mutant() else 60.0)
    return [pid for pid in (engine.pid, main, core) if is_running(pid)]


def is_mutant() -> bool:
    return EngineProcess.kill.__name__ != "kill"


async def test_an_engine_whose_main_process_is_killed_leaves_nothing_behind(bench):
    assert await left_of_a_killed_engine(bench) == []


async def test_a_build_that_ends_engines_by_pid_is_caught(bench, monkeypatch):
    monkeypatch.setattr(*MUTANTS["kills_by_pid"])
    assert len(await left_of_a_killed_engine(bench)) == 1


async def test_term_ends_the_main_process_and_what_stays_behind_is_killed(bench):
    engine = await bench.start(bench.plan())
    _, core = await bench.pids()
    engine.terminate()
    assert await engine.wait() == 128 + signal.SIGTERM
    assert is_running(core)
    await engine.clean()
    await until(lambda: not is_running(core))


async def test_a_kill_is_for_the_whole_group(bench):
    engine = await bench.start(bench.plan())
    main, core = await bench.pids()
    engine.kill()
    await engine.wait()
    await until(lambda: not is_running(main) and not is_running(core))


async def test_without_its_guard_an_engine_does_not_go_on(bench):
    engine = await bench.start(bench.plan())
    main, core = await bench.pids()
    os.kill(engine.pid, signal.SIGKILL)
    await engine.wait()
    await engine.clean()
    await until(lambda: not is_running(main) and not is_running(core))


async def test_shared_memory_that_a_killed_engine_leaves_is_removed_and_others_is_not(bench):
    names = [f"headgate-test-{os.getpid()}-{n}" for n in range(2)]
    code = ENGINE.replace(
        "note = ",
        f"import mmap; files = [open('/dev/shm/' + name, 'w+b') for name in {names!r}]\n"
        "[file.truncate(4096) for file in files]; maps = [mmap.mmap(file.fileno(), 4096) for file in files]\n"
        "note = ",
    )
    engine = await bench.start(bench.plan(code))
    await bench.pids()
    await engine.observe()
    assert set(names) <= set(engine.record.shared_memory)
    with open(f"/dev/shm/{names[1]}", "r+b") as ours, mmap.mmap(ours.fileno(), 4096):
        engine.kill()
        await engine.wait()
        await until(lambda: not engine.record.living())
        await engine.clean()
        assert not Path("/dev/shm", names[0]).exists()
        assert Path("/dev/shm", names[1]).exists()
    assert remove_unused({names[1]}) == [names[1]]


def test_a_record_cannot_lead_to_a_file_that_is_elsewhere(tmp_path):
    precious = tmp_path / "precious"
    precious.touch()
    link = Path("/dev/shm", f"headgate-test-link-{os.getpid()}")
    link.symlink_to(precious)
    try:
        assert remove_unused({f"../..{precious}", str(precious), link.name, "..", ""}) == []
    finally:
        link.unlink()
    remove_socket(precious)
    assert precious.exists()


async def test_sockets_are_removed_before_the_start_and_after_the_end(bench, tmp_path):
    path = Path(tempfile.mkdtemp(prefix="hg-")) / "run" / "kv"  # a socket's path must be short
    path.parent.mkdir()

    def leave_one() -> None:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))

    leave_one()
    engine = await bench.start(dataclasses.replace(bench.plan(), sockets=(path,)))
    assert not path.exists()
    await bench.pids()
    leave_one()
    engine.kill()
    await engine.wait()
    await engine.clean()
    assert not path.exists()
    shutil.rmtree(path.parent.parent)


async def test_a_record_tells_the_next_gateway_what_runs_and_with_which_key(bench, tmp_path):
    engine = await bench.start(bench.plan())
    main, core = await bench.pids()
    await engine.observe()
    bench.records.close()
    again = Bench(tmp_path / "engines")
    (left,) = leftovers(again.records)
    assert left.record.api_key == "k"
    assert {one.pid for one in left.record.living()} == {engine.pid, main, core}
    assert oct((tmp_path / "engines" / "gpu.0.json").stat().st_mode)[-3:] == "600"
    again.launcher.offer(left.record)
    assert again.launcher.adopt(again.plan(env={"OTHER": "1"})) is None
    again.launcher.offer(left.record)
    adopted = again.launcher.adopt(again.plan())
    assert adopted is not None
    assert again.launcher.adopt(again.plan()) is None
    waiting = asyncio.ensure_future(adopted.wait())
    adopted.kill()
    assert await waiting is None
    await adopted.clean()
    await until(lambda: not is_running(main) and not is_running(core))
    again.records.close()


async def test_a_process_that_has_the_pid_of_a_former_engine_is_left_alone(bench):
    engine = await bench.start(bench.plan())
    await bench.pids()
    engine.kill()
    await engine.wait()
    stranger = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    try:
        started = identify(stranger.pid)
        assert started is not None
        for guard, boot in (
            ((stranger.pid, started.started - 1), engine.record.boot),
            ((stranger.pid, started.started), "another boot"),
        ):
            values = {name: getattr(engine.record, name) for name in engine.record.__struct_fields__}
            record = type(engine.record)(**(values | {"guard": guard, "members": [guard], "boot": boot}))
            foreign = EngineProcess(record, bench.records, None)
            assert record.living() == []
            if boot != "another boot":
                foreign.terminate()
                foreign.kill()
                await foreign.clean()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_two_gateways_do_not_share_a_directory(bench, tmp_path):
    with pytest.raises(TakenError, match=r"another Headgate runs engines .* storage\.directory"):
        EngineRecords(tmp_path / "engines")


async def test_engines_of_a_gateway_that_is_gone_end_by_themselves_after_a_while(tmp_path):
    bench = Bench(tmp_path / "engines", orphan_grace_s=1)
    engine = await bench.start(bench.plan())
    main, core = await bench.pids()
    gone = subprocess.Popen([sys.executable, "-S", "-c", "pass"])
    gone.wait()
    bench.records.owner_path.write_text(f"{gone.pid} 1\n")
    await until(lambda: not any(map(is_running, (main, core, engine.pid))))
    assert "no gateway has come to look after this engine" in engine.tail()
    bench.records.close()


def test_a_gateway_that_comes_back_in_time_is_waited_for_anew_each_time(tmp_path):
    owner, now = tmp_path / "owner", [100.0]
    log = Log(tmp_path / "log", 4096, 1)
    log.close()
    guard = Guard(owner, 60.0, log, lambda: now[0])
    me = identify(os.getpid())
    assert me is not None

    def is_abandoned_after(seconds: float) -> bool:
        now[0] += seconds
        return guard.is_abandoned()

    owner.write_text(f"{me.pid} {me.started}\n")
    assert not is_abandoned_after(1000)
    owner.write_text(f"{me.pid} {me.started + 1}\n")  # another process has its pid
    assert not is_abandoned_after(1)
    assert not is_abandoned_after(59)
    owner.write_text(f"{me.pid} {me.started}\n")
    assert not is_abandoned_after(1)
    owner.unlink()
    assert not is_abandoned_after(1)
    assert not is_abandoned_after(59)
    assert is_abandoned_after(2)


def test_a_process_is_its_pid_and_its_start():
    me = identify(os.getpid())
    assert me is not None
    assert me.is_alive()
    assert not ProcessId(me.pid, me.started + 1).is_alive()
    assert identify(2**22 + 1) is None

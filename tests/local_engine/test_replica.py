"""One replica against a script: what it does when engines do what engines do."""

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator

import pytest

from local_engine.replica import TRANSITIONS, Replica
from local_engine.surroundings import Work
from tests.mutants.engines import MUTANTS
from tests.support.scripted_engine import ScriptedProcess, World, a_plan

NO_WEIGHTS = "RuntimeError: Cannot find any model weights with `/models/tiny`\n"


@contextlib.asynccontextmanager
async def running(world: World, replica: Replica, *, wish: str = "ready") -> AsyncIterator[Replica]:
    run = asyncio.create_task(replica.run())
    replica.want(wish)
    try:
        yield replica
        assert not run.done(), run
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)


async def test_it_is_a_candidate_from_the_first_token_on_and_not_before():
    world = World()
    world.probe = "503: loading"
    async with running(world, world.replica()) as replica:
        await world.clock.advance(1)
        assert replica.state == "starting"
        await world.clock.advance(5)
        assert replica.state == "probing"
        assert "gpu/0 open" not in world.happened
        world.probe = ""
        await world.clock.advance(1)
        assert replica.state == "ready"
        assert world.happened == ["gpu/0 launch", "gpu/0 open"]
        assert world.kinds() == ["ready"]


async def test_a_start_that_fails_says_why_in_one_line_and_is_tried_again_later_each_time():
    world = World()
    world.dies_at_start = "Traceback ...\nOSError: [Errno 98] Address already in use\n"
    async with running(world, world.replica(backoff_s=10, backoff_max_s=15, crash_loop=9)) as replica:
        await world.clock.advance(0)
        assert replica.state == "backing_off"
        assert replica.cause is not None
        assert replica.cause.kind == "port_taken"
        assert "\n" not in replica.cause.text
        launched_at = [world.clock.now()]
        for _ in range(3):
            count = len(world.processes)
            await world.until(lambda count=count: len(world.processes) > count)
            launched_at.append(world.clock.now())
        waits = [later - earlier for earlier, later in itertools.pairwise(launched_at)]
        assert 10 <= waits[0] <= 12.2
        assert all(15 <= wait <= 18.2 for wait in waits[1:])
        world.dies_at_start = None
        await world.until(lambda: replica.state == "ready")
        assert all(process.is_clean for process in world.processes[:-1])


async def test_one_that_never_becomes_ready_is_ended_at_its_deadline():
    world = World()
    world.is_listening = False
    async with running(world, world.replica(a_plan(start_timeout_s=50))) as replica:
        await world.clock.advance(49)
        assert replica.state == "starting"
        await world.clock.advance(5)
        assert world.processes[0].signals[0] == "TERM"
        assert world.processes[0].is_clean
        assert replica.cause is not None
        assert (replica.cause.kind, replica.cause.text) == ("start_timeout", "it was not ready after 50 s")


async def test_one_that_is_up_and_cannot_generate_never_takes_a_request():
    world = World()
    world.probe = "500: cannot schedule new futures after shutdown"
    async with running(world, world.replica(a_plan(start_timeout_s=20), crash_loop=1)) as replica:
        await world.until(lambda: replica.state == "crash_looped")
        assert "gpu/0 open" not in world.happened
        assert replica.cause is not None
        assert "cannot schedule new futures" in replica.cause.text


async def test_a_crash_loop_ends_says_so_and_waits_for_the_operator():
    world = World()
    world.dies_at_start = "Traceback\nSegmentationError: what now\n"
    async with running(world, world.replica(crash_loop=3)) as replica:
        await world.until(lambda: replica.state == "crash_looped")
        assert len(world.processes) == 3
        assert world.kinds() == ["start_failed", "start_failed", "start_failed", "crash_looped"]
        await world.clock.advance(3600)
        assert len(world.processes) == 3
        world.dies_at_start = None
        replica.restart()
        await world.until(lambda: replica.state == "ready")


async def test_what_trying_again_cannot_cure_is_not_tried_five_times():
    world = World()
    world.dies_at_start = NO_WEIGHTS
    async with running(world, world.replica(crash_loop=5)) as replica:
        await world.until(lambda: replica.state == "crash_looped")
        assert len(world.processes) == 2


async def test_a_new_plan_ends_a_crash_loop():
    world = World()
    world.dies_at_start = NO_WEIGHTS
    async with running(world, world.replica(crash_loop=2)) as replica:
        await world.until(lambda: replica.state == "crash_looped")
        world.dies_at_start = None
        replica.replace(a_plan(argv=("vllm", "serve", "--model", "there")), replica.settings)
        await world.until(lambda: replica.is_settled and replica.state == "ready")
        assert world.processes[-1].plan.argv[-1] == "there"


async def test_failures_are_forgiven_once_it_lived_well():
    world = World()
    async with running(world, world.replica(crash_loop=2, settled_s=60)) as replica:
        for _ in range(4):
            await world.until(lambda: replica.state == "ready")
            await world.clock.advance(70)
            world.processes[-1].exit(1)
            await world.until(lambda: replica.state != "ready")
        await world.until(lambda: replica.state == "ready")
        assert "crash_looped" not in world.kinds()
        world.processes[-1].exit(1)
        await world.until(lambda: replica.state == "crash_looped")


async def test_one_that_dies_leaves_the_candidates_before_anything_else():
    world = World()
    async with running(world, world.replica()) as replica:
        await world.until(lambda: replica.state == "ready")
        world.processes[0].exit(137)
        await world.clock.settle()
        assert world.happened[-1] == "gpu/0 close"
        assert replica.cause is not None
        assert replica.cause.kind == "killed"
        await world.until(lambda: replica.state == "ready")
        assert replica.restarts == 1
        assert world.happened[-2:] == ["gpu/0 launch", "gpu/0 open"]


async def test_a_restart_drains_before_it_ends_the_process():
    world = World()
    async with running(world, world.replica()) as replica:
        await world.until(lambda: replica.state == "ready")
        world.requests["gpu/0"] = 2
        replica.restart()
        await world.clock.advance(10)
        assert replica.state == "draining"
        assert world.happened[-1] == "gpu/0 close"
        assert world.processes[0].signals == []
        world.requests["gpu/0"] = 0
        await world.until(lambda: replica.is_settled)
        assert [h for h in world.happened if "open" not in h][-3:] == [
            "gpu/0 close",
            "gpu/0 TERM",
            "gpu/0 launch",
        ]
        assert "cut" not in world.kinds()


async def test_a_drain_has_a_deadline_and_an_unknown_count_is_not_zero():
    world = World()
    async with running(world, world.replica(a_plan(drain_timeout_s=30))) as replica:
        await world.until(lambda: replica.state == "ready")
        world.requests["gpu/0"] = None  # a worker does not answer
        replica.restart()
        await world.clock.advance(29)
        assert replica.state == "draining"
        await world.clock.advance(3)
        assert world.processes[0].signals == ["TERM"]
        assert "cut" in world.kinds()


async def test_one_that_does_not_end_is_killed_and_killed_again():
    world = World()
    world.term_s = None
    world.outlives_kills = 2
    async with running(world, world.replica(a_plan(stop_timeout_s=20))) as replica:
        await world.until(lambda: replica.state == "ready")
        replica.want("stopped")
        await world.clock.advance(19)
        assert world.processes[0].signals == ["TERM"]
        await world.clock.advance(2)
        assert world.processes[0].signals == ["TERM", "KILL"]
        assert replica.state == "stopping"
        await world.clock.advance(60)
        assert world.processes[0].signals == ["TERM", "KILL", "KILL", "KILL"]
        assert replica.state == "planned"
        assert world.processes[0].is_clean


async def test_a_drained_one_keeps_running_and_comes_back_when_it_is_resumed():
    world = World()
    async with running(world, world.replica()) as replica:
        await world.until(lambda: replica.state == "ready")
        replica.want("drained")
        await world.clock.advance(60)
        assert replica.state == "draining"
        assert replica.is_settled
        assert world.processes[0].is_alive
        replica.want("ready")
        await world.clock.settle()
        assert replica.state == "ready"
        assert len(world.processes) == 1


async def test_who_wants_it_back_need_not_wait_for_its_drain():
    world = World()
    async with running(world, world.replica()) as replica:
        await world.until(lambda: replica.state == "ready")
        world.requests["gpu/0"] = 5
        replica.want("stopped")
        await world.clock.advance(5)
        assert replica.state == "draining"
        replica.want("ready")
        await world.clock.advance(1)
        assert replica.state == "ready"
        assert world.processes[0].signals == []


async def test_it_sleeps_and_wakes_with_its_process_and_is_probed_before_it_serves():
    world = World()
    async with running(world, world.replica(a_plan(can_sleep=True))) as replica:
        await world.until(lambda: replica.state == "ready")
        replica.want("asleep")
        await world.until(lambda: replica.state == "asleep")
        world.probe = "500: not awake"
        replica.want("ready")
        await world.clock.advance(2)
        assert replica.state == "probing"
        world.probe = ""
        await world.until(lambda: replica.state == "ready")
        assert len(world.processes) == 1
        assert [h for h in world.happened if h.split()[1] in ("sleep", "wake")] == [
            "gpu/0 sleep",
            "gpu/0 wake",
        ]


@pytest.mark.parametrize(("can_sleep", "sleeps"), [(False, True), (True, False)])
async def test_one_that_cannot_sleep_ends_instead(can_sleep: bool, sleeps: bool):
    world = World()
    world.sleeps = sleeps
    async with running(world, world.replica(a_plan(can_sleep=can_sleep))) as replica:
        await world.until(lambda: replica.state == "ready")
        replica.want("asleep")
        await world.until(lambda: replica.state == "planned")
        assert not world.processes[0].is_alive
        replica.want("ready")
        await world.until(lambda: replica.state == "ready")


async def test_one_that_does_not_wake_is_started_anew():
    world = World()
    world.wakes = False
    async with running(world, world.replica(a_plan(can_sleep=True))) as replica:
        await world.until(lambda: replica.state == "ready")
        replica.want("asleep")
        await world.until(lambda: replica.state == "asleep")
        replica.want("ready")
        await world.until(lambda: replica.state == "ready")
        assert len(world.processes) == 2


async def test_one_that_has_requests_and_computes_nothing_is_killed_and_started_again():
    world = World()
    async with running(world, world.replica(hang_timeout_s=60, look_every_s=5)) as replica:
        await world.until(lambda: replica.state == "ready")
        world.doing = {"0": Work(3, 500.0)}
        await world.clock.advance(55)
        assert replica.state == "ready"
        await world.clock.advance(20)
        assert world.processes[0].signals[0] == "KILL"  # it would not hear a SIGTERM
        assert replica.cause is not None
        assert "3 requests and no progress" in replica.cause.text
        world.doing = {"0": Work(0, 0.0)}
        await world.until(lambda: replica.state == "ready")
        assert world.kinds() == ["ready", "hung", "ready"]


async def test_one_rank_that_hangs_among_others_that_work_is_seen():
    world = World()
    async with running(world, world.replica(hang_timeout_s=60, look_every_s=5)) as replica:
        await world.until(lambda: replica.state == "ready")
        for step in range(20):
            world.doing = {"0": Work(1, float(step)), "1": Work(1, 7.0)}
            await world.clock.advance(5)
        assert "hung" in world.kinds()


async def test_slow_progress_no_requests_and_a_pause_of_our_own_are_no_hang():
    world = World()
    async with running(world, world.replica(hang_timeout_s=60, look_every_s=5)) as replica:
        await world.until(lambda: replica.state == "ready")
        for step in range(6):
            world.doing = {"0": Work(1, float(step))}
            await world.clock.advance(50)
        world.doing = {"0": Work(0, 6.0)}
        await world.clock.advance(500)
        world.doing = {"0": Work(1, 6.0)}
        await world.clock.advance(5)
        world.clock.jump(10_000)  # we were stopped
        await world.clock.advance(5)
        world.doing = {"0": Work(1, 7.0)}
        await world.clock.advance(50)
        assert replica.state == "ready"
        assert world.kinds() == ["ready"]


async def test_one_that_answers_nothing_any_more_is_restarted_after_a_while():
    world = World()
    async with running(world, world.replica(hang_timeout_s=60, look_every_s=5)) as replica:
        await world.until(lambda: replica.state == "ready")
        world.doing = None
        await world.clock.advance(40)
        assert replica.state == "ready"
        await world.clock.advance(40)
        assert "hung" in world.kinds()


async def test_engines_start_side_by_side_but_no_more_than_may():
    world = World(starts=2)
    replicas = [world.replica(a_plan(slot)) for slot in range(4)]
    async with contextlib.AsyncExitStack() as stack:
        for replica in replicas:
            await stack.enter_async_context(running(world, replica))
        await world.clock.advance(1)
        assert [replica.state for replica in replicas] == ["starting", "starting", "planned", "planned"]
        await world.until(lambda: all(replica.state == "ready" for replica in replicas))


async def test_a_place_that_is_not_wanted_any_more_goes_to_the_next():
    world = World(starts=1)
    first, second, third = (world.replica(a_plan(slot)) for slot in range(3))
    async with running(world, first), running(world, second), running(world, third):
        await world.clock.advance(1)
        second.want("stopped")
        await world.until(lambda: first.state == third.state == "ready")
        assert second.state == "planned"
        assert not [h for h in world.happened if h.startswith("gpu/1")]


async def test_a_system_without_room_for_a_process_is_tried_again():
    world = World()
    world.launch_errors = [BlockingIOError(11, "Resource temporarily unavailable")]
    async with running(world, world.replica()) as replica:
        await world.clock.settle()
        assert replica.cause is not None
        assert "Resource temporarily unavailable" in replica.cause.text
        await world.until(lambda: replica.state == "ready")


async def test_what_an_earlier_gateway_left_running_is_adopted_once():
    world = World()
    left = ScriptedProcess(world, a_plan())
    world.adoptable["gpu/0"] = left
    async with running(world, world.replica()) as replica:
        await world.until(lambda: replica.state == "ready")
        assert replica.process is left
        assert world.processes == []
        left.exit(None)
        await world.until(lambda: len(world.processes) == 1)


async def test_its_end_with_the_service_is_by_term_then_kill():
    world = World()
    world.term_s = None
    replica = world.replica()
    run = asyncio.create_task(replica.run())
    replica.want("ready")
    await world.until(lambda: replica.state == "ready")
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    ending = asyncio.create_task(replica.end(0.0))
    await world.until(ending.done)
    assert world.processes[0].signals == ["TERM", "KILL"]
    assert world.happened[-2:] == ["gpu/0 close", "gpu/0 TERM"]


def test_a_way_that_is_not_drawn_is_a_bug():
    assert set(TRANSITIONS) == {state for states in TRANSITIONS.values() for state in states}


async def test_only_another_plan_restarts_it():
    world = World()
    async with running(world, world.replica()) as replica:
        await world.until(lambda: replica.state == "ready")
        replica.replace(a_plan(), replica.settings.model_copy(update={"look_every_s": 9.0}))
        await world.clock.advance(20)
        assert replica.is_settled
        assert len(world.processes) == 1
        replica.replace(dataclasses.replace(a_plan(), env={"A": "1"}), replica.settings)
        assert not replica.is_settled
        await world.until(lambda: replica.is_settled)
        assert len(world.processes) == 2


async def mistakes_of_a_restart() -> list[str]:
    """An engine that becomes ready late, serves, and is restarted under load: what must never happen, and did."""
    world = World()
    world.probe = "503: loading"
    world.requests["gpu/0"] = 1
    mistakes = []
    async with running(world, world.replica(a_plan(drain_timeout_s=10))) as replica:
        await world.clock.advance(10)
        if "gpu/0 open" in world.happened:
            mistakes.append("a candidate before it had generated")
        world.probe = ""
        await world.until(lambda: replica.state == "ready")
        replica.restart()
        await world.until(lambda: len(world.processes) > 1)
    is_open = False
    for what in world.happened:
        is_open = what.endswith("open") or (is_open and not what.endswith("close"))
        if is_open and what.endswith("TERM"):
            mistakes.append("told to end while a candidate")
    return mistakes


async def test_a_restart_makes_no_mistake():
    assert await mistakes_of_a_restart() == []


@pytest.mark.parametrize("mutant", ["drains_as_a_candidate", "takes_health_for_readiness"])
async def test_broken_builds_are_caught(monkeypatch, mutant: str):
    monkeypatch.setattr(*MUTANTS[mutant])
    assert await mistakes_of_a_restart()

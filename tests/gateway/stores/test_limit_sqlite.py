"""What only the embedded store of limits has to show: the state machine, a machine's clocks, trouble with its file."""

import tempfile
from pathlib import Path

import apsw
import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from gateway.stores.limit_sqlite import DATABASE_NAME, Clocks, SqliteLimitStore
from gateway.stores.limit_store import StoreAwayError
from policies.limits.limit import Limit, Scope, Window
from policies.limits.messages import Update
from tests.support import limit_machine
from tests.support.limit_memory import START_US

SLOTS = Limit("slots", Scope("key"), "concurrent_requests", 3, Window("now"))
MINUTE = Limit("tokens", Scope("key"), "tokens", 100, Window("rolling", 60))
HOUR_US = 3_600_000_000


class Machine:
    """A machine's clocks, set by the test."""

    def __init__(self) -> None:
        self.wall_us, self.steady_us, self.boot = START_US, 5_000_000, "one"

    @property
    def clocks(self) -> Clocks:
        return Clocks(lambda: self.wall_us, lambda: self.steady_us, self.boot)

    def wait(self, seconds: float) -> None:
        self.wall_us += round(seconds * 1e6)
        self.steady_us += round(seconds * 1e6)


class _Store(SqliteLimitStore):
    def __init__(self) -> None:
        self.machine = Machine()
        self._directory = tempfile.TemporaryDirectory()
        super().__init__(Path(self._directory.name), clocks=self.machine.clocks)

    def wait(self, seconds: float) -> None:
        self.machine.wait(seconds)

    def close(self) -> None:
        self.shut()
        self._directory.cleanup()


@pytest.mark.parametrize("over_admission", [0.0, 0.5])
def test_limits_hold_whatever_happens_in_whatever_order(over_admission) -> None:
    machine = limit_machine.machine(_Store, over_admission=over_admission)
    run_state_machine_as_test(machine, settings=settings(**limit_machine.settings()))


def say(store: SqliteLimitStore, holder: str, number: int, limit: Limit, **said):
    counter = limit.counter("k", START_US)
    return store.apply(Update(holder, number, 10_000_000, (counter,), **said))


@pytest.mark.parametrize("step_us", [HOUR_US, -HOUR_US])
def test_a_clock_that_is_set_takes_no_slot_away_and_opens_no_second_window(tmp_path, step_us) -> None:
    machine = Machine()
    store = SqliteLimitStore(tmp_path, clocks=machine.clocks)
    assert say(store, "a", 1, SLOTS, groups=(((0, 3),),)).refusals == (None,)
    assert say(store, "b", 1, MINUTE, posts=((0, 0, 100),)).readings[0].spent == 100
    machine.wall_us += step_us
    machine.wait(1)
    assert say(store, "b", 2, SLOTS, groups=(((0, 1),),)).refusals[0].held == 3
    refusal = say(store, "b", 3, MINUTE, groups=(((0, 1),),)).refusals[0]
    assert refusal.spent == 100
    store.shut()


def test_the_wall_clock_is_taken_up_when_nobody_holds_anything(tmp_path) -> None:
    machine = Machine()
    store = SqliteLimitStore(tmp_path, clocks=machine.clocks)
    say(store, "a", 1, SLOTS, is_last=True)
    machine.wall_us += HOUR_US
    assert store.look([])[0] == machine.wall_us
    store.shut()


def test_after_a_reboot_time_goes_on_from_the_wall_clock(tmp_path) -> None:
    machine = Machine()
    store = SqliteLimitStore(tmp_path, clocks=machine.clocks)
    say(store, "a", 1, MINUTE, posts=((0, 0, 100),))
    store.shut()
    machine.boot, machine.steady_us = "two", 1_000_000
    machine.wall_us += 30_000_000
    store = SqliteLimitStore(tmp_path, clocks=machine.clocks)
    now_us, (reading,) = store.look([MINUTE.counter("k", START_US)])
    assert (now_us, reading.spent) == (machine.wall_us, 100)
    store.shut()


def test_a_file_that_cannot_be_locked_is_a_store_that_is_away(tmp_path) -> None:
    store = SqliteLimitStore(tmp_path)
    other = apsw.Connection(str(tmp_path / DATABASE_NAME))
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreAwayError, match="locked"):
        say(store, "a", 1, SLOTS, groups=(((0, 1),),))
    other.execute("ROLLBACK")
    other.close()
    assert say(store, "a", 1, SLOTS, groups=(((0, 1),),)).refusals == (None,)
    store.shut()


def test_only_its_owner_may_read_it(tmp_path) -> None:
    SqliteLimitStore(tmp_path).shut()
    assert (tmp_path / DATABASE_NAME).stat().st_mode & 0o777 == 0o600

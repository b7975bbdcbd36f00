"""A stream's events are journaled once, whatever becomes of the store while they are."""

from types import SimpleNamespace

import pytest

from gateway.overflow import running
from gateway.overflow.store import OutOfOrderError, StoreAwayError


class Journal:
    """The store's journal of one job. `fates`: what becomes of the next calls."""

    def __init__(self, events=(), fates=()):
        self.events = list(events)
        self.fates = list(fates)

    async def append_events(self, lease, first, events):
        fate = self.fates.pop(0) if self.fates else "taken"
        if fate == "lost":
            raise StoreAwayError("away")
        if first != len(self.events):
            raise OutOfOrderError(len(self.events))
        self.events += events
        if fate == "unanswered":
            raise StoreAwayError("away")


async def written(journal, *pieces, runs=1, monkeypatch):
    monkeypatch.setattr(running, "_AWAY_S", 0.0)
    runner = running.Runner.__new__(running.Runner)
    runner._store, runner._on_change = journal, lambda _: None
    run = SimpleNamespace(lease=None, journaled=0, job=SimpleNamespace(id="job_1", runs=runs))
    for piece in pieces:
        await runner._append(run, piece)
    return journal.events


@pytest.mark.parametrize("fate", ["taken", "lost", "unanswered"])
@pytest.mark.parametrize("at", [0, 1])
async def test_what_a_store_took_without_saying_so_is_not_written_again(monkeypatch, fate, at):
    journal = Journal(fates=[*["taken"] * at, fate])
    assert await written(journal, [b"a", b"b"], [b"c"], monkeypatch=monkeypatch) == [b"a", b"b", b"c"]


async def test_a_later_run_goes_on_behind_what_an_earlier_one_wrote(monkeypatch):
    journal = Journal([b"x"])
    assert await written(journal, [b"a"], [], [b"b"], runs=2, monkeypatch=monkeypatch) == [b"x", b"a", b"b"]

"""Broken builds of the part of the queue that draws jobs, made of this process by a monkeypatch."""

import pytest

from gateway.overflow.drawing import Drawing
from gateway.overflow.headroom import Room
from gateway.overflow.running import Runner


def ignores_lost_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """What most queues do: whoever has begun goes on."""

    async def renew(self: Drawing, now: float) -> None:
        self._renewed_at = now

    monkeypatch.setattr(Drawing, "_renew", renew)


def claims_what_it_can_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """Push instead of pull: as much as there is."""
    monkeypatch.setattr(Drawing, "_room", lambda *_: Room(1000, "p"))


def bills_what_it_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever did the work is paid for it, whosever the job was by then."""
    monkeypatch.setattr(Runner, "_waste", lambda *_: None)

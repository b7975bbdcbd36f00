"""Ports for engines: consecutive ones that nobody listens on.

Owns which replica has which, for as long as this process lives, so that a plan made again is the same plan. Between
the look and the engine's own listening somebody else may take one; the engine then says so, and starting it again
plans nothing new.
"""

import contextlib
import random
import socket

from local_engine.plan import PlanError
from local_engine.processes import PORTS


class FreePorts:
    """`range_` is where to look; ports that were given out are not given to another."""

    def __init__(self, range_: range = PORTS) -> None:
        self._range = range_
        self._owners: dict[str, tuple[int, int, str]] = {}

    def take(self, owner: str, count: int, host: str) -> int:
        """See `plan.Ports`."""
        held = self._owners.get(owner)
        if held is not None and held[1:] == (count, host):
            return held[0]
        taken = {port for first, number, _ in self._owners.values() for port in range(first, first + number)}
        for first in random.sample(self._range, len(self._range)):
            wanted = range(first, first + count)
            if wanted.stop <= self._range.stop and taken.isdisjoint(wanted) and _are_free(wanted, host):
                self._owners[owner] = (first, count, host)
                return first
        raise PlanError(
            f"no {count} free ports in a row on {host} between {self._range.start} and {self._range.stop}"
        )

    def hold(self, owner: str, first: int, count: int, host: str) -> None:
        """A replica has these already: its engine runs."""
        self._owners[owner] = (first, count, host)

    def held(self, owner: str) -> tuple[int, int, str] | None:
        """First, count and host of what a replica has."""
        return self._owners.get(owner)


def _are_free(ports: range, host: str) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as probes:
        for port in ports:
            probe = probes.enter_context(socket.socket(family))
            try:
                probe.bind((host, port))
            except OSError:
                return False
    return True

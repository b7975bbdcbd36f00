"""Broken builds of what happens around a death: recovery in the parent, the order of answer and row in the worker."""

import asyncio
import types

import msgspec

import gateway.intents
import gateway.server
from gateway.settle import Settler
from gateway.stores import ledger_table


def never_recovers() -> None:
    """What a dead worker left stays where it is."""
    gateway.server.recover_orphans = lambda storage: 0


def recovers_intents_first() -> None:
    """The intent of a settled request wins over its row."""
    areas = gateway.intents._areas

    def swapped(content: bytes, offset: int, room_bytes: int):
        if offset:
            return areas(content, 0, gateway.intents._INTENT_ROOM)
        return areas(content, gateway.intents._ROW_AT, gateway.intents._ROW_ROOM)

    gateway.intents._areas = swapped


def recovers_without_idempotence() -> None:
    """Every record that a dead worker left becomes a row, also the second one of a request."""
    insert = ledger_table.insert_possible

    def again(connection, rows):
        known = {request_id for (request_id,) in connection.execute("SELECT request_id FROM ledger")}
        entered = []
        for row in rows:
            again = "-again" if row.request_id in known else ""
            known.add(row.request_id)
            entered.append(msgspec.structs.replace(row, request_id=row.request_id + again))
        return insert(connection, entered)

    gateway.intents.ledger_table = types.SimpleNamespace(insert_possible=again)


def settles_late() -> None:
    """The row is made a while after the answer went out."""
    settle = Settler.settle
    Settler.settle = lambda self, *arguments: asyncio.get_running_loop().call_later(
        0.15, settle, self, *arguments
    )


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (never_recovers, recovers_intents_first, recovers_without_idempotence, settles_late)
}

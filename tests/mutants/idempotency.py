"""Broken builds of idempotency keys that their tests must catch."""

import time

from gateway.stores import answer_table


def looks_before_it_claims() -> None:
    """Whether a key is taken is read, and the claim written a moment later."""
    claim = answer_table.claim

    def late(connection, asked, now_time, keep_s):
        if connection.execute("SELECT 1 FROM kept_answer WHERE scope = ?", (asked.scope,)).get is None:
            time.sleep(0.05)
            connection.execute("DELETE FROM kept_answer WHERE scope = ? AND status IS NULL", (asked.scope,))
        return claim(connection, asked, now_time, keep_s)

    answer_table.claim = late


MUTANTS = {mutant.__name__: mutant for mutant in (looks_before_it_claims,)}

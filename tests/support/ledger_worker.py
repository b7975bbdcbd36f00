"""Workers that open and close requests as fast as they can, to be killed; their journal is the independent witness.

    python -m tests.support.ledger_worker

Each line of its input, `["STORAGE", "JOURNAL", "SEED", "MUTANT"]`, is one worker: a process of its own, forked so that
nothing is imported again. It says `ready PID` when that has begun, and `gone` when that has ended, however.

Journal lines: `begin ID`, `opened ID` (from here on there must be a row), `ending ID COST` and `closed ID COST`
(from here on that cost must be in it). A line is one write to an O_APPEND file: a kill leaves it whole.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

from gateway.ledger import Ledger
from gateway.ledger_row import row_of
from tests.mutants.ledger import MUTANTS
from tests.support.builders import an_exchange

SLOTS = 256


def main(storage: str, journal: str, seed: str, mutant: str = "") -> None:
    if mutant:
        MUTANTS[mutant]()
    chance = random.Random(int(seed))
    ledger = Ledger(Path(storage), f"{seed}-{os.getpid()}", slots=SLOTS)
    descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    open_exchanges = []
    print(f"ready {os.getpid()}", flush=True)
    for number in range(1_000_000):
        while ledger.health().slots_in_use > SLOTS - 16:
            time.sleep(0.001)
        exchange = an_exchange(request_id=f"{seed}-{number}", model_name="demo")
        os.write(descriptor, f"begin {exchange.request_id}\n".encode())
        ledger.open(exchange)
        os.write(descriptor, f"opened {exchange.request_id}\n".encode())
        open_exchanges.append(exchange)
        while len(open_exchanges) > chance.randrange(1, 30):
            exchange = open_exchanges.pop(chance.randrange(len(open_exchanges)))
            exchange.ended, exchange.cost_nanousd = "completed", chance.randrange(10**12)
            line = f"{exchange.request_id} {exchange.cost_nanousd}\n"
            os.write(descriptor, f"ending {line}".encode())
            ledger.close(row_of(exchange, worker=ledger.worker))
            os.write(descriptor, f"closed {line}".encode())


if __name__ == "__main__":
    for line in sys.stdin:
        worker = os.fork()
        if worker == 0:
            main(*json.loads(line))
            os._exit(0)
        os.waitpid(worker, 0)
        print("gone", flush=True)
